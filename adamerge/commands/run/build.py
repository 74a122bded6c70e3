"""Find what is wrong with a run before it starts, from configurations and file headers alone."""

import importlib.resources
import inspect
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import hydra
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from adamerge import zoo
from adamerge.backbones import Backbone, Torchvision, own_base
from adamerge.commands.run import CONFIG_MODULE
from adamerge.commands.run.checks import (
    SETTINGS,
    check_accelerator,
    check_devices,
    check_folder,
    check_groups,
    check_init,
    check_package,
    check_setting,
    check_start,
    checkpoint_problems,
    class_problems,
    evaluation_problems,
    expert_problems,
    forecast_problems,
    hash_problems,
    packed_problems,
    sharding_problems,
)
from adamerge.commands.run.imports import check_targets
from adamerge.commands.run.stages import first_stage, start_file
from adamerge.errors import InputError, did_you_mean
from adamerge.methods import ShardedStrategy
from adamerge.model.refinement import Refinement
from adamerge.objectives import check_objective
from adamerge.pool.headers import Headers, read_headers
from adamerge.pool.task_vectors import check_storage, dtype_of
from adamerge.transforms import check_transform

log = logging.getLogger(__name__)

CONFIG_NAME = "adapt"
_ZOO = "backbone=zoo (the demo zoo's model, meant where no backbone is named)"  # whose folder nobody has named
_POOL_KEYS = (
    *("file", "base", "experts", "storage", "dtype", "task_vectors", "include", "exclude", "duplicates"),
    *("licences", "sha256"),
)


class _Problems(list[str]):
    """What was found, in order."""

    @contextmanager
    def naming(self, node: str) -> Iterator[None]:
        """Collect what goes wrong; an error that nobody expected is named after its node."""
        try:
            yield
        except (InputError, OSError) as error:
            self.append(" ".join(str(error).split()))
        except OmegaConfBaseException as error:
            self.append(f"{node}: {str(error).splitlines()[0]}")
        except Exception as error:
            log.debug("%s", node, exc_info=True)
            self.append(f"{node}: {type(error).__name__}: {' '.join(str(error).split())}")


def check(config: DictConfig) -> list[str]:
    """Return everything that is wrong with a configuration, from configs and headers, before any weight is read."""
    problems, parts = _Problems(), dict[str, Any]()
    with problems.naming("configuration"):
        check_targets(containers(config))
    if problems:
        return problems  # before anything is imported
    with problems.naming("configuration"):
        problems += unknown_keys(config)
    for option in SETTINGS:
        with problems.naming(option):
            check_setting(option, config.get(option))
    with problems.naming("run_dir"):
        parts["run_dir"] = check_folder("run_dir", config.get("run_dir"))
    if config.get("teacher_cache") is not None:
        with problems.naming("teacher_cache"):
            check_folder("teacher_cache", config.teacher_cache)
    _check_parts(config, parts, problems)
    with problems.naming("encoder"):
        parts["encoder"] = build_optional(config, "encoder")
    with problems.naming("batch_norm"):
        build_optional(config, "batch_norm")
    with problems.naming("backbone"):
        parts["backbone"] = build(config, "backbone")
    with problems.naming("trainer"):
        _check_signature(config, "trainer")
        _check_trainer(config)
        problems += sharding_problems(containers(config)) if is_sharded(config) else []
    if "backbone" in parts:
        with problems.naming("pool"):
            parts["headers"] = _check_pool(config, parts["backbone"], problems)
            problems += forecast_problems(parts["headers"].shapes, parts.get("run_dir"))
            problems += checkpoint_problems(parts["headers"].shapes, parts.get("encoder"))
        with problems.naming("data"):
            parts["data"] = _build_data(config, parts["backbone"], problems)
    _check_start(config, parts, problems)
    with problems.naming("first_stage"):
        _check_first_stage(config, parts, problems)
    with problems.naming("data"):
        _check_tasks(config, parts, problems)
    return problems


def containers(config: DictConfig) -> Any:
    """Return a configuration as plain containers, interpolations resolved where all of them can be."""
    try:
        return OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException:
        return OmegaConf.to_container(config, resolve=False)


def _check_parts(config: DictConfig, parts: dict[str, Any], problems: _Problems) -> None:
    """Build, or look at, what each stage of a run has of its own."""
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
    extras: list[str] = []
    with problems.naming("logger, callbacks"):
        extras = [f"{group}.{name}" for group in ("logger", "callbacks") for name in config.get(group) or {}]
    for node in ("method", *extras):
        with problems.naming(node):
            _check_signature(config, node)
            check_package(node, str(OmegaConf.select(config, f"{node}._target_")))


def _check_first_stage(config: DictConfig, parts: dict[str, Any], problems: _Problems) -> None:
    """Hold the first stage to what the run is held to; what both have wrong is said once."""
    stage = first_stage(config)
    if stage is None:
        return
    found, own = _Problems(), dict(parts)
    for option in ("steps", "checkpoint_every"):
        with found.naming(option):
            check_setting(option, stage.get(option))
    _check_parts(stage, own, found)
    _check_start(stage, own, found)
    problems += [f"first_stage: {problem}" for problem in found if problem not in problems]
    parts["objectives"] = [own.get("objective")]


def build(config: DictConfig, node: str, **objects: Any) -> Any:
    """Instantiate one node of the configuration; what goes wrong is said with the node's name.

    Args:
        config: The whole configuration.
        node: Which, dotted for nested ones.
        objects: Arguments that are not in the configuration.

    Raises:
        InputError: If the target does not exist, an option is unknown, or the target refuses it.
    """
    _check_signature(config, node)
    content = OmegaConf.select(config, node)
    try:
        return hydra.utils.instantiate(content, _convert_="object", **objects)
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, InputError):
            raise cause from error
        where = re.search(r"full_key: (\S+)", str(error))
        kind = "" if isinstance(cause, OSError) else f"{type(cause).__name__}: "
        said = f"{cause.filename}: {cause.strerror}" if isinstance(cause, OSError) and cause.filename else cause
        raise InputError(f"{where.group(1) if where else node}: {kind}{str(said).rstrip('.')}.") from error
    except OmegaConfBaseException as error:
        raise InputError(f"{node}: {str(error).splitlines()[0]}") from error
    except Exception as error:
        raise InputError(f"{node}: {type(error).__name__}: {error}") from error


def build_optional(config: DictConfig, node: str) -> Any:
    """Instantiate a node that may be absent: None where its ``_target_`` is null."""
    content = config.get(node)
    return None if content is None or content.get("_target_") is None else build(config, node)


def build_init(config: DictConfig) -> Any:
    """Return the initial coefficients: plain values, or the rule that ``init._target_`` names."""
    plain: Any = OmegaConf.to_container(OmegaConf.masked_copy(config, ["init"]), resolve=True)
    init = plain.get("init")
    return build(config, "init") if isinstance(init, dict) and "_target_" in init else init


def _try_optimizer(config: DictConfig) -> None:
    """Make the optimizer for a dummy parameter, as it refuses its options only when it is made."""
    make = build(config, "optimizer")
    try:
        make([torch.nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"optimizer: {error}.") from error


def unknown_keys(config: DictConfig) -> list[str]:
    """Return keys that nothing reads: a mistyped one in an experiment file composes in silence."""
    known = set(_default_keys())
    problems = [
        f"Unknown option {key!r}.{did_you_mean(key, known)} Known: {', '.join(sorted(known))}."
        for key in map(str, config)
        if key not in known
    ]
    pool = config.get("pool")
    return problems + [
        f"pool: unknown option {key!r}.{did_you_mean(key, _POOL_KEYS)}"
        for key in map(str, pool if isinstance(pool, DictConfig) else ())
        if key not in _POOL_KEYS
    ]


def _default_keys() -> Sequence[str]:
    text = (importlib.resources.files(CONFIG_MODULE) / f"{CONFIG_NAME}.yaml").read_text(encoding="utf-8")
    content = OmegaConf.create(text)
    assert isinstance(content, DictConfig)
    groups = [str(next(iter(item))) for item in content.defaults if not isinstance(item, str)]
    names = [str(key) for key in content if key not in ("defaults", "hydra")]
    return [*names, *(group.split()[-1] for group in groups if "hydra" not in group)]


def _check_pool(config: DictConfig, backbone: Backbone, problems: list[str]) -> Headers:
    """Compare the headers of the pool's files."""
    node = config.get("pool")
    tag = getattr(backbone, "pretrained", None)
    base, experts = pool_files(node, "pool", needs_base=tag is None)
    found = base if base is not None else own_base(backbone, download=False)
    if found is None:
        log.info("backbone.pretrained=%s: its weights are not in the cache; the run downloads them first.", tag)
    check_storage(str(node.get("storage") or "auto"))
    try:
        dtype_of(node.get("dtype"))
    except InputError as error:
        problems.append(str(error))
    if node.get("duplicates") not in (None, "refuse", "allow"):
        problems.append(f"pool.duplicates: expected refuse or allow, found {node.duplicates!r}.")
    exclude = [*backbone.exclude, *(strings(node.get("exclude")) or [])]
    headers = read_headers(found, experts, backbone.prefix, strings(node.get("include")), exclude)
    problems += headers.problems
    other: list[str] = []
    if headers.source is not None and (find := getattr(backbone, "base_problems", None)) is not None:
        other += find(headers.source)
    if (find := getattr(backbone, "problems", None)) is not None:
        other += find({**({} if headers.source is None else {"base": headers.source}), **headers.experts})
    problems += [problem.replace(f"backbone.model={zoo.files()}", _ZOO) for problem in other]
    problems += hash_problems(node.get("sha256"), experts)
    if node.get("task_vectors") is not None:
        problems += packed_problems(node.task_vectors, headers)
    return headers


def pool_files(node: Any, where: str, *, needs_base: bool = True) -> tuple[str | None, dict[str, str]]:
    """Return the base's file and the experts' by name, of a pool's node that messages call ``where``.

    Without a base, where none is needed, None stands in for its file.

    Raises:
        InputError: If it names no base, no experts, or something else than files.
    """
    if not isinstance(node, DictConfig):
        raise InputError(f"{where}: expected base and experts, found {node!r}; such as pool=zoo.")
    for key, example in (("base", "base=FILE"), ("experts", "experts={name: FILE, ...}")):
        if node.get(key) is None and (key != "base" or needs_base):
            raise InputError(f"{where}.{key}: must be given: {example}.")
    if not isinstance(node.experts, DictConfig):
        raise InputError(
            f"{where}.experts: expected a mapping of names to files, {{name: FILE, ...}}, found {node.experts}."
        )
    if not node.experts:
        raise InputError(f"{where}.experts: expected at least one expert, {{name: FILE, ...}}, found none.")
    files: dict[Any, Any] = {name: node.experts.get(name) for name in node.experts}
    base = node.get("base")
    for key, found in (("base", base), *((f"experts.{name}", path) for name, path in files.items())):
        if (not isinstance(found, str) or not found) and (key != "base" or base is not None):
            raise InputError(f"{where}.{key}: expected a checkpoint file, found {found!r}; name one or leave it out.")
    for name in files:
        if not isinstance(name, str):
            raise InputError(f"{where}.experts: expected names that are texts, found {name!r}; write '{name}'.")
    return base, {str(name): str(path) for name, path in files.items()}


def _build_data(config: DictConfig, backbone: Backbone, problems: _Problems) -> Any:
    """Build the data; where that fails, look at each task alone, so that all that is missing is said at once."""
    _refuse_unknown_tasks(config)
    try:
        return build(config, "data", preprocess=backbone.preprocess())
    except InputError:
        found, tasks = len(problems), OmegaConf.select(config, "data.tasks", throw_on_missing=False)
        for name in map(str, tasks if isinstance(tasks, DictConfig) and "_target_" not in tasks else ()):
            with problems.naming(f"data.tasks.{name}"):
                build(config, f"data.tasks.{name}")
        problems[:] = dict.fromkeys(problems)  # a folder that is not there is the same problem for all
        if len(problems) > found:
            return None
        raise


def _refuse_unknown_tasks(config: DictConfig) -> None:
    """Refuse fields of a task that the data does not have."""
    tasks = OmegaConf.select(config, "data.tasks", throw_on_missing=False)
    nodes = {str(name): tasks[name] for name in tasks} if isinstance(tasks, DictConfig) else {}
    if "_target_" in nodes:
        _check_signature(config, "data.tasks")
        return
    known = [name for name, node in nodes.items() if isinstance(node, DictConfig) and "_target_" in node]
    for name, node in nodes.items():
        if known and name not in known:  # else the data is a class of the user's own, which knows what its tasks are
            raise InputError(
                f"data.tasks.{name}: expected a node with _target_, such as adamerge.data.Task, found {node}."
                f"{did_you_mean(name, known)}"
            )


def _check_trainer(config: DictConfig) -> None:
    """Refuse what a run does not do with a trainer."""
    trainer = config.get("trainer")
    if isinstance(trainer, DictConfig):
        read = ["devices", "num_nodes", "accelerator"]
        plain: Any = OmegaConf.to_container(OmegaConf.masked_copy(trainer, read), resolve=True)
        check_accelerator(plain.get("accelerator"))
        check_devices(plain.get("devices", 1), plain.get("num_nodes", 1))


def is_sharded(config: DictConfig) -> bool:
    """Whether each device of a run holds a part of the model, as the trainer's strategy says (``trainer=fsdp``)."""
    trainer = config.get("trainer")
    strategy = trainer.get("strategy") if isinstance(trainer, DictConfig) else None
    if not isinstance(strategy, DictConfig) or "_target_" not in strategy:
        return False
    found = hydra.utils.get_object(str(strategy._target_))
    return isinstance(found, type) and issubclass(found, ShardedStrategy)


def _check_tasks(config: DictConfig, parts: Mapping[str, Any], problems: list[str]) -> None:
    """Hold the tasks against the pool and what the run does with them."""
    tasks = getattr(parts.get("data"), "tasks", None)
    if not isinstance(tasks, Mapping):
        return
    problems += class_problems(tasks)
    unseen = getattr(parts["data"], "unseen", ())
    if unseen and isinstance(parts["backbone"], Torchvision):
        problems.append(
            f"data.unseen: {unseen[0]} would need a head, but a torchvision backbone's heads are the experts' own "
            "classifiers. Leave data.unseen out, or merge models whose heads come from class names: backbone=open_clip."
        )
    tasks = {name: task for name, task in tasks.items() if name not in unseen}
    if config.get("evaluate") is True:
        problems += evaluation_problems(tasks, getattr(parts["data"], "evaluation", tasks))
    need = None
    if isinstance(parts["backbone"], Torchvision):
        need = "A torchvision backbone, whose heads are the experts' own classifiers,"
    for objective in (parts.get("objective"), *parts.get("objectives", [])):
        if need is None and getattr(objective, "uses_teacher", False):
            need = f"The objective {type(objective).__name__}"
    if isinstance(config.get("pool"), DictConfig) and "headers" in parts:
        problems += expert_problems(tasks, list(config.pool.experts), need)


def _check_start(config: DictConfig, parts: Mapping[str, Any], problems: _Problems) -> None:
    """Form groups and initial coefficients from the shapes in the pool's headers."""
    headers, granularity = parts.get("headers"), parts.get("granularity")
    if headers is None or granularity is None or not headers.shapes:
        return
    start, found = start_file(config), len(problems)
    if start is not None and config.get("first_stage") is None:
        with problems.naming("init"):
            check_start(start)
        return
    if start is not None and isinstance(granularity, Refinement):
        return  # its groups follow from what the first stage will learn
    with problems.naming("granularity"):
        check_groups(granularity, headers.shapes)
    if len(problems) > found or "constraint" not in parts or len(headers.experts) < len(config.pool.experts):
        return
    with problems.naming("init"):
        check_init(headers, granularity, build_init(config), parts["constraint"])


def _check_signature(config: DictConfig, node: str) -> None:
    """Check that a node's target exists and takes the node's options, without calling it."""
    content = OmegaConf.select(config, node)
    if not isinstance(content, DictConfig) or "_target_" not in content:
        raise InputError(
            f"{node}: expected a node with _target_ (an import path), found none. A yaml file of your own names its "
            "class, or starts with one of the group's files: defaults: [folders]."
        )
    target = str(content._target_)
    try:
        found: Callable[..., Any] = hydra.utils.get_object(target)
    except Exception as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise InputError(
            f"{node}._target_: cannot import {target!r} ({reason}). Expected an import path such as "
            "my_package.MyClass; is the package installed, or its folder on PYTHONPATH?"
        ) from error
    check_options(node, found, content)


def check_options(where: str, target: Callable[..., Any], content: DictConfig) -> None:
    """Check that a class or function takes the options of its node, and that none is still ``???``.

    Raises:
        InputError: If not; with the nearest option that it takes.
    """
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}._target_: {content._target_} is nothing that can be called ({error}).") from error
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for key in map(str, content):
        if not key.startswith("_") and key not in parameters and not open_ended:
            takes = f"It takes: {', '.join(parameters)}" if parameters else "It takes none"
            near = did_you_mean(key, parameters)
            hint = " If the option is left over from the group's default, give your class a yaml file of its own."
            raise InputError(
                f"{where}.{key}: {content._target_} takes no such option.{near} {takes}."
                f"{'' if near or where == 'merge' else hint}"
            )
        if OmegaConf.is_missing(content, key):
            raise InputError(f"{where}.{key}: must be given: {where}.{key}=VALUE.")


def strings(node: Any) -> list[str] | None:
    """Return a list node as strings; None stays None.

    Raises:
        InputError: If it is something else than a list.
    """
    if isinstance(node, str) or not (node is None or isinstance(node, Iterable)):
        raise InputError(f"pool.include, pool.exclude: expected a list of globs, found {node!r}; write ['GLOB'].")
    return None if node is None else [str(item) for item in node]
