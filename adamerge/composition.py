"""Hydra for the command line: composing the configuration of ``adapt``, and errors a person understands."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
from hydra.core.utils import setup_globals
from omegaconf import DictConfig, OmegaConf

from adamerge.errors import InputError, did_you_mean
from adamerge.preflight import CONFIG_MODULE, CONFIG_NAME
from adamerge.zoo import files

_FLAGS_WITH_VALUE = (
    *("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp"),
    *("--package", "-p", "--cfg", "-c"),
)


def register_resolvers() -> None:
    """Let yaml files name the shipped zoo: ``${zoo:base.safetensors}``."""
    OmegaConf.register_new_resolver("zoo", lambda path="": str(files() / str(path)), replace=True)


def compose(arguments: Sequence[str]) -> DictConfig:
    """Compose the configuration of ``adapt`` without running it.

    Raises:
        InputError: If an override or a file is wrong; with the nearest known name.
    """
    setup_globals()
    register_resolvers()
    overrides, folder = _take_config_dir(arguments)
    if folder is not None:
        overrides.append(f"hydra.searchpath=['file://{folder.absolute()}']")
    try:
        with hydra.initialize_config_module(CONFIG_MODULE, version_base="1.3", job_name=CONFIG_NAME):
            return hydra.compose(CONFIG_NAME, overrides=overrides)
    except Exception as error:
        raise _explained(error, arguments) from error


def hand_over(arguments: Sequence[str], job: Callable[[DictConfig], None]) -> None:
    """Hand over to Hydra: it composes again, makes the run folder (or the sweep's), and calls the job."""
    sys.argv = ["adamerge adapt", *_flags_first(arguments)]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach main() instead of being printed by Hydra
    try:
        hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME)(job)()
    except Exception as error:
        if type(error).__module__.startswith(("hydra", "omegaconf")):
            raise _explained(error, arguments) from error
        raise


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
            raise InputError(f"Unknown flag {argument!r}. See `adamerge adapt --help`.")
        else:
            overrides.append(argument)
    return overrides, folder


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
    """Turn Hydra's message into one line, with the nearest name for an unknown key."""
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
