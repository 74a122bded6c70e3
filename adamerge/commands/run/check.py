"""Check a run before it starts, from its configuration and the headers of its files; no weight is read."""

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from adamerge.commands.run.build import build, build_optional, check_node, containers
from adamerge.commands.run.check_files import (
    Problems,
    build_data,
    check_pool,
    check_start,
    check_tasks,
    checkpoint_problems,
    forecast_problems,
)
from adamerge.commands.run.imports import check_targets
from adamerge.commands.run.processes import is_sharded
from adamerge.commands.run.shipped import CONFIG_NAME, shipped_folder
from adamerge.commands.run.stages import first_stage
from adamerge.errors import InputError, did_you_mean, shorten
from adamerge.objectives import check_objective
from adamerge.system.files import ensure_writable
from adamerge.transforms import check_transform

RESERVED = ("pretrained", "experts", "task_arithmetic_0.3", "weight_average", "start")
_LIMITS = {"steps": (1, None, 150), "checkpoint_every": (1, None, 25), "seed": (0, 2**32 - 1, 0)}
_SWITCHES = ("evaluate", "references")
_SETTINGS = (*_LIMITS, *_SWITCHES, "name")
_LOGGERS = {"TensorBoardLogger": "tensorboard", "WandbLogger": "wandb", "MLFlowLogger": "mlflow"}  # to their packages
_POOL_KEYS = (
    *("file", "base", "experts", "storage", "dtype", "task_vectors", "include", "exclude", "duplicates"),
    *("unplaced", "licences", "sha256"),
)


def check(config: DictConfig) -> list[str]:
    """Return everything that is wrong with a configuration."""
    problems, parts = Problems(), dict[str, Any]()
    with problems.naming("configuration"):
        check_targets(containers(config))
    if problems:
        return problems  # before anything is imported
    with problems.naming("configuration"):
        problems += unknown_keys(config)
    _check_settings(config, _SETTINGS, problems)
    with problems.naming("run_dir"):
        parts["run_dir"] = check_folder("run_dir", config.get("run_dir"))
    if config.get("teacher_cache") is not None:
        with problems.naming("teacher_cache"):
            check_folder("teacher_cache", config.teacher_cache)
    _build_stage(config, parts, problems)
    with problems.naming("encoder"):
        parts["encoder"] = build_optional(config, "encoder")
    with problems.naming("batch_norm"):
        build_optional(config, "batch_norm")
    with problems.naming("backbone"):
        parts["backbone"] = build(config, "backbone")
    with problems.naming("trainer"):
        check_node(config, "trainer")
        _check_trainer(config)
        problems += _sharding_problems(containers(config)) if is_sharded(config) else []
    if "backbone" in parts:
        with problems.naming("pool"):
            parts["headers"] = check_pool(config, parts["backbone"], problems)
            problems += forecast_problems(parts["headers"].shapes, parts.get("run_dir"))
            problems += checkpoint_problems(parts["headers"].shapes, parts.get("encoder"))
        with problems.naming("data"):
            parts["data"] = build_data(config, parts["backbone"], problems)
    check_start(config, parts, problems)
    with problems.naming("first_stage"):
        _check_first_stage(config, parts, problems)
    with problems.naming("data"):
        check_tasks(config, parts, problems)
    return problems


def unknown_keys(config: DictConfig) -> list[str]:
    """Return keys that nothing reads: a mistyped one in an experiment file composes in silence."""
    default: Any = OmegaConf.load(shipped_folder("") / f"{CONFIG_NAME}.yaml")
    groups = [str(next(iter(item))).split()[-1] for item in default["defaults"] if not isinstance(item, str)]
    options = [key for key in (*map(str, default), *groups) if key != "defaults" and not key.startswith("hydra")]
    problems = [
        f"Unknown option {key!r}.{did_you_mean(key, options)} Known: {', '.join(sorted(options))}."
        for key in map(str, config)
        if key not in options
    ]
    pool = config.get("pool")
    return problems + [
        f"pool: unknown option {key!r}.{did_you_mean(key, _POOL_KEYS)}"
        for key in map(str, pool if isinstance(pool, DictConfig) else ())
        if key not in _POOL_KEYS
    ]


def _check_first_stage(config: DictConfig, parts: dict[str, Any], problems: Problems) -> None:
    """Hold the first stage to what the run is held to; what both have wrong is said once."""
    stage = first_stage(config)
    if stage is None:
        return
    of_stage, stage_parts = Problems(), dict(parts)
    _check_settings(stage, ("steps", "checkpoint_every"), of_stage)
    _build_stage(stage, stage_parts, of_stage)
    check_start(stage, stage_parts, of_stage)
    problems += [f"first_stage: {problem}" for problem in of_stage if problem not in problems]
    parts["objectives"] = [stage_parts.get("objective")]


def _check_settings(config: DictConfig, options: Iterable[str], problems: Problems) -> None:
    """Check what is a number, a switch or a text of the run itself."""
    for option in options:
        with problems.naming(option):
            value = config.get(option)
            if option in _LIMITS:
                _check_number(option, value)
            elif option in _SWITCHES and not isinstance(value, bool):
                problems.append(f"{option}: expected true or false, found {value!r}.")
            elif option == "name" and (not isinstance(value, (str, int)) or not str(value)):
                problems.append(f"name: expected a text, found {value!r}; such as name=adapt.")
            elif option == "name" and value in RESERVED:
                rows = shorten(RESERVED)
                problems.append(f"name: {value!r} is reserved for a row of the results, as are {rows}; choose another.")


def _check_number(option: str, value: Any) -> None:
    low, high, example = _LIMITS[option]
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        limits = f">= {low}" if high is None else f"from {low} to {high}"
        raise InputError(f"{option}: expected a whole number {limits}, found {value!r}; such as {option}={example}.")


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


def _build_stage(config: DictConfig, parts: dict[str, Any], problems: Problems) -> None:
    """Build what is ours of a stage of the run, and look at the rest."""
    for node in ("objective", "granularity", "constraint"):
        with problems.naming(node):
            parts[node] = build(config, node)
    with problems.naming("objective"):
        if "objective" in parts:
            check_objective(parts["objective"])
    with problems.naming("transform"):
        transform = build_optional(config, "transform")
        if transform is not None:
            check_transform(transform)
    with problems.naming("optimizer"):
        _try_optimizer(config)
    nodes = ["method"]
    with problems.naming("logger, callbacks"):
        nodes += [f"{group}.{name}" for group in ("logger", "callbacks") for name in config.get(group) or {}]
    for node in nodes:
        with problems.naming(node):
            check_node(config, node)
            check_package(node, str(OmegaConf.select(config, f"{node}._target_")))
    with problems.naming("method"):
        _check_iterations(config)


def _check_iterations(config: DictConfig) -> None:
    """Refuse steps that end within an iteration of soft Frank-Wolfe."""
    steps, inner = config.get("steps"), config.method.get("inner_steps")
    is_counted = isinstance(steps, int) and isinstance(inner, int) and inner > 0
    if is_counted and config.method.get("mode") == "soft" and steps % inner:
        raise InputError(
            f"steps: expected a multiple of method.inner_steps ({inner}), the steps of one iteration, found {steps}: "
            f"{steps // inner} iterations and a part of one; such as steps={-(-steps // inner) * inner}."
        )


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


def _check_trainer(config: DictConfig) -> None:
    """Refuse devices that are none, or that are not there, before a weight is read."""
    node = OmegaConf.masked_copy(config.trainer, ["devices", "num_nodes", "accelerator"])
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
    if not _is_whole(num_nodes, 1):
        raise InputError(
            f"trainer.num_nodes: expected a number >= 1, found {num_nodes!r}; such as trainer.num_nodes=1."
        )


def _is_whole(value: Any, least: int) -> bool:
    text = str(value)
    return not isinstance(value, bool) and text.isdigit() and int(text) >= least


def _sharding_problems(config: Mapping[str, Any]) -> list[str]:
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
        f"{option}: not with trainer=fsdp, found {value}: {remedy}."
        for option, (is_refused, value, remedy) in refused.items()
        if is_refused
    ]
