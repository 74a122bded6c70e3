"""Check a run before it starts, from its configuration and the headers of its files; no weight is read."""

import importlib.util
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from adamerge.commands.run.build import build, build_optional, check_node
from adamerge.commands.run.check_beside import check_beside
from adamerge.commands.run.check_files import (
    Problems,
    build_data,
    check_pool,
    check_start,
    check_tasks,
    checkpoint_problems,
    forecast_problems,
)
from adamerge.commands.run.check_method import check_callbacks, check_method
from adamerge.commands.run.forecast import forecast_texts
from adamerge.commands.run.processes import is_sharded
from adamerge.commands.run.shipped import CONFIG_NAME, shipped_folder
from adamerge.commands.run.stages import first_stage
from adamerge.commands.run.start_rules import check_start_rule
from adamerge.errors import InputError, check_number, did_you_mean, shorten
from adamerge.objectives import check_objective
from adamerge.results.scoring import REFERENCES
from adamerge.system.files import ensure_writable
from adamerge.transforms import check_transform

RESERVED = (*REFERENCES, "start")
_LIMITS = {"steps": (1, math.inf), "checkpoint_every": (1, math.inf), "seed": (0, 2**32 - 1)}
_SWITCHES = ("evaluate", "references")
_LOGGERS = {"TensorBoardLogger": "tensorboard", "WandbLogger": "wandb", "MLFlowLogger": "mlflow"}  # to their packages
_PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
_SHORT = ("32", "16", "bf16")  # Lightning's other names of them
_PACK = "write task vectors so with adamerge transform, and name the file as pool.task_vectors"
_WHEN_SHARDED = {  # option: what it may be where each device holds a part of the model, and the remedy
    "pool.storage": ((None, "auto", "ram", "device"), "parts are kept in memory; set auto"),
    "pool.dtype": ((None, "float32"), _PACK),
    "transform._target_": ((None,), _PACK),
    "encoder.compile": ((None, False), "set false"),
    "encoder.compute_dtype": ((None, "float32"), "set float32"),
    "method.ranking": ((None, "inner_product"), "set inner_product"),
    "teacher_cache": ((None,), "leave it out"),
}


def check(config: DictConfig) -> list[str]:
    """Return everything that is wrong with a configuration."""
    problems, parts = Problems(), dict[str, Any]()
    with problems.naming("configuration"):
        problems += unknown_keys(config)
    _check_settings(config, (*_LIMITS, *_SWITCHES, "name"), problems)
    with problems.naming("run_dir"):
        parts["run_dir"] = check_folder("run_dir", config.get("run_dir"))
    with problems.naming("teacher_cache"):
        if config.get("teacher_cache") is not None:
            check_folder("teacher_cache", config.teacher_cache)
    with problems.naming("start"):
        check_start_rule(config)
    _build_stage(config, parts, problems)
    with problems.naming("encoder"):
        parts["encoder"] = build_optional(config, "encoder")
    with problems.naming("batch_norm"):
        build(config, "batch_norm")
    with problems.naming("backbone"):
        parts["backbone"] = build(config, "backbone")
    with problems.naming("trainer"):
        check_node(config, "trainer")
        check_trainer(config)
        problems += _sharding_problems(config) if is_sharded(config) else []
    if "backbone" in parts:
        with problems.naming("pool"):
            parts["headers"] = check_pool(config, parts["backbone"], problems, parts.get("transform"))
            problems += forecast_problems(parts["headers"].shapes, parts.get("run_dir"), parts.get("encoder"))
            problems += checkpoint_problems(parts["headers"].shapes, parts.get("encoder"))
        with problems.naming("data"):
            if (data := build_data(config, parts["backbone"], problems)) is not None:
                parts["data"] = data
    check_start(config, parts, problems)
    with problems.naming("encoder.engine"):
        check_beside(parts)
    check_method(config, parts, problems)
    check_callbacks(config, parts, problems)
    with problems.naming("first_stage"):
        _check_first_stage(config, parts, problems)
    _check_tasks(config, parts, problems)
    return problems


def _check_tasks(config: DictConfig, parts: dict[str, Any], problems: Problems) -> None:
    """Look at the tasks' inputs, and forecast what texts and teachers take."""
    with problems.naming("data"):
        check_tasks(config, parts, problems)
    with problems.naming("teachers"):
        build_optional(config, "teachers")
        problems += [] if problems else forecast_texts(config, parts)


def unknown_keys(config: DictConfig) -> list[str]:
    """Return keys that nothing reads: a mistyped one in an experiment file composes in silence."""
    default: Any = OmegaConf.load(shipped_folder("") / f"{CONFIG_NAME}.yaml")
    groups = [str(next(iter(item))).split()[-1] for item in default["defaults"] if not isinstance(item, str)]
    options = [key for key in (*map(str, default), *groups) if key != "defaults" and not key.startswith("hydra")]
    return [
        f"Unknown option {key!r}.{did_you_mean(key, options)} Known: {', '.join(sorted(options))}."
        for key in map(str, config)
        if key not in options
    ]


def _check_first_stage(config: DictConfig, parts: dict[str, Any], problems: Problems) -> None:
    """Check the first stage as the run is checked; a problem of both is said once."""
    stage = first_stage(config)
    if stage is None:
        return
    guards = [str(OmegaConf.select(config, f"callbacks.{name}._target_")) for name in config.get("callbacks") or {}]
    if getattr(parts.get("data"), "folds", 0) and any(guard.endswith(".NeverWorse") for guard in guards):
        problems.append("data.holdout: auto learns on parts of so few samples, in one stage only; set a share, as 0.2.")
    of_stage, stage_parts = Problems(), dict(parts)
    _check_settings(stage, ("steps", "checkpoint_every"), of_stage)
    _build_stage(stage, stage_parts, of_stage)
    check_start(stage, stage_parts, of_stage)
    check_method(stage, stage_parts, of_stage)
    check_callbacks(stage, stage_parts, of_stage)
    problems += [f"first_stage: {problem}" for problem in of_stage if problem not in problems]
    parts["objectives"] = [stage_parts.get("objective")]


def _check_settings(config: DictConfig, options: Iterable[str], problems: Problems) -> None:
    """Check the run's own numbers, switches and texts."""
    for option in options:
        with problems.naming(option):
            value = config.get(option)
            if option in _LIMITS:
                check_number(option, value, *_LIMITS[option], whole=True)
            elif option in _SWITCHES and not isinstance(value, bool):
                raise InputError(f"{option}: expected true or false, found {value!r}.")
            elif option == "name" and (not isinstance(value, (str, int)) or not str(value)):
                raise InputError(f"name: expected a text, found {value!r}; such as name=adapt.")
            elif option == "name" and value in RESERVED:
                rows = shorten(RESERVED)
                raise InputError(
                    f"name: {value!r} is reserved for a row of the results, as are {rows}; choose another."
                )


def check_folder(option: str, path: Any) -> Path:
    """Check that a run can write to the folder that an option names, and return what exists of it; none is made.

    Raises:
        InputError: If it cannot.
    """
    if not isinstance(path, str) or not path.strip():
        raise InputError(f"{option}: expected a folder, found {path!r}; such as {option}=runs/first.")
    folder = Path(path).expanduser().absolute()
    if folder.resolve() == Path(folder.anchor):
        raise InputError(f"{option}: expected a folder of the run's own, found {path}, the root; choose one below it.")
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        where = "" if existing == folder else f"{existing}, which is "
        raise InputError(f"{option}: expected a folder, found {path}: {where}a file. Choose another {option}.")
    try:
        ensure_writable(existing)
    except InputError as error:
        raise InputError(f"{option}: {error}") from error
    return existing


def _build_stage(config: DictConfig, parts: dict[str, Any], problems: Problems) -> None:
    """Build adamerge's parts of a stage, and check the signatures of the others."""
    for node in ("objective", "granularity", "constraint"):
        with problems.naming(node):
            parts[node] = build(config, node)
    with problems.naming("objective"):
        if "objective" in parts:
            check_objective(parts["objective"])
    with problems.naming("transform"):
        if (transform := build_optional(config, "transform")) is not None:
            check_transform(transform)
            parts["transform"] = transform
    with problems.naming("optimizer"):
        _try_optimizer(config)
    for node in (f"logger.{name}" for name in config.get("logger") or {}):
        with problems.naming(node):
            check_node(config, node)
            check_package(node, str(OmegaConf.select(config, f"{node}._target_")))


def _try_optimizer(config: DictConfig) -> None:
    """Make the optimizer for a dummy parameter, as it refuses its options only when it is made."""
    make = build(config, "optimizer")
    try:
        make([torch.nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"optimizer: {error}.") from error


def check_package(where: str, target: str) -> None:
    """Check that the package behind one of Lightning's loggers is installed: they ask for it only when they start.

    Raises:
        InputError: If it is not.
    """
    package = _LOGGERS.get(target.rpartition(".")[2])
    if package is not None and importlib.util.find_spec(package) is None:
        raise InputError(f"{where}: needs the package {package}: pip install 'adamerge[{package}]'.")


def check_trainer(config: DictConfig) -> None:
    """Refuse unusable devices and precisions, and a GPU that is not there, before a weight is read."""
    node = OmegaConf.masked_copy(config.trainer, ["devices", "num_nodes", "accelerator", "precision"])
    options: Any = OmegaConf.to_container(node, resolve=True)
    accelerator = options.get("accelerator")
    has_gpu = torch.cuda.is_available() or (accelerator == "gpu" and torch.backends.mps.is_available())
    if accelerator in ("gpu", "cuda") and not has_gpu:
        raise InputError(
            f"trainer.accelerator: found {accelerator}, but torch {torch.__version__} finds no CUDA device here. Take "
            "the processor, trainer=cpu, or start the run on a machine with a GPU and a torch that was built for it."
        )
    devices, num_nodes = options.get("devices", 1), options.get("num_nodes", 1)
    listed = isinstance(devices, list) and devices and all(_is_whole(device, 0) for device in devices)
    if not (listed or devices in ("auto", -1, "-1") or _is_whole(devices, 1)):
        raise InputError(
            f"trainer.devices: expected auto, a number of devices >= 1 or a list of them, found {devices!r}; such as "
            "trainer.devices=2."
        )
    check_number("trainer.num_nodes", num_nodes, 1, whole=True)
    if str(precision := options.get("precision") or "32-true") not in ("auto", *_PRECISIONS, *_SHORT):
        raise InputError(
            f"trainer.precision: expected auto or one of {', '.join(_PRECISIONS)}, found {precision}. In all of them "
            "coefficients stay float32; the mixed ones compute the encoder in half precision."
        )


def _is_whole(value: Any, least: int) -> bool:
    text = str(value)
    return not isinstance(value, bool) and text.isdigit() and int(text) >= least


def _sharding_problems(config: DictConfig) -> list[str]:
    """List what a run whose devices each hold a part of the model (``trainer=fsdp``) cannot do."""
    problems = []
    for option, (taken, remedy) in _WHEN_SHARDED.items():
        value = OmegaConf.select(config, option)
        if value not in taken:
            name = option.removesuffix("._target_")
            problems.append(f"{name}: not with trainer=fsdp, found {value}: {remedy}.")
    return problems
