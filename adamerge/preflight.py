"""Find what is wrong with a run before it starts, from configurations and file headers alone."""

import importlib.resources
import inspect
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from adamerge.backbones import Backbone
from adamerge.checkpoints import Checkpoint, open_checkpoint
from adamerge.errors import InputError, did_you_mean
from adamerge.files import ensure_writable
from adamerge.layout import KeyMap, check_layout, check_names
from adamerge.objectives import check_objective
from adamerge.task_vectors import check_storage, free_memory

log = logging.getLogger(__name__)

CONFIG_MODULE = "adamerge.configs"
CONFIG_NAME = "adapt"
_POOL_KEYS = ("base", "experts", "storage", "dtype", "include", "exclude")


def check(config: DictConfig) -> list[str]:
    """Return everything that is wrong with a configuration, from configs and headers, before any weight is read."""
    problems: list[str] = []

    @contextmanager
    def collecting() -> Iterator[None]:
        try:
            yield
        except (InputError, OSError) as error:
            problems.append(str(error))

    problems += unknown_keys(config)
    with collecting():
        check_objective(build(config, "objective"))
    for node in ("granularity", "constraint"):
        with collecting():
            build(config, node)
    with collecting():
        build_optional(config, "transform")
    with collecting():
        _try_optimizer(config)
    extras = [f"{group}.{name}" for group in ("logger", "callbacks") for name in config.get(group) or {}]
    for node in ("method", "trainer", *extras):
        with collecting():
            _check_signature(config, node)
    backbone: Backbone | None = None
    with collecting():
        backbone = build(config, "backbone")
    if backbone is not None:
        with collecting():
            problems += _check_pool(config, backbone)
        with collecting():
            build(config, "data", preprocess=backbone.preprocess())
    with collecting():
        if not Path(str(config.run_dir)).exists():
            ensure_parent_writable(Path(str(config.run_dir)))
    return problems


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
    log.debug("%s: imports %s", node, content._target_)
    try:
        return hydra.utils.instantiate(content, _convert_="object", **objects)
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, InputError):
            raise cause from error
        where = re.search(r"full_key: (\S+)", str(error))
        kind = "" if isinstance(cause, OSError) else f"{type(cause).__name__}: "
        raise InputError(f"{where.group(1) if where else node}: {kind}{cause}") from error
    except OmegaConfBaseException as error:
        raise InputError(f"{node}: {str(error).splitlines()[0]}") from error


def build_optional(config: DictConfig, node: str) -> Any:
    """Instantiate a node that may be absent: None where its ``_target_`` is null."""
    content = config.get(node)
    return None if content is None or content.get("_target_") is None else build(config, node)


def ensure_parent_writable(folder: Path) -> None:
    """Check that a folder that does not exist yet could be made, without making it."""
    parent = next((p for p in folder.absolute().parents if p.exists()), Path("/"))
    if not parent.is_dir():
        raise InputError(f"Output folder {folder}: {parent} is a file. Choose another run_dir.")
    ensure_writable(parent)


def _try_optimizer(config: DictConfig) -> None:
    """Make the optimizer for a dummy parameter, as it refuses its options only when it is made."""
    try:
        build(config, "optimizer")([torch.nn.Parameter(torch.zeros(1))])
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
    return problems + [
        f"pool: unknown option {key!r}.{did_you_mean(key, _POOL_KEYS)}"
        for key in map(str, config.pool)
        if key not in _POOL_KEYS
    ]


def _default_keys() -> Sequence[str]:
    text = (importlib.resources.files(CONFIG_MODULE) / f"{CONFIG_NAME}.yaml").read_text(encoding="utf-8")
    content = OmegaConf.create(text)
    assert isinstance(content, DictConfig)
    groups = [str(next(iter(item))) for item in content.defaults if not isinstance(item, str)]
    names = [str(key) for key in content if key not in ("defaults", "hydra")]
    return [*names, *(group.split()[-1] for group in groups if "hydra" not in group)]


def _check_pool(config: DictConfig, backbone: Backbone) -> list[str]:
    """Compare the headers of the pool's files, and forecast memory and disk."""
    node = config.pool
    for key, example in (("base", "pool.base=FILE"), ("experts", "'pool.experts={name: FILE, ...}'")):
        if OmegaConf.is_missing(node, key):
            raise InputError(f"pool.{key}: must be given: {example}.")
    experts = dict(node.experts)
    check_names(experts)
    problems, opened = [], {}
    base: Checkpoint | None = None
    for name, path in {"base": node.base, **experts}.items():
        try:
            opened[name] = open_checkpoint(path)
        except (InputError, OSError) as error:
            problems.append(str(error))
    base = opened.pop("base", None)
    if base is None:
        return problems
    exclude = [*backbone.exclude, *(strings(node.get("exclude")) or [])]
    check_storage(str(node.get("storage") or "auto"))
    keys = KeyMap(base.keys, backbone.prefix)
    layout = check_layout(base, opened, keys, strings(node.get("include")), exclude, {})
    problems += layout.problems
    model_bytes = 4 * sum(torch.Size(base.spec(keys.file_key(name))[0]).numel() for name in layout.merged)
    if 3 * model_bytes > free_memory():
        problems.append(
            f"Memory: merging needs about {3 * model_bytes / 1e9:.1f} GB (base, merged weights and their gradients) "
            f"besides activations; {free_memory() / 1e9:.1f} GB are free. Close other programs or use a larger machine."
        )
    parent = next(p for p in Path(str(config.run_dir)).absolute().parents if p.exists())
    if shutil.disk_usage(parent).free < 2 * model_bytes:
        problems.append(
            f"Disk: {parent} has less than the {2 * model_bytes / 1e9:.1f} GB free that an export may need."
        )
    return problems


def _check_signature(config: DictConfig, node: str) -> None:
    """Check that a node's target exists and takes the node's options, without calling it."""
    content = OmegaConf.select(config, node)
    if not isinstance(content, DictConfig) or "_target_" not in content:
        raise InputError(f"{node}: expected a node with _target_ (an import path), found {content!r}.")
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
    parameters = inspect.signature(target).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for key in map(str, content):
        if not key.startswith("_") and key not in parameters and not open_ended:
            raise InputError(
                f"{where}.{key}: {content._target_} takes no such option.{did_you_mean(key, parameters)} "
                f"It takes: {', '.join(parameters)}."
            )
        if OmegaConf.is_missing(content, key):
            raise InputError(f"{where}.{key}: must be given: {where}.{key}=VALUE.")


def strings(node: Any) -> list[str] | None:
    """Return a list node as strings; None stays None."""
    return None if node is None else [str(item) for item in node]
