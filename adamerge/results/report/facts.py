"""Read what a run left in its folder, as far as it is there and sound.

A report is most wanted where something went wrong: files that are missing or broken become notes, not errors.
"""

import csv
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import yaml
from safetensors import SafetensorError
from safetensors.numpy import load_file

from adamerge.errors import InputError
from adamerge.results.report.record import FILE as RECORD
from adamerge.system.reading import read_json, read_lines, read_yaml_text

_T = TypeVar("_T")
Values = npt.NDArray[np.floating[Any]]
_ANY_OF = ("config.yaml", "merge.json", "summary.json")
_MAX_VALUES = 2_000_000  # logged numbers


def mapping(value: Any) -> dict[str, Any]:
    """Return what a file should hold as a mapping; empty where it does not."""
    return dict(value) if isinstance(value, Mapping) else {}


@dataclass
class Series:
    """A logged quantity: its values by step, in order."""

    steps: list[int]
    values: list[float]


@dataclass
class Learned:
    """The coefficients that a run learned.

    Attributes:
        experts: Names, E.
        granularity: Its name; the configuration has the rest.
        constraint: As described in ``coefficients.json``.
        values: Label, of a parameter or a group, to coefficients (E, groups).
    """

    experts: list[str]
    granularity: str
    constraint: str
    values: dict[str, Values]

    @property
    def count(self) -> int:
        """Number of coefficients."""
        return sum(array.size for array in self.values.values())

    @property
    def is_fine(self) -> bool:
        """Whether several coefficients share a label: rows, columns or chunks of a tensor."""
        return any(array.shape[1] > 1 for array in self.values.values())


@dataclass
class Run:
    """The facts about a run; missing ones are empty, and ``notes`` say why."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    learned: Learned | None = None
    metrics: dict[str, Series] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's name, below that of the experiment."""
        return self.folder.name

    @property
    def is_finished(self) -> bool:
        """Whether the run has exported."""
        return (self.folder / "merge.json").is_file() or not (self.folder / "config.yaml").is_file()

    @property
    def own_row(self) -> str | None:
        """The row of the summary that the run made; None in comparisons."""
        name = str(self.config.get("name"))
        return name if name in self.summary.get("rows", {}) else None

    @property
    def pool(self) -> dict[str, Any]:
        """Sizes and geometry of the pool; empty if not recorded."""
        return mapping(self.record.get("pool"))

    @property
    def costs(self) -> dict[str, Any]:
        """Times and memory; empty if not recorded."""
        return mapping(self.record.get("costs"))

    @property
    def experts(self) -> list[str]:
        """Names of the experts."""
        if self.learned is not None:
            return self.learned.experts
        pool = mapping(self.config.get("pool"))
        names = mapping(self.pool.get("experts")) or mapping(self.recipe.get("hashes")) or mapping(pool.get("experts"))
        return [name for name in names if name != "base"]

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        names = self.summary.get("tasks") or mapping(mapping(self.config.get("data")).get("tasks")) or self.experts
        return [str(task) for task in names]

    def logged(self, prefix: str) -> dict[str, Series]:
        """Return the logged quantities whose names begin so, by the rest of their names."""
        return {name.removeprefix(prefix): s for name, s in self.metrics.items() if name.startswith(prefix)}


def read_run(folder: Path) -> Run:
    """Read a folder that ``adapt``, ``merge``, ``compare`` or ``demo`` made.

    Raises:
        InputError: If the folder holds no file of such a run.
    """
    if folder.is_file():
        raise InputError(f"{folder}: expected a run's folder, found a file. Did you mean {folder.parent}?")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder. Name a folder that `adamerge adapt` made.")
    if not any((folder / name).is_file() for name in _ANY_OF):
        raise InputError(
            f"{folder}: not a run folder: expected {', '.join(_ANY_OF[:-1])} or {_ANY_OF[-1]} in it, found none. Name "
            "a folder that `adamerge adapt`, merge, compare or demo made."
        )
    run = Run(folder.absolute())
    run.config = _mapping(run, "config.yaml")
    run.recipe = _mapping(run, "merge.json")
    run.record = _mapping(run, RECORD)
    run.summary = _checked(run, "summary.json", _summary_of) or {}
    run.learned = _checked(run, "coefficients.json", lambda content: learned_of(content, run.folder))
    run.metrics = _metrics(run)
    if not run.is_finished:
        run.notes.insert(0, "The run has not finished: this is what it left so far.")
    return run


def _mapping(run: Run, name: str) -> dict[str, Any]:
    """Read a JSON or yaml file that holds a mapping."""
    path = run.folder / name
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(read_yaml_text(path)) if path.suffix == ".yaml" else read_json(path)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        run.notes.append(f"{name} cannot be read ({' '.join(str(error).split())[:200]}).")
        return {}
    if not isinstance(content, dict):
        run.notes.append(f"{name}: expected a mapping, found {type(content).__name__}.")
        return {}
    return {str(key): value for key, value in content.items()}


def _checked(run: Run, name: str, read: Callable[[dict[str, Any]], _T]) -> _T | None:
    """Read a file that adamerge wrote; what is wrong with its content is noted, and it counts as missing."""
    try:
        return read(content) if (content := _mapping(run, name)) else None
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OSError, SafetensorError) as error:
        run.notes.append(f"{name} is not as adamerge writes it ({type(error).__name__}: {error}).")
        return None


def _summary_of(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a ``summary.json``, once all that is shown of it is found to be numbers."""
    for row in content["rows"].values():
        low, high = row["interval"]
        for number in (row["mean"], low, high, *(row["per_task"][str(task)] for task in content["tasks"])):
            if not isinstance(number, int | float) or not math.isfinite(number):
                raise TypeError("accuracies are no numbers")
    return content


def learned_of(content: Mapping[str, Any], folder: Path) -> Learned:
    """Return the coefficients of a ``coefficients.json``; a damaged one raises one of many errors.

    Args:
        content: The content of the file.
        folder: Where the file lies, with the tensors beside it.
    """
    experts = [str(name) for name in content["experts"]]
    if "tensors" in content:
        tensors = load_file(folder / Path(str(content["tensors"])).name)
        values = {label: np.asarray(tensor, dtype=float) for label, tensor in tensors.items()}
    else:
        rows = [content["coefficients"][expert] for expert in experts]
        values = {str(label): np.array([np.ravel(row[label]) for row in rows], dtype=float) for label in rows[0]}
    if not values or any(array.shape[0] != len(experts) or array.ndim != 2 for array in values.values()):
        raise ValueError("expected coefficients of every expert")
    if not all(np.isfinite(array).all() for array in values.values()):
        raise ValueError("NaN or infinite coefficients")
    constraint, granularity = _described(content.get("constraint")), content.get("granularity")
    granularity = str(granularity.get("name") if isinstance(granularity, Mapping) else granularity)
    return Learned(experts, granularity, constraint, values)


def _described(described: Any) -> str:
    """Return a description by `describe` in a few words."""
    if not isinstance(described, Mapping):
        return str(described)
    options = ", ".join(f"{key}={value}" for key, value in described.items() if key != "name")
    return f"{described.get('name')} ({options})" if options else str(described.get("name"))


def _version(path: Path) -> int:
    number = path.parent.name.removeprefix("version_")
    return int(number) if number.isdigit() else -1


def _metrics(run: Run) -> dict[str, Series]:
    """Read the numbers of all CSV files; a resumed run repeats steps, of which the later values count."""
    values: dict[str, dict[int, float]] = {}
    lost = count = 0
    for path in sorted(run.folder.glob("metrics/version_*/metrics.csv"), key=_version):
        try:
            for line in csv.DictReader(read_lines(path)):
                step = int(line.pop("step"))
                numbers = {name: float(text) for name, text in line.items() if name != "epoch" and text}
                count += len(numbers)
                if count > _MAX_VALUES:
                    raise ValueError(f"more than {_MAX_VALUES} values")
                finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
                lost += len(numbers) - len(finite)
                for name, value in finite.items():
                    values.setdefault(name, {})[step] = value
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            name = path.relative_to(run.folder)
            run.notes.append(f"{name} is broken; what came before that is shown ({type(error).__name__}: {error}).")
    if lost:
        run.notes.append(f"{lost} logged values are NaN or infinite, and not shown.")
    return {
        name: Series(sorted(by_step), [by_step[step] for step in sorted(by_step)]) for name, by_step in values.items()
    }
