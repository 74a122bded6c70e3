"""The published figures of a table, as a preset of ``adamerge compare`` states them beside its rows."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adamerge.errors import InputError, check_keys, check_number, did_you_mean
from adamerge.results.table import Table

log = logging.getLogger(__name__)

_KEYS = ("title", "source", "protocol", "pool", "rows")
_ROW_KEYS = ("mean", "tasks", "source", "protocol")

Published = Mapping[str, Any]


def read_published(section: Any, rows: Mapping[str, Any], path: Path) -> Published:
    """Check the section ``published`` of a preset.

    Args:
        section: As the file has it.
        rows: The preset's.
        path: The file, for messages.

    Returns:
        ``title``; ``pool`` (the checkpoints that it was made with, and how to get them); ``rows`` by the preset's
        names: ``mean`` and ``tasks`` (by task, as far as known) in percent, ``source`` (where it was read) and
        ``protocol`` (how it was obtained), which are the table's where a row has none.

    Raises:
        InputError: If it says something else.
    """
    where = f"{path}: published"
    check_keys(section, _KEYS, where)
    for key in _KEYS:
        if not section.get(key):
            raise InputError(f"{where}.{key}: must be given.")
    if not isinstance(section["rows"], Mapping):
        raise InputError(f"{where}.rows: expected a mapping from row to figures, found {section['rows']!r}.")
    figures = {}
    for name, entry in section["rows"].items():
        if name not in rows:
            raise InputError(
                f"{where}.rows: {name!r} is no row of the preset.{did_you_mean(str(name), map(str, rows))}"
            )
        check_keys(entry, _ROW_KEYS, f"{where}.rows.{name}")
        tasks = entry.get("tasks") or {}
        if not isinstance(tasks, Mapping):
            raise InputError(f"{where}.rows.{name}.tasks: expected a mapping from task to percent, found {tasks!r}.")
        for task, value in {"mean": entry.get("mean"), **tasks}.items():
            check_number(f"{where}.rows.{name}: {task}: an accuracy in percent", value, 0, 100)
        texts = {key: str(entry.get(key) or section[key]) for key in ("source", "protocol")}
        figures[name] = {"mean": float(entry["mean"]), "tasks": dict(tasks), **texts}
    return {"title": str(section["title"]), "pool": str(section["pool"]), "rows": figures}


def unknown_tasks(published: Published, tasks: Sequence[str]) -> list[str]:
    """Say which published figures are of tasks that are not among these."""
    return [
        f"published.rows.{name}.tasks: {task!r} is no task of the data.{did_you_mean(task, tasks)}"
        for name, figures in published["rows"].items()
        for task in figures["tasks"]
        if task not in tasks
    ]


def with_published(content: dict[str, Any], published: Published, protocols: Mapping[str, str]) -> dict[str, Any]:
    """Put the figures that were published beside the rows of a comparison.

    Args:
        content: The content of ``summary.json``.
        published: See :func:`read_published`.
        protocols: How each row is obtained here, in words.

    Returns:
        The content with ``title`` and ``pool``; rows have ``protocol``, and ``published`` and ``difference`` (of the
        means, in points) where there is a figure, of these tasks.
    """
    for problem in unknown_tasks(published, content["tasks"]):
        log.warning("%s", problem)
    rows = {}
    for name, row in content["rows"].items():
        rows[name] = {**row, "protocol": protocols[name]}
        figures = published["rows"].get(name)
        if figures is not None and set(figures["tasks"]) <= set(content["tasks"]):
            rows[name] |= {"published": figures, "difference": 100 * row["mean"] - figures["mean"]}
    return {**content, "title": published["title"], "pool": published["pool"], "rows": rows}


def protocols_table(content: Mapping[str, Any]) -> Table:
    """Return a table of how each row was obtained, here and in the publication."""
    lines = []
    for name, row in content["rows"].items():
        figures = row.get("published") or {"protocol": "-", "source": "-"}
        lines.append([name, row["protocol"], figures["protocol"], figures["source"]])
    caption = f"Published figures were made with: {content['pool']}"
    return Table(["row", "protocol here", "protocol published", "source"], lines, caption=caption)
