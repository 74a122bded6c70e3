"""Hydra for the command line: composing the configuration of ``adapt``, and errors a person understands."""

import contextlib
import difflib
import importlib.resources
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.utils import setup_globals
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationResolutionError

from adamerge.commands.run import CONFIG_MODULE
from adamerge.commands.run.build import CONFIG_NAME
from adamerge.commands.run.named_pools import register_resolvers, with_pool_files
from adamerge.data.benchmarks import task
from adamerge.data.unlabeled_tasks import Task
from adamerge.errors import InputError, did_you_mean
from adamerge.pool.pool_file import PoolFiles, load_pool_file

_FLAGS_WITH_VALUE = (
    *("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp"),
    *("--package", "-p", "--cfg", "-c"),
)
_FLAGS = (
    *(*_FLAGS_WITH_VALUE, "--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m"),
    *("--shell-completion", "-sc", "--experimental-rerun", "--info", "-i"),
)

_NODE = ("file", "base", "experts")  # of a pool: what a pool file decides
_NOT_OF_ADAPT = ("merge", "compare")  # groups that other commands read


def compose(arguments: Sequence[str]) -> DictConfig:
    """Compose the configuration of ``adapt`` without running it.

    Raises:
        InputError: If an override or a file is wrong; with the nearest known name.
    """
    setup_globals()
    register_resolvers()
    overrides, folder = _take_config_dir(arguments)
    overrides = _with_task_fields(with_pool_files(overrides, folder))
    if folder is not None:
        overrides.append(f"hydra.searchpath=['file://{folder.absolute()}']")
    try:
        with hydra.initialize_config_module(CONFIG_MODULE, version_base="1.3", job_name=CONFIG_NAME):
            config = hydra.compose(CONFIG_NAME, overrides=overrides)
    except Exception as error:
        raise _explained(error, arguments) from error
    return expanded(config)


def expanded(config: DictConfig) -> DictConfig:
    """Put in what a pool file says, and leave out the experts of tasks that are to be unseen.

    Raises:
        FileNotFoundError: If there is no such pool file.
        InputError: If it is no pool file, or the configuration names a base or experts besides.
    """
    config = _with_pool_file(config)
    data, pool = config.get("data"), config.get("pool")
    unseen = data.get("unseen") if isinstance(data, DictConfig) else None
    if isinstance(unseen, ListConfig) and isinstance(pool, DictConfig):
        _leave_out(pool, _experts_of_unseen(data, list(map(str, unseen))))
    return config


def _experts_of_unseen(data: DictConfig, unseen: Sequence[str]) -> set[str]:
    """Return the experts that only unseen tasks have as their own."""
    tasks = data.get("tasks")
    every = map(str, tasks) if isinstance(tasks, DictConfig) and "_target_" not in tasks else ()
    own = {name: str(OmegaConf.select(data, f"tasks.{name}.expert") or name) for name in {*every, *unseen}}
    return {own[name] for name in unseen} - {expert for name, expert in own.items() if name not in unseen}


def _leave_out(pool: DictConfig, experts: set[str]) -> None:
    """Delete experts, and what a pool file says of them."""
    for part in ("experts", "sha256", "licences"):
        node = pool.get(part)
        if isinstance(node, DictConfig):
            with open_dict(node):
                for expert in experts & set(map(str, node)):
                    del node[expert]


def _with_pool_file(config: DictConfig) -> DictConfig:
    """Put a pool file's content into the configuration, where ``pool.file`` names one.

    Options that the configuration sets stand in for the file's. A task of the data gets the expert that names it.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it is no pool file, or the configuration names a base or experts besides.
    """
    node = config.get("pool")
    try:
        if not isinstance(node, DictConfig) or node.get("file") is None:
            return config
    except InterpolationResolutionError as error:
        message = str(error).splitlines()[0].removeprefix("InputError raised while resolving interpolation: ")
        raise InputError(f"pool.file: {message}") from error
    own = OmegaConf.to_container(node, resolve=True)
    assert isinstance(own, dict)
    given = [key for key in ("base", "experts") if own.get(key) not in (None, "???")]
    if given:
        raise InputError(f"pool.{given[0]}: pool.file={node.file} says it already; leave one of the two out.")
    files = load_pool_file(Path(str(node.file)).absolute())
    usual = {"storage": "auto", "duplicates": "refuse"}
    chosen = {key: value for key, value in own.items() if key not in _NODE and value not in (None, usual.get(str(key)))}
    own.pop("file")
    config.pool = {**own, **files.node(), **chosen}
    name_experts(config, files)
    return config


def name_experts(config: DictConfig, files: PoolFiles) -> None:
    """Tell the data's tasks which expert is theirs, where a pool file says so and they name none."""
    tasks = config.data.get("tasks") if isinstance(config.get("data"), DictConfig) else None
    for name, entry in files.experts.items():
        if not entry.task or not isinstance(tasks, DictConfig) or entry.task not in tasks or "_target_" in tasks:
            continue
        if OmegaConf.select(tasks, f"{entry.task}.expert") is None:
            OmegaConf.update(tasks, f"{entry.task}.expert", name, force_add=True)


def rule_names(group: str) -> list[str]:
    """Return the names of what ships in a group, such as ``merge`` or ``transform``."""
    folder = importlib.resources.files(CONFIG_MODULE) / group
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def preset_file(group: str, preset: str) -> Path:
    """Return the file of a shipped preset of a group such as ``compare``, or the file that is named itself.

    Raises:
        InputError: If there is neither.
    """
    known = rule_names(group)
    if preset in known:
        return Path(str(importlib.resources.files(CONFIG_MODULE) / group / f"{preset}.yaml"))
    if not Path(preset).is_file():
        raise InputError(
            f"--preset {preset}: no such file, and no shipped preset of that name; shipped: {', '.join(known)}."
            f"{did_you_mean(preset, known)}"
        )
    return Path(preset)


def preset_content(group: str, preset: str) -> tuple[Path, Any]:
    """Return a preset's file, see :func:`preset_file`, and what it holds as plain containers.

    Raises:
        InputError: If there is no such preset, or it is no yaml file.
    """
    path = preset_file(group, preset)
    try:
        return path, OmegaConf.to_container(OmegaConf.create(path.read_text(encoding="utf-8")), resolve=True)
    except Exception as error:  # whatever a yaml parser, a decoder or an interpolation finds wrong
        raise InputError(f"{path}: expected a yaml file, found: {' '.join(str(error).split())}.") from error


def rule_node(group: str, rule: str, settings: Sequence[str]) -> dict[str, Any]:
    """Return a rule's node: a shipped one by name, or any class by import path, with options set.

    Args:
        group: ``merge`` or ``transform``.
        rule: Such as ``tsvm``, or ``my_package.MyRule``.
        settings: ``option=value``; values are yaml.

    Raises:
        InputError: If there is no such rule, or a setting cannot be read.
    """
    known = rule_names(group)
    if rule in known:
        file = importlib.resources.files(CONFIG_MODULE) / group / f"{rule}.yaml"
        node = OmegaConf.create(file.read_text(encoding="utf-8"))
    elif "." in rule:
        node = OmegaConf.create({"_target_": rule})
    else:
        raise InputError(
            f"--rule: expected one of {', '.join(known)}, or an import path such as my_package.MyRule, found {rule!r}."
            f"{did_you_mean(rule, known)}"
        )
    for setting in settings:
        option, separator, value = setting.partition("=")
        if not separator or not option:
            raise InputError(f"--set {setting}: expected OPTION=VALUE.")
        try:
            OmegaConf.update(node, option, OmegaConf.create(f"value: {value}").value)
        except Exception as error:  # whatever a yaml parser finds wrong
            raise InputError(f"--set {setting}: the value is no yaml: {str(error).splitlines()[0]}.") from error
    missing = [str(key) for key in node if OmegaConf.is_missing(node, key)]
    if missing:
        raise InputError(f"--rule {rule}: {missing[0]} must be given: --set {missing[0]}=VALUE.")
    content = OmegaConf.to_container(node, resolve=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def hand_over(arguments: Sequence[str], job: Callable[[DictConfig], None]) -> None:
    """Hand over to Hydra: it composes again, makes the run folder (or the sweep's), and calls the job.

    Raises:
        InputError: If a flag, an override or a file is wrong.
    """
    for argument in arguments:
        if argument.startswith("-") and argument.split("=")[0] not in _FLAGS:
            raise InputError(_unknown_flag(argument))
    folder = next((Path(value) for value in _config_dirs(arguments)), None)
    sys.argv = ["adamerge adapt", *_flags_first(_with_task_fields(with_pool_files(arguments, folder)))]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach main() instead of being printed by Hydra
    main = hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME)(job)
    try:
        _help(main) if {"--help", "-h"} & set(arguments) else main()
    except Exception as error:
        if type(error).__module__.startswith(("hydra", "omegaconf")):
            raise _explained(error, arguments) from error
        raise


def _help(main: Callable[[], None]) -> None:
    """Let Hydra print its help, without the groups that ``adapt`` does not take."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        main()
    for line in printed.getvalue().splitlines():
        if not line.startswith(tuple(f"{group}: " for group in _NOT_OF_ADAPT)):
            print(line)


def quoted(text: object) -> str:
    """Return a text as a value of an override, whatever is in it."""
    return "'" + str(text).replace("\\", "\\\\").replace("'", "\\'") + "'"


def _take_config_dir(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """Split Hydra's flags off, as the compose API takes overrides only."""
    overrides, folder = [], None
    rest = iter(arguments)
    for argument in rest:
        flag, _, value = argument.partition("=")
        if flag in ("--config-dir", "-cd"):
            folder = Path(value or next(rest, ""))
            if not folder.is_dir():
                raise InputError(f"--config-dir: no such folder: {folder}.")
        elif flag in _FLAGS_WITH_VALUE:
            raise InputError(f"{flag}: not supported; put your yaml files into a folder and use --config-dir.")
        elif argument.startswith("-"):
            raise InputError(_unknown_flag(argument))
        else:
            overrides.append(argument)
    return overrides, folder


def _unknown_flag(flag: str) -> str:
    """Say that there is no such flag, and how what may be meant, an option, is written."""
    name, _, value = flag.lstrip("-").partition("=")
    near = difflib.get_close_matches(name.replace("-", "_"), _known_options(), n=1)
    example = f"{near[0]}={value or 'VALUE'}" if near else "steps=300"
    return f"Unknown flag {flag!r}. Options are written without dashes: {example}. See `adamerge adapt --help`."


def _config_dirs(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the folders that ``--config-dir`` names."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, separator, value = argument.partition("=")
        if flag in ("--config-dir", "-cd"):
            yield value if separator else following


def _flags_first(arguments: Sequence[str]) -> list[str]:
    """Move flags and their values before the overrides: Hydra's parser takes overrides only in one run."""
    flags: list[str] = []
    overrides: list[str] = []
    takes_value = False
    for argument in arguments:
        is_value = takes_value and not argument.startswith("-")
        (flags if is_value or argument.startswith("-") else overrides).append(argument)
        takes_value = argument in _FLAGS_WITH_VALUE
    return [*flags, *overrides]


def _explained(error: Exception, arguments: Sequence[str]) -> InputError:
    """Turn Hydra's message into one line, with the nearest name for an unknown key or choice."""
    if isinstance(error, MissingConfigException) and "/" in (error.missing_cfg_file or ""):
        return _no_such_choice(error, arguments)
    text = str(error).split("Config search path")[0]
    text = re.sub(r"\s*\n\s*", " ", text.strip())
    if "hydra_submitit_launcher" in text:
        return InputError('hydra/launcher: the package submitit is not installed: pip install "adamerge[cluster]".')
    match = re.search(r"(?:Could not override|Key) '([^']+)'", text)
    if match:
        known = _known_options()
        if match.group(1) in known:
            return InputError(
                f"{match.group(1)}: your own yaml file for this group does not set it, so it cannot be overridden; "
                f"write +{match.group(1)}=VALUE, or set it in the file."
            )
        return InputError(
            f"Unknown option {match.group(1)!r}.{did_you_mean(match.group(1), known)} "
            "`adamerge adapt --help` lists all; +key=value adds one that a class of your own takes."
        )
    return InputError(text)


def _no_such_choice(error: MissingConfigException, arguments: Sequence[str]) -> InputError:
    """Say that a group has no such choice, and which file asks for it where the command line does not."""
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    asking = re.match(r"In '([^']+)'", str(error))
    where = "" if asking is None or asking[1] in (CONFIG_NAME, "hydra/config") else f"{asking[1]}.yaml: "
    options = error.options or _choices(group, arguments)
    hint = f" Is it a file of yours, FOLDER/{group}/{name or 'NAME'}.yaml? Name the folder: --config-dir FOLDER."
    return InputError(
        f"{where}{group}={name}: no such choice.{did_you_mean(name, options)} {group} is one of "
        f"{', '.join(options)}.{'' if any(_config_dirs(arguments)) else hint}"
    )


def _with_task_fields(arguments: Sequence[str]) -> list[str]:
    """Let a task's fields be given also where its yaml file does not: Hydra's struct mode knows what is there only."""
    fields = {*inspect.signature(Task).parameters, *inspect.signature(task).parameters} - {"name", "root"}
    given = re.compile(rf"data\.tasks\.[\w-]+\.(?:{'|'.join(sorted(fields))})=")
    return [f"++{argument}" if given.match(argument) else argument for argument in arguments]


def _choices(group: str, arguments: Sequence[str]) -> list[str]:
    """Return the choices of a group: those that ship, and those below ``--config-dir``."""
    folders = [Path(str(importlib.resources.files(CONFIG_MODULE))), *map(Path, _config_dirs(arguments))]
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def _known_options() -> list[str]:
    """Names of all groups and options of the default configuration, dotted."""
    with hydra.initialize_config_module(CONFIG_MODULE, version_base="1.3", job_name=CONFIG_NAME):
        config = hydra.compose(CONFIG_NAME)
    names: list[str] = ["experiment"]

    def collect(node: DictConfig, prefix: str) -> None:
        for key in map(str, node):
            names.append(prefix + key)
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
                collect(child, f"{prefix}{key}.")

    collect(config, "")
    return names
