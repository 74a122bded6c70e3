"""The command ``adamerge reproduce``: a published table's rows, made here, beside the published figures.

A preset of ``adamerge compare`` with a section ``published`` says what was published; the rows are made by the
machinery of ``compare``, so that an interrupted reproduction goes on.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from adamerge.commands.compare import plan as comparison
from adamerge.commands.run.build import check
from adamerge.commands.run.compose import compose, preset_content
from adamerge.data.benchmarks import checks
from adamerge.errors import InputError, check_keys, did_you_mean
from adamerge.system.files import atomic_path, save_json

log = logging.getLogger(__name__)

JSON, MARKDOWN = "reproduction.json", "reproduction.md"
_TASK = "adamerge.data.benchmarks.task"
_KEYS = ("title", "source", "protocol", "pool", "rows")
_ROW_KEYS = ("mean", "tasks", "source", "protocol")


@dataclass(frozen=True)
class Figures:
    """What was published of a row, in percent.

    Attributes:
        mean: Over the tasks.
        tasks: By task, as far as known.
        source: Where it was read.
        protocol: How it was obtained, as far as known.
    """

    mean: float
    source: str
    protocol: str
    tasks: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """What was published of a table.

    Attributes:
        title: Of the table.
        rows: By the names of the preset's rows.
        pool: The checkpoints that it was made with, and how to get them.
    """

    title: str
    rows: Mapping[str, Figures]
    pool: str


def read_published(preset: str) -> Published:
    """Read what a preset says was published.

    Raises:
        InputError: If there is no such preset, or it says nothing, or something else.
    """
    path, content = preset_content("compare", preset)
    section = content.get("published") if isinstance(content, Mapping) else None
    if section is None:
        raise InputError(f"{path}: expected a section published: with the figures to compare with, found none.")
    where = f"{path}: published"
    check_keys(section, _KEYS, where)
    for key in _KEYS:
        if not section.get(key):
            raise InputError(f"{where}.{key}: must be given.")
    made = content.get("rows") or {}
    for found, name in ((made, f"{path}: rows"), (section["rows"], f"{where}.rows")):
        if not isinstance(found, Mapping):
            raise InputError(f"{name}: expected a mapping from row to what it is, found {found!r}.")
    rows = {}
    for name, found in section["rows"].items():
        if name not in made:
            raise InputError(
                f"{where}.rows: {name!r} is no row of the preset.{did_you_mean(str(name), map(str, made))}"
            )
        rows[str(name)] = _figures(found, f"{where}.rows.{name}", section)
    return Published(str(section["title"]), rows, str(section["pool"]))


def problems_of(plan: comparison.Plan, published: Published) -> list[str]:
    """Return everything that a plan's rows lack, before any is made: pool, data, options.

    Rows are checked as ``adamerge check`` would; what several have wrong is said once.
    """
    problems: dict[str, None] = {}
    every = [(), *(spec.overrides for spec in plan.rows.values() if spec.adapts)]
    for overrides in every:
        config = compose([*plan.overrides, *overrides])
        config.run_dir = str(plan.folder.absolute() / "run")
        problems |= dict.fromkeys(check(config))
        if problems:
            break  # pool and data are the same for all rows
    config = compose(plan.overrides)
    tasks = [str(name) for name in config.data.get("tasks") or ()]  # a data set of another kind names its own
    return [*problems, *(_unknown_tasks(published, tasks) if tasks else [])]


def run(
    plan: comparison.Plan, published: Published, console: Console, on_start: Callable[[], None] | None = None
) -> dict[str, str]:
    """Make the rows that are not made yet, and write ``reproduction.md`` and ``reproduction.json`` beside the tables.

    Args:
        plan: The preset's.
        published: What it says was published.
        console: Where progress and tables go.
        on_start: See :func:`adamerge.commands.compare.plan.run`.

    Returns:
        What went wrong, by row and seed; run again to try those again.

    Raises:
        InputError: If the folder holds results of other options.
    """
    failed = comparison.run(plan, console, on_start)
    summary = plan.folder / "summary.json"
    if summary.is_file():
        content = reproduced(json.loads(summary.read_text(encoding="utf-8")), published, settings_of(plan))
        save_json(content, plan.folder / JSON)
        with atomic_path(plan.folder / MARKDOWN) as temporary:
            temporary.write_text(markdown(content), encoding="utf-8")
        console.print(terminal(content))
    return failed


def settings_of(plan: comparison.Plan) -> dict[str, str]:
    """Return the protocol of each row of a plan, in words."""
    found = {}
    for name, spec in plan.rows.items():
        config = compose([*plan.overrides, *spec.overrides])
        data = config.data
        protocol = str(data.get("protocol") or "split")
        if data.get("adapt") not in (None, "test"):
            protocol = f"adapted on {data.adapt}, scored on all of test"
        if spec.adapts:
            batches = f"{data.get('batches_per_step') or 1} x {data.get('batch_size')}"
            protocol += f", {config.steps} steps of {batches} images a task"
        found[name] = protocol
    return found


def reproduced(summary: Mapping[str, Any], published: Published, settings: Mapping[str, str]) -> dict[str, Any]:
    """Put figures beside those that were published; all in percent.

    Args:
        summary: Content of a comparison's ``summary.json``.
        published: What was published.
        settings: Protocol of each row, in words.

    Returns:
        ``rows`` by name: ``mean`` and ``tasks`` here, ``published``, ``difference`` (of the means; None where a figure
        is missing), ``protocol``, ``published_protocol``, ``source``, ``uses_labels`` and ``seeds``.

    Raises:
        InputError: If a published figure is of a task that was not scored.
    """
    scored = {name: figures for name, figures in published.rows.items() if name in summary["rows"]}
    if unknown := _unknown_tasks(replace(published, rows=scored), summary["tasks"]):
        raise InputError(unknown[0])
    rows: dict[str, Any] = {}
    for name, row in summary["rows"].items():
        figures = published.rows.get(name)
        mean = 100 * row["mean"]
        rows[name] = {
            "mean": mean,
            "tasks": {task: 100 * value for task, value in row["per_task"].items()},
            "published": None if figures is None else {"mean": figures.mean, "tasks": dict(figures.tasks)},
            "difference": None if figures is None else mean - figures.mean,
            "protocol": settings.get(name, ""),
            "published_protocol": "" if figures is None else figures.protocol,
            "source": "" if figures is None else figures.source,
            "uses_labels": row["uses_labels"],
            "seeds": row["seeds"],
        }
    return {"format": 1, "title": published.title, "pool": published.pool, "tasks": summary["tasks"], "rows": rows}


def markdown(content: Mapping[str, Any]) -> str:
    """Lay a reproduction out as Markdown: here (published), by task and mean, and how each was obtained."""
    tasks = content["tasks"]
    table = [["row", *tasks, "mean", "difference"], ["---"] * (len(tasks) + 3)]
    notes = [["row", "protocol here", "protocol published", "source"], ["---"] * 4]
    for name, row in content["rows"].items():
        own = row["published"] or {"mean": None, "tasks": {}}
        label = f"`{name}`" + (" *" if row["uses_labels"] else "")
        cells = [_both(row["tasks"][task], own["tasks"].get(task)) for task in tasks]
        table.append([label, *cells, _both(row["mean"], own["mean"]), _signed(row["difference"])])
        notes.append([label, row["protocol"], row["published_protocol"] or "-", row["source"] or "-"])
    lines = ["| " + " | ".join(line) + " |" for line in table]
    return (
        f"# {content['title']}\n\nAccuracy in %: measured here (published). * uses labels.\n\n"
        + "\n".join(lines)
        + "\n\n"
        + "\n".join("| " + " | ".join(line) + " |" for line in notes)
        + f"\n\nPublished figures were made with: {content['pool']}\n"
    )


def terminal(content: Mapping[str, Any]) -> Table:
    """Lay a reproduction out for the terminal: means only."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, title=content["title"], title_justify="left")
    for column in ("row", "here", "published", "difference", "protocol here", "protocol published"):
        table.add_column(column, justify="right" if column in ("here", "published", "difference") else "left")
    for name, row in content["rows"].items():
        own = None if row["published"] is None else row["published"]["mean"]
        table.add_row(
            name + (" *" if row["uses_labels"] else ""), _number(row["mean"]), _number(own), _signed(row["difference"]),
            row["protocol"], row["published_protocol"],
        )  # fmt: skip
    table.caption = "Mean accuracy, %. * uses labels. By task, with sources: reproduction.md."
    table.caption_justify = "left"
    return table


def _unknown_tasks(published: Published, tasks: Sequence[str]) -> list[str]:
    """Say which published figures are of tasks that are not among these."""
    return [
        f"published.rows.{name}.tasks: {task!r} is no task of the data.{did_you_mean(task, tasks)}"
        for name, figures in published.rows.items()
        for task in figures.tasks
        if task not in tasks
    ]


def _figures(found: Any, where: str, section: Mapping[str, Any]) -> Figures:
    check_keys(found, _ROW_KEYS, where)
    tasks = found.get("tasks") or {}
    if not isinstance(tasks, Mapping):
        raise InputError(f"{where}.tasks: expected a mapping from task to percent, found {tasks!r}.")
    for name, value in {"mean": found.get("mean"), **tasks}.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 100:
            raise InputError(f"{where}: {name}: expected an accuracy in percent, found {value!r}.")
    texts = {key: str(found.get(key) or section[key]) for key in ("source", "protocol")}
    return Figures(float(found["mean"]), tasks={str(k): float(v) for k, v in tasks.items()}, **texts)


def missing_data(plan: comparison.Plan) -> list[tuple[str, Path]]:
    """Return the field's data sets of a plan's tasks that are not there or not complete, each with its folder."""
    missing = []
    tasks = compose(plan.overrides).data.get("tasks") or {}
    for name in tasks:
        node = tasks[name]
        if not isinstance(node, DictConfig) or node.get("_target_") != _TASK:
            continue
        root = Path(str(node.root)).expanduser().absolute()
        if checks.check(str(node.name), root, 0).state != "complete":
            missing.append((str(node.name), root))
    return missing


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _both(own: float, published: float | None) -> str:
    return _number(own) if published is None else f"{own:.1f} ({published:.1f})"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1f}"
