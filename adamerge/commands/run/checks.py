"""What a run's settings, file headers and tasks decide before anything is read or trained."""

import importlib.util
import json
import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from adamerge.data.unlabeled_tasks import Task
from adamerge.errors import InputError, did_you_mean, shorten
from adamerge.model import starts as initial
from adamerge.model.coefficients import Coefficients
from adamerge.model.constraints import Constraint
from adamerge.model.encoder import EncoderOptions, select
from adamerge.model.granularity import Granularity, GroupIndex
from adamerge.pool.headers import Headers
from adamerge.pool.packed import PackedFile
from adamerge.pool.pool import ExpertPool
from adamerge.system.files import ensure_writable
from adamerge.system.memory import free_memory

RESERVED = ("pretrained", "experts", "task_arithmetic_0.3", "weight_average", "start")
_LIMITS = {"steps": (1, None, 150), "checkpoint_every": (1, None, 25), "seed": (0, 2**32 - 1, 0)}
_SWITCHES = ("evaluate", "references")
_LOGGERS = {"TensorBoardLogger": "tensorboard", "WandbLogger": "wandb", "MLFlowLogger": "mlflow"}  # to their packages
SETTINGS = (*_LIMITS, *_SWITCHES, "name")


def packed_problems(path: Any, headers: Headers) -> list[str]:
    """List how a file of packed task vectors differs from a pool, by its header; its hashes wait for the run."""
    if not isinstance(path, str) or not path:
        return [f"pool.task_vectors: expected a file, found {path!r}; name one or leave it out."]
    try:
        packed = PackedFile(path)
    except (InputError, OSError) as error:
        return [str(error)]
    return list(packed.problems(headers.expert_names, headers.shapes)) if headers.shapes else []


def hash_problems(hashes: Any, experts: Mapping[str, object]) -> list[str]:
    """List what is wrong with the hashes that a pool gives; whether the files have them waits for the run."""
    if hashes is None:
        return []
    known = ("base", *experts)
    if not isinstance(hashes, Mapping) or not all(isinstance(found, str) for found in hashes.values()):
        return [f"pool.sha256: expected a mapping from base and experts to SHA-256, found {hashes}."]
    return [
        f"pool.sha256: {name!r} is neither base nor an expert.{did_you_mean(str(name), known)}"
        for name in hashes
        if name not in known
    ]


def check_package(where: str, target: str) -> None:
    """Check that the package behind one of Lightning's loggers is installed: they ask for it only when they start.

    Raises:
        InputError: If it is not.
    """
    package = _LOGGERS.get(target.rpartition(".")[2])
    if package is not None and importlib.util.find_spec(package) is None:
        raise InputError(f"{where}: needs the package {package}: pip install 'adamerge[{package}]'.")


def check_setting(option: str, value: Any) -> None:
    """Check one of ``SETTINGS``.

    Raises:
        InputError: If its value is not one that a run can have.
    """
    if option in _LIMITS:
        low, high, example = _LIMITS[option]
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < low or (high is not None and value > high):
            limits = f">= {low}" if high is None else f"from {low} to {high}"
            raise InputError(
                f"{option}: expected a whole number {limits}, found {value!r}; such as {option}={example}."
            )
    elif option in _SWITCHES:
        if not isinstance(value, bool):
            raise InputError(f"{option}: expected true or false, found {value!r}.")
    elif not isinstance(value, (str, int)) or not str(value):
        raise InputError(f"name: expected a text, found {value!r}; such as name=adapt.")
    elif value in RESERVED:
        raise InputError(
            f"name: {value!r} is reserved for a row of the results, as are {shorten(RESERVED)}; choose another."
        )


def check_devices(devices: Any, num_nodes: Any) -> None:
    """Refuse what is no number of devices or nodes.

    Raises:
        InputError: If ``devices`` or ``num_nodes`` is something else.
    """
    listed = isinstance(devices, list) and devices and all(_is_whole(device, 0) for device in devices)
    if not (listed or devices in ("auto", -1, "-1") or _is_whole(devices, 1)):
        raise InputError(
            f"trainer.devices: expected auto, a number of devices >= 1 or a list of them, found {devices!r}; such as "
            "trainer.devices=2."
        )
    if not _is_whole(num_nodes, 1):
        raise InputError(
            f"trainer.num_nodes: expected a number >= 1, found {num_nodes!r}; such as trainer.num_nodes=1."
        )


def check_accelerator(name: Any) -> None:
    """Refuse a GPU where there is none, before a weight is read.

    Raises:
        InputError: If ``name`` is ``gpu`` or ``cuda`` and torch finds no such device.
    """
    found = torch.cuda.is_available() or (name == "gpu" and torch.backends.mps.is_available())
    if name in ("gpu", "cuda") and not found:
        raise InputError(
            f"trainer.accelerator: found {name}, but torch {torch.__version__} finds no CUDA device here. Take the "
            "processor, trainer=cpu, or start the run on a machine with a GPU and a torch that was built for it."
        )


def sharding_problems(config: Mapping[str, Any]) -> list[str]:
    """List what a run whose devices each hold a part of the model (``trainer=fsdp``) cannot do."""
    nodes = {node: config.get(node) or {} for node in ("pool", "transform", "encoder", "method")}
    pack = "write task vectors so with adamerge transform, and name the file as pool.task_vectors"
    refused = {
        "pool.storage": (nodes["pool"].get("storage") == "stream", "stream", "parts are kept in memory; set auto"),
        "pool.dtype": (nodes["pool"].get("dtype") not in (None, "float32"), nodes["pool"].get("dtype"), pack),
        "transform": (nodes["transform"].get("_target_") is not None, nodes["transform"].get("_target_"), pack),
        "encoder.compile": (bool(nodes["encoder"].get("compile")), nodes["encoder"].get("compile"), "set false"),
        "method.ranking": (nodes["method"].get("ranking") == "cosine", "cosine", "set inner_product"),
        "teacher_cache": (config.get("teacher_cache") is not None, config.get("teacher_cache"), "leave it out"),
    }
    return [
        f"{option}: not with trainer=fsdp, found {found}: {remedy}."
        for option, (is_refused, found, remedy) in refused.items()
        if is_refused
    ]


def _is_whole(found: Any, least: int) -> bool:
    text = str(found)
    return not isinstance(found, bool) and text.isdigit() and int(text) >= least


def check_folder(option: str, path: Any) -> Path:
    """Check that a run can write to the folder that an option names, and return what exists of it; none is made.

    Raises:
        InputError: If it cannot.
    """
    if not isinstance(path, str) or not path.strip():
        raise InputError(f"{option}: expected a folder, found {path!r}; such as {option}=runs/first.")
    folder = Path(path).absolute()
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


def check_groups(granularity: Granularity, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Form the groups of the parameters that merge.

    Raises:
        InputError: If the granularity does not fit their names or shapes.
    """
    index: object = granularity(shapes)
    if not isinstance(index, GroupIndex):
        raise InputError(f"granularity: expected a GroupIndex from {type(granularity).__name__}, found {index!r}.")


def check_init(headers: Headers, granularity: Granularity, init: Any, constraint: Constraint) -> None:
    """Make the initial coefficients from shapes alone.

    Raises:
        InputError: If ``init`` does not fit the experts.
    """
    start = initial.start_of(init)
    if start is not None and not isinstance(start, initial.Lines):
        return  # it may read weights
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself says it
        Coefficients(cast(ExpertPool, headers), granularity, init, constraint)


def check_start(path: Path) -> None:
    """Check that a coefficients file is there and is one, as far as that shows without the pool.

    Raises:
        InputError: If not.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"init: {path}: no such file. Name a coefficients.json that a run has written.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"init: {path}: not a coefficients file: expected JSON ({error}).") from error
    if not isinstance(content, dict) or "coefficients" not in content:
        raise InputError(f"init: {path}: not a coefficients file: expected the coefficients.json of a run.")


def forecast_problems(shapes: Mapping[str, tuple[int, ...]], folder: Path | None) -> list[str]:
    """Say where the merged parameters are too large for the memory, or the disk of ``folder``, that is free."""
    problems = []
    model_bytes = 4 * sum(math.prod(shape) for shape in shapes.values())
    if 3 * model_bytes > free_memory():
        problems.append(
            f"Memory: merging needs about {3 * model_bytes / 1e9:.1f} GB (base, merged weights and their gradients) "
            f"besides activations; {free_memory() / 1e9:.1f} GB are free. Close other programs or use a larger machine."
        )
    if folder is not None and shutil.disk_usage(folder).free < 2 * model_bytes:
        problems.append(
            f"Disk: {folder} has less than the {2 * model_bytes / 1e9:.1f} GB free that an export may need."
        )
    return problems


def checkpoint_problems(shapes: Mapping[str, tuple[int, ...]], options: EncoderOptions | None) -> list[str]:
    """List what ``encoder.checkpoint`` names and no merged parameter lies in; the encoder itself is not built."""
    patterns = getattr(options, "checkpoint", False)
    if isinstance(patterns, bool) or not shapes:
        return []
    parts = [name.split(".")[:-1] for name in shapes]
    modules = dict.fromkeys(".".join(part[:i]) for part in parts for i in range(1, len(part) + 1))
    problems = []
    for pattern in patterns:
        try:
            select(modules, pattern, "encoder.checkpoint")
        except InputError as error:
            problems.append(str(error))
    return problems


def class_problems(tasks: Mapping[str, Task]) -> list[str]:
    """List the tasks whose class names are not as many as the classes of their data set."""
    problems = []
    for name, task in tasks.items():
        key = next((key for key in ("evaluate", "dataset", "adapt") if getattr(task, key) is not None), "dataset")
        found = getattr(getattr(task, key), "classes", None)
        if found is not None and task.classes is not None and len(found) != len(task.classes):
            problems.append(
                f"data.tasks.{name}.classes: expected as many names as {key} has classes, found "
                f"{len(task.classes)} names, but the data set has {len(found)} classes. "
                "Name each class once, in the order of the labels; are all class folders there?"
            )
    return problems


def expert_problems(tasks: Mapping[str, Task], experts: Sequence[str], need: str | None) -> list[str]:
    """List the tasks whose expert is not in the pool.

    Args:
        tasks: Task name to its data.
        experts: The pool's.
        need: What needs an expert of every task; None where only one that a task names must exist.
    """
    problems = []
    for name, task in tasks.items():
        expert = task.expert or name
        if expert not in experts and (task.expert or need):
            because = f" {need} needs each task's expert." if need else ""
            problems.append(
                f"data.tasks.{name}.expert: expected one of the pool's experts {shorten(experts)}, found {expert!r}."
                f"{because}{did_you_mean(expert, experts)} Name it: data.tasks.{name}.expert=NAME."
            )
    return problems


def evaluation_problems(tasks: Mapping[str, Task], scored: Mapping[str, object]) -> list[str]:
    """List the tasks that have nothing to be scored on."""
    return [
        f"data.tasks.{name}.evaluate: expected labelled images to score, found none. "
        f"Give data.tasks.{name}.evaluate, or set evaluate=false."
        for name in tasks
        if name not in scored
    ]
