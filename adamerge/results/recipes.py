"""Recipes: what a command was given and how it ran, in a JSON file that runs it again."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adamerge.errors import InputError

PLACES = ("run_dir", "resume", "cwd", "command", "job", "logger.")  # options, or their starts: where and how a run runs


def command_facts(seconds: float) -> dict[str, Any]:
    """Return how this process came to a result: command line, working directory, threads and the seconds it took."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "cwd": str(Path.cwd()),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
    }


def read_recipe(path: Path, command: str, keys: Sequence[str]) -> dict[str, Any]:
    """Read what a command wrote, ``{command}.json``.

    Args:
        path: The file.
        command: Which command of ``adamerge`` wrote it.
        keys: What the recipe must hold.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it is no recipe of this command.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe.")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in keys if key not in content]
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: no recipe of `adamerge {command}` ({error}). {_mend(command)}") from error
    if not isinstance(content, dict) or missing:
        problem = f"lacks {', '.join(missing)}" if missing else "no mapping"
        raise InputError(f"{path}: no recipe of `adamerge {command}` ({problem}). {_mend(command)}")
    return content


def _mend(command: str) -> str:
    return f"Name a {command}.json that it wrote."


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested options by their dotted names.

    >>> flat({"steps": 3, "optimizer": {"lr": 0.1}})
    {'steps': 3, 'optimizer.lr': 0.1}
    """
    options: dict[str, Any] = {}
    for key, value in content.items():
        nested = isinstance(value, Mapping) and value
        options |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return options
