"""Build a part of a run: one node of the configuration, one object."""

import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from adamerge.backbones import Backbone, collate_of
from adamerge.commands.run.imports import check_targets
from adamerge.errors import InputError, did_you_mean
from adamerge.pool.pool_file import PoolFiles, pool_files

_NOT_OF_FILES = ("file", "licences")  # options of a run's pool that say nothing of how it is opened


def build(config: DictConfig, node: str, **objects: Any) -> Any:
    """Instantiate one node of the configuration; what goes wrong is said with the node's name.

    Args:
        config: The whole configuration.
        node: Which, dotted for nested ones.
        objects: Arguments that are not in the configuration.

    Raises:
        InputError: If the target does not exist, an option is unknown, or the target refuses it.
    """
    check_node(config, node)
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


def build_tasks(config: DictConfig, backbone: Backbone, preprocess: Callable[[Any], Any] | None) -> Any:
    """Build the data for a backbone; a class without the argument ``collate`` makes batches by itself.

    Args:
        config: The whole configuration.
        backbone: Whose batches they are.
        preprocess: Its preprocessing.

    Raises:
        InputError: If the backbone pads its inputs, and the class cannot be told how.
    """
    check_node(config, "data")
    parameters = inspect.signature(hydra.utils.get_object(str(config.data._target_))).parameters
    if "collate" in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return build(config, "data", preprocess=preprocess, collate=collate_of(backbone))
    if hasattr(backbone, "collate"):
        raise InputError(
            f"data._target_: {config.data._target_} takes no argument 'collate', by which the backbone "
            f"{type(backbone).__name__} pads the inputs of a batch. Add it, and hand it to your loaders as collate_fn."
        )
    return build(config, "data", preprocess=preprocess)


def build_optional(config: DictConfig, node: str) -> Any:
    """Instantiate a node that may be absent: None where its ``_target_`` is null."""
    content = config.get(node)
    is_absent = content is None or (isinstance(content, DictConfig) and content.get("_target_") is None)
    return None if is_absent else build(config, node)


def build_init(config: DictConfig) -> Any:
    """Return the initial coefficients: plain values, or the rule that ``init._target_`` names."""
    plain: Any = OmegaConf.to_container(OmegaConf.masked_copy(config, ["init"]), resolve=True)
    init = plain.get("init")
    return build(config, "init") if isinstance(init, dict) and "_target_" in init else init


def containers(config: DictConfig) -> Any:
    """Return a configuration as plain containers, interpolations resolved where all of them can be."""
    try:
        return OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException:
        return OmegaConf.to_container(config, resolve=False)


def pool_of(config: DictConfig, backbone: Backbone, base: Path | None) -> PoolFiles:
    """Read the pool of a configuration for a backbone; no file is opened.

    Args:
        config: The whole configuration.
        backbone: Whose prefix the files' keys have, and some of whose parameters never merge.
        base: What stands in where the pool names none.

    Raises:
        InputError: If it names no base, no experts, or something else than files.
    """
    node = config.get("pool")
    if not isinstance(node, DictConfig):
        raise InputError(f"pool: expected base and experts, found {node!r}; such as pool=zoo.")
    plain: Any = OmegaConf.to_container(node, resolve=True)
    content = {key: value for key, value in plain.items() if value not in (None, "???") and key not in _NOT_OF_FILES}
    if "key_prefix" in content:
        raise InputError("pool.key_prefix: the backbone says it; leave it out, or set backbone.prefix.")
    if "base" not in content and base is not None:
        content["base"] = str(base)
    for name in content.get("experts") or ():
        if not isinstance(name, str):
            raise InputError(f"pool.experts: expected names that are texts, found {name!r}; write '{name}'.")
    files = pool_files(content, "pool.", Path())
    names, shared = getattr(backbone, "names", None), {}
    for option in ("tied", "extended"):
        if value := getattr(backbone, option, None):
            shared[option] = value
    return replace(files.with_options((), backbone.exclude, **shared), key_prefix=backbone.prefix or names)


def check_node(config: DictConfig, node: str) -> None:
    """Check that a node's target exists and takes the node's options, without calling it.

    Raises:
        InputError: If not.
    """
    content = OmegaConf.select(config, node)
    if not isinstance(content, DictConfig) or "_target_" not in content:
        given = "none" if content is None or isinstance(content, DictConfig) else repr(content)
        raise InputError(
            f"{node}: expected a node with _target_ (an import path), found {given}. Set its options one by one, "
            f"{node}.OPTION=VALUE; a yaml file of your own names its class, or starts with one of the group's files: "
            "defaults: [folders]."
        )
    check_targets({node: containers(content)})
    path = str(content._target_)
    try:
        target: Callable[..., Any] = hydra.utils.get_object(path)
    except Exception as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise InputError(
            f"{node}._target_: cannot import {path!r} ({reason}). Expected an import path such as "
            "my_package.MyClass; is the package installed, or its folder on PYTHONPATH?"
        ) from error
    check_options(node, target, content)


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
