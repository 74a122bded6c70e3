"""The pictures that stand beside a summary: rows of a comparison, and accuracies under corruptions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adamerge.results.report import paper
from adamerge.results.report.charts import BarChart, HeatMap, Panel
from adamerge.results.table import Table


def save_comparison(content: Mapping[str, Any], path: Path) -> None:
    """Draw a summary: per row a bar for the mean accuracy with its 95 % interval, and a mark for each task.

    Args:
        content: What ``summary.json`` holds.
        path: A ``.png``, ``.svg`` or ``.pdf`` file, written atomically.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    rows, tasks = content["rows"], content["tasks"]
    note = ", * uses labels" if any(row["uses_labels"] for row in rows.values()) else ""
    chart = BarChart(
        key="comparison",
        title="Accuracy by row and task",
        text="Bars: mean accuracy with its 95 % interval. Marks: tasks.",
        categories=[name + " *" * bool(row["uses_labels"]) for name, row in rows.items()],
        bar=("mean", [row["mean"] for row in rows.values()]),
        marks={task: [row["per_task"][task] for row in rows.values()] for task in tasks},
        intervals=[tuple(row["interval"]) for row in rows.values()],
        x=f"accuracy, %, and mean with 95 % interval ({content['protocol']} protocol{note})",
    )
    paper.save(chart, path)


def save_accuracies(table: Table, path: Path, title: str, gap: int) -> None:
    """Draw a table of percentages as a coloured one.

    Args:
        table: Its first column names the rows.
        path: A ``.png``, ``.svg`` or ``.pdf`` file, written atomically.
        title: Above it.
        gap: Number of columns of accuracies that stand apart from those after them.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    lines = [[*cells[:gap], "", *cells[gap:]] for _, *cells in (table.header, *table.rows)]
    values = [[float(cell) if cell else None for cell in cells] for cells in lines[1:]]
    chart = HeatMap(
        key="accuracies", title=title, text="Accuracies in percent.", rows=[name for name, *_ in table.rows],
        panels=[Panel(title, lines[0], values)], value="accuracy, %", column="", shows_values=True, digits=1,
    )  # fmt: skip
    paper.save(chart, path)
