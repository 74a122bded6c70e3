"""The names that a configuration may import without being asked, by kind (docs/security.md).

Whoever adds one answers for it: nothing that it does with options from a stranger may run code, open a pickle, or write
where the options say (of loggers see :func:`adamerge.commands.run.folder.load_config`). So never ``torch.load``,
``torch.hub.load``, ``torch.jit.load``, readers of pandas and numpy, ``DatasetFolder``, data sets that open pickles
(torchvision's CIFAR10, LSUN, ...), ``hydra.utils.get_*``, and nothing of Python's own library.
"""

import importlib
import inspect
import pkgutil
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

# Names as they are written; with * the public classes that a module's own package defines, with ** also those of the
# modules inside it. Whatever else the module has at hand, such as adamerge.system.files.os, is not among them.
LISTED: dict[str, tuple[str, ...]] = {
    "adamerge's parts of a run": (
        *("adamerge.backbones.**", "adamerge.objectives.**", "adamerge.transforms.**", "adamerge.merges.**"),
        *("adamerge.methods.**", "adamerge.zoo.Tokenizer", "adamerge.model.granularity.*"),
        *("adamerge.model.constraints.*", "adamerge.model.refinement.*", "adamerge.model.starts.*"),
        *("adamerge.model.encoder.EncoderOptions", "adamerge.model.teachers.*", "adamerge.model.batch_norm.*"),
    ),
    "adamerge's callbacks": tuple(
        f"adamerge.callbacks.{name}"  # those that write no files: the others every run has
        for name in (
            "CollapseGuard",
            "HandOverLabels",
            "KeepBest",
            "LogCoefficients",
            "NeverWorse",
            "UnlabeledCriteria",
        )
    ),
    "adamerge's data": (
        *("adamerge.data.*", "adamerge.data.views.*", "adamerge.data.benchmarks.task"),
        *("adamerge.zoo.tasks", "adamerge.zoo.benchmark.benchmark_tasks", "adamerge.zoo.text.text_tasks"),
    ),
    "adamerge's references with labels": ("adamerge.results.baselines.LabelledCrossEntropy",),
    "optimizers and schedulers": ("torch.optim.*", "torch.optim.lr_scheduler.*"),
    "trainers, strategies and environments": (
        *("lightning.Trainer", "lightning.pytorch.Trainer", "lightning.pytorch.strategies.DDPStrategy"),
        "lightning.pytorch.plugins.environments.SLURMEnvironment",
    ),
    "loggers": tuple(
        f"lightning.pytorch.loggers.{name}"
        for name in ("CSVLogger", "TensorBoardLogger", "WandbLogger", "MLFlowLogger")
    ),
    "callbacks": (
        *("lightning.pytorch.callbacks.EarlyStopping", "lightning.pytorch.callbacks.LearningRateMonitor"),
        *("lightning.pytorch.callbacks.Timer", "lightning.pytorch.callbacks.DeviceStatsMonitor"),
    ),
    "data sets": (
        *(f"torchvision.datasets.{name}" for name in ("ImageFolder", "DTD", "EuroSAT", "FakeData", "Food101", "GTSRB")),
        *(f"torchvision.datasets.{name}" for name in ("OxfordIIITPet", "RenderedSST2", "STL10", "SUN397", "SVHN")),
        *("torch.utils.data.ConcatDataset", "torch.utils.data.Subset", "torch.utils.data.TensorDataset"),
    ),
    "transforms of images": ("torchvision.transforms.*", "torchvision.transforms.v2.*"),
    "metrics": ("torchmetrics.classification.*",),
    "Auto classes": ("transformers.Auto*",),
    "launchers": (
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
    ),
}
LIBRARIES = frozenset(name.split(".")[0] for names in LISTED.values() for name in names)


@cache
def is_listed(path: str) -> bool:
    """Whether an import path leads to a name of the list; only modules that the list itself names are imported."""
    names = [name for names in LISTED.values() for name in names]
    if path in names:
        return True
    return any("*" in name and _matches(path, name) for name in names)


def _matches(path: str, pattern: str) -> bool:
    """Whether a path names a public class that is defined where a pattern says."""
    module, _, name = pattern.rpartition(".")
    parts = path.removeprefix(f"{module}.").split(".")
    if not path.startswith(f"{module}.") or not all(part.isidentifier() and part[0] != "_" for part in parts):
        return False
    if name != "**" and (len(parts) > 1 or not fnmatchcase(parts[0], name)):
        return False
    found = resolved(path) if name == "**" else _attribute(module, parts[0])
    return inspect.isclass(found) and f"{found.__module__}.".startswith(f"{module}.")


def _attribute(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except Exception:  # whatever a module raises that cannot be imported here
        return None


def resolved(path: str) -> Any:
    """Return what an import path leads to; None where that is nothing. It imports the path's modules."""
    try:
        return pkgutil.resolve_name(path)
    except Exception:  # whatever a module raises that cannot be imported here
        return None
