"""Compose the configuration of ``adapt`` with Hydra, once; its errors in words that a person understands."""

import contextlib
import difflib
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationResolutionError

from adamerge.commands.run.imports import TRUST, announce, check_listed
from adamerge.commands.run.named_pools import quoted, register_resolvers, with_pool_files
from adamerge.commands.run.shipped import CONFIG_MODULE, CONFIG_NAME, rule_names, shipped_folder
from adamerge.commands.run.yaml_files import prepare_hydra
from adamerge.errors import InputError, did_you_mean
from adamerge.pool.pool_file import PoolFiles, load_pool_file

_CONFIG_DIR = ("--config-dir", "-cd")
_FLAGS_WITH_VALUE = ("--config-name", "-cn", "--config-path", "-cp", "--package", "-p", "--cfg", "-c")
_FLAGS = (
    *("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m"),
    *("--shell-completion", "-sc", "--experimental-rerun", "--info", "-i"),
)
_SWEEP = ("-m", "--multirun")
_DECIDED_BY_FILE = ("file", "base", "experts")  # options of a pool
_OPTIONAL = ("experiment", "benchmark")  # groups of which a run need have none
_NOT_OF_ADAPT = ("merge", "compare")  # groups that other commands read


@dataclass(frozen=True)
class Line:
    """The command line of ``adapt``, taken apart.

    Attributes:
        overrides: All that is no flag.
        config_dir: The folder that ``--config-dir`` names.
        flags: Hydra's other flags, each followed by its value.
    """

    overrides: tuple[str, ...]
    config_dir: Path | None
    flags: tuple[str, ...]


def read_line(arguments: Sequence[str]) -> Line:
    """Tell overrides and flags apart.

    Raises:
        InputError: If there is no such flag, or no such folder.
    """
    overrides, flags, folder = list[str](), list[str](), None
    words = iter(arguments)
    for word in words:
        flag, has_value, value = word.partition("=")
        if flag in _CONFIG_DIR:
            value = value if has_value else next(words, "")
            folder = Path(value)
            if not value or not folder.is_dir():
                raise InputError(f"--config-dir: no such folder: {value!r}.")
        elif flag in _FLAGS_WITH_VALUE:
            flags += [word] if has_value else [word, next(words, "")]
        elif flag in _FLAGS:
            flags.append(word)
        elif word.startswith("-"):
            raise _unknown_flag(word)
        else:
            overrides.append(word)
    return Line(tuple(overrides), folder, tuple(flags))


def compose(arguments: Sequence[str], *, announced: bool = True, stored_in: str | None = None) -> DictConfig:
    """Compose the configuration of ``adapt`` without running it.

    Args:
        arguments: Overrides, and flags.
        announced: Whether to say what it imports beyond the list of names.
        stored_in: The file that the arguments are from, where that may be another's; it may not import such names.

    Raises:
        InputError: If an override or a file is wrong; with the nearest known name.
    """
    line = read_line(arguments)
    if line.flags:
        flag = line.flags[0].split("=")[0]
        if flag in _SWEEP:
            raise InputError(f"{flag}: a sweep is checked job by job: give one value of each option, such as seed=0.")
        if flag not in _FLAGS_WITH_VALUE:
            raise _unknown_flag(line.flags[0])
        raise InputError(f"{line.flags[0]}: not supported; put your yaml files into a folder and use --config-dir.")
    if stored_in is not None and any(word.lstrip("+~").startswith("hydra") for word in line.overrides):
        raise InputError(f"{stored_in}: expected options of a run, found Hydra's own; if you trust it, say {TRUST}.")
    register_resolvers()
    overrides = [re.sub("^hydra[.]run[.]dir=", "run_dir=", override) for override in _for_hydra(line)]
    if line.config_dir is not None:
        overrides.append(f"hydra.searchpath=[{quoted(f'file://{line.config_dir.absolute()}')}]")
    try:
        config = _composed(overrides)
    except Exception as error:
        raise _explained(error, line.config_dir) from error
    config = expanded(config)
    if stored_in is not None:
        check_listed(config, stored_in, "nothing shows that you wrote it")
    elif announced:
        announce(config)
    return config


def hand_over(line: Line, job: Callable[[DictConfig], None]) -> None:
    """Let Hydra do what its flags say: a sweep, of which it composes each job's configuration, or its help.

    Raises:
        InputError: If an override or a file is wrong.
    """
    folder = () if line.config_dir is None else (f"--config-dir={line.config_dir}",)
    sys.argv = ["adamerge adapt", *line.flags, *folder, *_for_hydra(line)]  # its parser takes flags first
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach main() instead of being printed by Hydra
    main = hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME)(job)
    try:
        _help(main) if {"--help", "-h"} & set(line.flags) else main()
    except Exception as error:
        if type(error).__module__.startswith(("hydra", "omegaconf")):
            raise _explained(error, line.config_dir) from error
        raise


def _composed(overrides: Sequence[str]) -> DictConfig:
    with hydra.initialize_config_module(CONFIG_MODULE, version_base="1.3", job_name=CONFIG_NAME):
        return hydra.compose(CONFIG_NAME, overrides=list(overrides))


def _for_hydra(line: Line) -> list[str]:
    """Return overrides as Hydra takes them: pool files by path, and texts in quotes."""
    prepare_hydra()
    is_sweep = not set(_SWEEP).isdisjoint(line.flags)
    overrides = map(_choice, with_pool_files(line.overrides, line.config_dir))
    return _with_new_keys([_readable(override, is_sweep=is_sweep) for override in overrides if override])


def _choice(override: str) -> str:
    """Return ``GROUP=none`` for ``GROUP=null``, and nothing for a group that is optional.

    Raises:
        InputError: If the group has to be something.
    """
    group, _, choice = override.partition("=")
    if choice != "null" or not shipped_folder(group).is_dir():
        return override
    if group in _OPTIONAL or "none" in rule_names(group):
        return "" if group in _OPTIONAL else f"{group}=none"
    raise InputError(f"{override}: a run has one; {group} is one of {', '.join(rule_names(group))}.")


def _with_new_keys(overrides: Sequence[str]) -> list[str]:
    """Return overrides with ``++`` before fields of tasks that no file sets yet, and before experts of a new pool."""
    given = [re.match(r"data\.tasks\.[\w-]+\.(\w+)=", override) for override in overrides]
    fields: set[str] = set()
    if any(given):
        from adamerge.data.benchmarks import task  # imports what only data needs
        from adamerge.data.task import Task

        fields = {*inspect.signature(Task).parameters, *inspect.signature(task).parameters} - {"name", "root"}
    experts = "pool.experts." if "pool=files" in overrides else "\0"
    return [
        f"++{override}" if (match and match[1] in fields) or override.startswith(experts) else override
        for override, match in zip(overrides, given, strict=True)
    ]


def _readable(override: str, *, is_sweep: bool) -> str:
    """Return an override that Hydra can read: ``run_dir=runs/lr=0.1`` with its value in quotes.

    Raises:
        InputError: If it is not clear what is meant.
    """
    parse = OverridesParser.create().parse_override
    key, _, value = override.partition("=")

    def is_read(text: str) -> bool:
        with contextlib.suppress(HydraException):
            return bool(parse(text))
        return False

    def word(match: re.Match[str]) -> str:
        return match[0] if is_read(f"key={match[0]}") else quoted(match[0])

    if is_read(override):
        return override
    if value[:1] in ("[", "{"):
        text = re.sub(r"[^\s'\"{}\[\],:][^'\"{}\[\],:]*", word, value)
    else:
        text = ",".join(map(quoted, value.split(",") if is_sweep else [value]))
    if value and value[0] not in "'\"$" and is_read(f"{key}={text}"):
        return f"{key}={text}"
    raise InputError(
        f"{override}: cannot be read. Before the first = are letters of a-z, digits, _ and - only (a yaml file takes "
        "others); after it, a text of other letters stands in quotes, inside those of the shell: "
        "\"name='my run'\"."
    )


def expanded(config: DictConfig) -> DictConfig:
    """Put in a pool file's content, and leave out the experts of tasks that are to be unseen.

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
    experts = {name: str(OmegaConf.select(data, f"tasks.{name}.expert") or name) for name in {*every, *unseen}}
    return {experts[name] for name in unseen} - {expert for name, expert in experts.items() if name not in unseen}


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
    options: Any = OmegaConf.to_container(node, resolve=True)
    for key in ("base", "experts"):
        if options.get(key) not in (None, "???"):
            raise InputError(f"pool.{key}: pool.file={node.file} says it already; leave one of the two out.")
    files = load_pool_file(Path(str(options.pop("file"))).absolute())
    chosen = {key: value for key, value in options.items() if key not in _DECIDED_BY_FILE and value is not None}
    config.pool = {**options, **files.node(), **chosen}
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


def _help(main: Callable[[], None]) -> None:
    """Let Hydra print its help, without the groups that ``adapt`` does not take."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        main()
    for line in printed.getvalue().splitlines():
        if not line.startswith(tuple(f"{group}: " for group in _NOT_OF_ADAPT)):
            click.echo(line)


def _unknown_flag(flag: str) -> InputError:
    """Say that there is no such flag, and how the option that may be meant is written."""
    name, _, value = flag.lstrip("-").partition("=")
    near = difflib.get_close_matches(name.replace("-", "_"), _option_names(), n=1)
    example = f"{near[0]}={value or 'VALUE'}" if near else "steps=300"
    return InputError(
        f"Unknown flag {flag!r}. Options are written without dashes: {example}. See `adamerge adapt --help`."
    )


def _explained(error: Exception, config_dir: Path | None) -> InputError:
    """Turn Hydra's message into one line, with the nearest name for an unknown key or choice."""
    if isinstance(error, MissingConfigException) and "/" in (error.missing_cfg_file or ""):
        return _no_such_choice(error, config_dir)
    text = " ".join(str(error).split("Config search path")[0].split())
    if "hydra_submitit_launcher" in text:
        return InputError('hydra/launcher: the package submitit is not installed: pip install "adamerge[cluster]".')
    match = re.search(r"(?:Could not override|Key) '([^']+)'", text)
    if match is None:
        return InputError("A defaults list leads to itself." if isinstance(error, RecursionError) else text)
    option, options = match.group(1), _option_names()
    if option in options:
        return InputError(
            f"{option}: your own yaml file for this group does not set it, so it cannot be overridden; write "
            f"+{option}=VALUE, or set it in the file."
        )
    return InputError(
        f"Unknown option {option!r}.{did_you_mean(option, options)} "
        "`adamerge adapt --help` lists all; +key=value adds one that a class of your own takes."
    )


def _no_such_choice(error: MissingConfigException, config_dir: Path | None) -> InputError:
    """Say that a group has no such choice, and which file asks for it where the command line does not."""
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    asking = re.match(r"In '([^']+)'", str(error))
    where = "" if asking is None or asking[1] in (CONFIG_NAME, "hydra/config") else f"{asking[1]}.yaml: "
    of_user = () if config_dir is None else (path.stem for path in (config_dir / group).glob("*.yaml"))
    options = error.options or sorted({*rule_names(group), *of_user})
    hint = f" Is it a file of yours, FOLDER/{group}/{name or 'NAME'}.yaml? Name the folder: --config-dir FOLDER."
    return InputError(
        f"{where}{group}={name}: no such choice.{did_you_mean(name, options)} {group} is one of "
        f"{', '.join(options)}.{hint if config_dir is None else ''}"
    )


def _option_names() -> list[str]:
    """Return the names of all groups and options of the default configuration, dotted."""
    names: list[str] = ["experiment"]

    def collect(node: DictConfig, prefix: str) -> None:
        for key in map(str, node):
            names.append(prefix + key)
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
                collect(child, f"{prefix}{key}.")

    collect(_composed(()), "")
    return names
