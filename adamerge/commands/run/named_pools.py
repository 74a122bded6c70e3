"""Pools by name: those that ship, and pool files in folders of the user's."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from adamerge.commands.run.imports import announce, check_listed
from adamerge.commands.run.shipped import rule_names, rule_node, shipped_folder
from adamerge.errors import InputError, did_you_mean
from adamerge.pool.pool_file import PoolFile, PoolFiles, load_pool_file, named_files, place, pool_files
from adamerge.results.recipes import read_recipe
from adamerge.zoo import benchmark_folder, files, llm_zoo_folder, text_zoo_folder

FOLDERS = "ADAMERGE_POOLS"
_DEFAULT_FOLDER = "pools"
_SHIPPED_PREFIX = "visual."  # all that ship are CLIPs
_CHOICE = "pool/{}.yaml"  # below a folder for --config-dir
_BUILT = (
    ("offline_benchmark", benchmark_folder, "half an hour"),
    ("text_zoo", text_zoo_folder, "ten minutes"),
    ("llm_zoo", llm_zoo_folder, "twenty minutes"),
)
_FORM = "files"  # the choice of the group ``pool`` that takes a user's files


def register_resolvers() -> None:
    """Let yaml files name the zoo that ships, ``${zoo:base.safetensors}``, and those that users build."""
    OmegaConf.register_new_resolver("zoo", lambda path="": str(files() / str(path)), replace=True)
    for name, folder_of, length in _BUILT:
        resolver = partial(_built_file, name, folder_of, length)
        OmegaConf.register_new_resolver(name, resolver, replace=True)


def _built_file(name: str, folder_of: Callable[[str], Path], length: str, root: str, path: str = "") -> str:
    """Return a path in a zoo that a user builds, below the folder of the data sets.

    Raises:
        InputError: If the zoo is not there, or not finished.
    """
    folder = folder_of(root)
    if not (folder / "zoo.json").is_file():
        state = "is not finished" if (folder / "building.json").is_file() else "is not there"
        raise InputError(
            f"{folder}: this zoo {state}. Make it, in about {length} on one CPU core: adamerge zoo build "
            f"{name.removesuffix('_zoo')} --root {root}; or name the folder that it is in: data.root=DIR or the "
            "environment variable ADAMERGE_DATA."
        )
    return str(folder / path)


def folders() -> list[Path]:
    """Return where pool files are looked for by name: the folders of ``ADAMERGE_POOLS``, else ``./pools``."""
    named = os.environ.get(FOLDERS)
    return [Path(folder).expanduser() for folder in (named or _DEFAULT_FOLDER).split(os.pathsep) if folder]


def shipped_pools() -> list[str]:
    """Return the names of the pools that ship, without those that the configuration of ``adapt`` completes."""
    return [name for name in rule_names("pool") if _shipped(name).get("base") not in (None, "???")]


def _shipped(name: str) -> dict[str, Any]:
    """Return the content of a file of the group ``pool``, unresolved."""
    content: Any = OmegaConf.to_container(OmegaConf.load(shipped_folder("pool") / f"{name}.yaml"), resolve=False)
    return {str(key): value for key, value in content.items()}


def own_pools() -> dict[str, Path]:
    """Return the user's pools by name; the first folder's where two have one of a name."""
    paths = [path for folder in reversed(folders()) for path in sorted(folder.glob("*.yaml"))]
    return {path.stem: path for path in paths}


def pool_path(pool: str) -> Path:
    """Return the file of a user's pool, by name or as it is named itself; it need not be there.

    Raises:
        InputError: If it is a shipped pool's name.
    """
    if pool in rule_names("pool"):
        raise InputError(f"pool {pool}: the name of a shipped pool; choose another, or name a file, ./{pool}.yaml.")
    return _own(pool) or folders()[0] / f"{pool}.yaml"


def _own(pool: str) -> Path | None:
    """Return the file that a user names, or the one of a name in the folders of pool files; it need not be there."""
    return Path(pool) if pool.endswith((".yaml", ".yml")) or "/" in pool else own_pools().get(pool)


def named_pool(pool: str) -> PoolFiles:
    """Return a shipped pool or a user's by name, or read a pool file.

    Raises:
        InputError: If no pool has the name.
    """
    if pool in shipped_pools():
        register_resolvers()
        content: Any = OmegaConf.to_container(OmegaConf.create(_shipped(pool)), resolve=True)
        return pool_files({**content, "key_prefix": _SHIPPED_PREFIX}, f"--pool {pool}: ", Path())
    for path in (Path(pool), _own(pool)):
        if path is not None and path.is_file():
            return load_pool_file(path)
    raise InputError(
        f"--pool {pool}: no such pool file, and {_no_such_name(pool)} A pool that is FOLDER/{_CHOICE.format(pool)} for "
        "--config-dir is known to adapt and check only."
    )


def chosen_pool(
    command: str,
    *,
    base: Path | None,
    experts: Sequence[str],
    pool: str | None,
    key_prefix: str | None,
    include: Sequence[str],
    exclude: Sequence[str],
    unplaced: str | None,
) -> PoolFiles:
    """Read a command's options that name a pool, ``--pool`` or ``--base`` and ``--expert``, and what merges of it.

    Raises:
        InputError: If both or neither are given, or one is wrong.
    """
    if pool is not None and (base or experts):
        raise InputError(f"{command}: give either --pool, or --base and --expert, not both.")
    if pool is None and (base is None or not experts):
        raise InputError(f"{command}: give --base FILE and --expert NAME=FILE (repeat), or --pool NAME or FILE.")
    files = named_pool(pool) if pool is not None else PoolFiles(PoolFile(place(str(base))), named_files(experts))
    files = files if key_prefix is None else replace(files, key_prefix=key_prefix)
    return files.with_options(include, exclude, unplaced=unplaced)


def rule_and_pool(
    command: str,
    extra: dict[str, Any],
    *,
    recipe: Path | None,
    rule: str | None,
    settings: Sequence[str],
    trust_code: bool = False,
    **pool: Any,
) -> tuple[dict[str, Any], PoolFiles, dict[str, Any]]:
    """Read what ``merge`` or ``transform`` is to do: from its options, or from a recipe that it has written.

    Args:
        command: Its name.
        extra: Options of that command alone, by their keys in the recipe.
        recipe: The file, in which all of these are; its checkpoints must still have the hashes that it records.
        rule: Name or import path.
        settings: Options of the rule.
        trust_code: Whether the recipe's rule may be a name beyond the list.
        pool: See :func:`chosen_pool`.

    Returns:
        The rule's node, the pool, and the command's own options.

    Raises:
        InputError: If they do not go together, or one is wrong.
    """
    if recipe is not None:
        if any((rule, settings, *pool.values(), *extra.values())):
            raise InputError(f"{command}: --recipe holds everything but --out; leave the other options out.")
        content = read_recipe(recipe, command, ("rule", "files", "hashes", *extra))
        if not trust_code:
            check_listed({"rule": content["rule"]}, str(recipe), "nothing shows that you wrote it")
        files = pool_files(content["files"], f"{recipe}: ", recipe.parent).pinned(content["hashes"])
        return content["rule"], files, {key: content[key] for key in extra}
    if rule is None:
        remark = "; none packs only" if command == "transform" else ""
        raise InputError(f"{command}: give --rule NAME; docs/methods.md lists them{remark}.")
    node = rule_node(command, rule, settings)
    announce({"--rule": node})
    return node, chosen_pool(command, **pool), extra


def quoted(text: object) -> str:
    """Return a text as a value of an override; Hydra reads a backslash as itself, but before a quote."""
    return "'" + re.sub(r"(\\*)('|$)", lambda end: 2 * end[1] + ("\\'" if end[2] else ""), str(text)) + "'"


def with_pool_files(arguments: Sequence[str], config_dir: Path | None) -> list[str]:
    """Return arguments of ``adapt`` in which ``pool=NAME`` of a user's pool, or a file, stands as the file.

    Args:
        arguments: Overrides, and flags.
        config_dir: A folder of yaml files that may have a ``pool/NAME.yaml`` of its own.

    Raises:
        InputError: If there is no pool of that name, or one in either place.
    """
    result: list[str] = []
    for argument in arguments:
        match = re.fullmatch(r"pool=([^,'\"\[{$][^,]*)", argument)
        name = match[1] if match else _FORM
        if name in (*rule_names("pool"), "null"):
            result.append(argument)
            continue
        path = _own(name)
        if config_dir is not None and (choice := config_dir / _CHOICE.format(name)).is_file():
            if path is not None and path.is_file() and not path.samefile(choice):
                raise InputError(f"{argument}: two pools have that name, {choice} and {path}; rename one of the two.")
            result.append(argument)
            continue
        if path is None:
            hint = f" Is it a yaml file of yours, FOLDER/{_CHOICE.format(name)}? Name the folder: --config-dir FOLDER."
            raise InputError(f"{argument}: {_no_such_name(name, config_dir)}{hint if config_dir is None else ''}")
        result += [f"pool={_FORM}", f"pool.file={quoted(path.absolute())}"]
    keys = {argument.partition("=")[0] for argument in result}
    return [*result, f"pool={_FORM}"] if "pool.file" in keys and "pool" not in keys else result


def _no_such_name(pool: str, config_dir: Path | None = None) -> str:
    names_in = {", ".join(map(str, folders())): list(own_pools())}
    if config_dir is not None:
        choices = config_dir / "pool"
        names_in[str(choices)] = sorted(path.stem for path in choices.glob("*.yaml"))
    listed = "; ".join(f"in {where}: {', '.join(names) or 'none'}" for where, names in names_in.items())
    near = did_you_mean(pool, [*shipped_pools(), *(name for names in names_in.values() for name in names)])
    return (
        f"no pool of that name; shipped: {', '.join(shipped_pools())}; {listed}.{near} {FOLDERS} names other folders "
        "of pool files."
    )
