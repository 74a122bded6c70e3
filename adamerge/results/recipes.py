"""Recipes: what a command was given and how it ran, in a JSON file that runs it again."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adamerge.errors import InputError
from adamerge.pool.describe import describe
from adamerge.system.progress import Stopwatch
from adamerge.system.reading import read_json_mapping

PLACES = ("run_dir", "resume", "cwd", "command", "job", "logger.")  # options, or their starts: where and how a run runs


def command_facts(seconds: float) -> dict[str, Any]:
    """Return how this process came to a result: command line, working directory, threads and the seconds it took."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "cwd": str(Path.cwd()),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
    }


def timed(
    tensors: Iterable[tuple[str, torch.Tensor]], recipe: dict[str, Any], watch: Stopwatch
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass on what is merged while it is written, and put the facts of the command into its recipe after the last."""
    yield from tensors
    recipe |= command_facts(watch.seconds())


def method_facts(method: object, objective: object, optimizer: object) -> dict[str, Any]:
    """Return what a run from Python was: its method, objective and learning rate, ready for JSON.

    Args:
        method: Its class counts.
        objective: Its class and those of its options that JSON has.
        optimizer: Its class and learning rate count; one without a rate has none.
    """
    groups: list[dict[str, Any]] = getattr(optimizer, "param_groups", None) or [{}]
    rate = groups[0].get("initial_lr", groups[0].get("lr"))
    named = {"method": type(method).__name__, "optimizer": type(optimizer).__name__}
    return {**named, "objective": _plain(describe(objective)), **({} if rate is None else {"lr": float(rate)})}


def _plain(item: Any) -> Any:
    """Return an option as JSON has it: objects described, tensors as their shapes."""
    if isinstance(item, Mapping):
        return {str(key): _plain(value) for key, value in item.items()}
    if isinstance(item, torch.Tensor):
        return f"tensor {tuple(item.shape)}"
    if isinstance(item, (list, tuple)):
        return [_plain(value) for value in item]
    return item if item is None or isinstance(item, (str, int, float)) else _plain(describe(item))


def read_recipe(path: Path, command: str, keys: Sequence[str]) -> dict[str, Any]:
    """Read a recipe, the ``{command}.json`` that a command wrote.

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
    content = read_json_mapping(path)
    missing = [key for key in keys if key not in content]
    if missing:
        raise InputError(
            f"{path}: no recipe of `adamerge {command}` (lacks {', '.join(missing)}). Name a {command}.json that it "
            "wrote."
        )
    return content


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
