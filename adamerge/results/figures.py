"""Pictures of results, with matplotlib (extra ``demo``)."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adamerge.system.files import atomic_path

_COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#997700", "#004488")  # Tol, bright
_MARKERS = "o^sDvP*X"


def save_comparison(content: Mapping[str, Any], path: Path) -> None:
    """Draw a summary as a dot plot: per row the mean accuracy with its 95 % interval, and each task.

    Args:
        content: What ``summary.json`` holds.
        path: A ``.png``, ``.svg`` or ``.pdf`` file, written atomically.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, tasks = content["rows"], content["tasks"]
    names = list(rows)
    positions = range(len(names))
    figure = Figure(figsize=(9, 0.42 * len(names) + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.hlines(positions, 0, 100, color="#e6e6e6", linewidth=1, zorder=0)
    for number, task in enumerate(tasks):
        values = [100 * rows[name]["per_task"][task] for name in names]
        color, marker = _COLORS[number % len(_COLORS)], _MARKERS[number % len(_MARKERS)]
        axes.plot(values, positions, linestyle="", markersize=6, alpha=0.8, label=task, color=color, marker=marker)
    means = [100 * rows[name]["mean"] for name in names]
    low, high = ([100 * rows[name]["interval"][side] for name in names] for side in (0, 1))
    errors = [[abs(m - x) for m, x in zip(means, side, strict=True)] for side in (low, high)]
    axes.errorbar(means, positions, xerr=errors, fmt="|k", markersize=15, markeredgewidth=2.5, capsize=3, label="mean")
    for position, mean in zip(positions, means, strict=True):
        axes.text(101, position, f"{mean:.1f}", va="center", fontweight="bold", clip_on=False)
    axes.set_yticks(positions, [_wrapped(name) + (" *" if rows[name]["uses_labels"] else "") for name in names])
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_color("#777777" if rows[name]["uses_labels"] else "black")
    axes.set_ylim(len(names) - 0.4, -0.6)
    smallest = min(*low, *(100 * value for row in rows.values() for value in row["per_task"].values()))
    axes.set_xlim(max(0, 5 * int(smallest / 5) - 5), 100.5)
    note = ", * uses labels" if any(row["uses_labels"] for row in rows.values()) else ""
    axes.set_xlabel(f"accuracy, %, and mean with 95 % interval ({content['protocol']} protocol{note})")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(tasks) + 1, frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."), dpi=150)


def save_coefficients(
    experts: Sequence[str], names: Sequence[str], values: Sequence[Sequence[float]], path: Path
) -> None:
    """Draw coefficients as a picture: an expert a row, a parameter or group a column.

    Args:
        experts: Of the rows.
        names: Of the columns, in the model's order; only some are written where there are many.
        values: (E, names).
        path: A ``.png``, ``.svg`` or ``.pdf`` file, written atomically.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = min(12.0, max(4.0, 0.12 * len(names) + 2.5))
    figure = Figure(figsize=(width, 0.32 * len(experts) + 2.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    low, high = min(map(min, values)), max(map(max, values))
    limit = max(abs(low), abs(high), 1e-12)
    low = -limit if low < 0 else 0.0  # white is no contribution, whatever the range
    image = axes.imshow(values, aspect="auto", cmap="RdBu_r" if low < 0 else "Blues", vmin=low, vmax=limit)
    axes.set_yticks(range(len(experts)), list(map(_wrapped, experts)))
    step = max(1, math.ceil(len(names) / 24))
    shown = range(0, len(names), step)
    axes.set_xticks(shown, [names[i] for i in shown], rotation=90, fontsize=6)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="coefficient", shrink=0.9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."), dpi=130)


def save_lines(
    panels: Mapping[str, Mapping[str, Mapping[float, float]]], path: Path, *, x: str, y: str, low: float | None = None
) -> None:
    """Draw lines side by side, the same colour for the same name, with one legend and one vertical scale.

    Args:
        panels: Title to line to its points, position to value.
        path: A ``.png``, ``.svg`` or ``.pdf`` file, written atomically.
        x: Name of the positions.
        y: Name of the values.
        low: Where the vertical scale begins; lines leave the picture below it. Default: at the lowest value.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(panels) + 2.4, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    handles: dict[str, Any] = {}
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, lines) in zip(grid, panels.items(), strict=True):
        for name, points in lines.items():
            number = names.index(name)
            color, marker = _COLORS[number % len(_COLORS)], _MARKERS[number % len(_MARKERS)]
            (handles[name],) = axes.plot(
                list(points), list(points.values()), color=color, marker=marker, markersize=5, alpha=0.9
            )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(x)
        axes.set_xticks(sorted({position for points in lines.values() for position in points}))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6")
        axes.set_axisbelow(True)
    figure.axes[0].set_ylabel(y)
    figure.axes[0].set_ylim(bottom=low)
    figure.legend(list(handles.values()), list(handles), loc="outside right center", frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."), dpi=100)


def save_heat_map(
    columns: Sequence[str], rows: Mapping[str, Sequence[float | None]], path: Path, *, title: str, gap: int
) -> None:
    """Draw percentages as a coloured table, each with its number.

    Args:
        columns: Their names.
        rows: Name to a value for each column; None leaves a cell white.
        path: A ``.png``, ``.svg`` or ``.pdf`` file, written atomically.
        title: Above it.
        gap: Column before which a line divides the table.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.85 * len(columns) + 2.2, 0.42 * len(rows) + 2.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values = [[float("nan") if value is None else value for value in row] for row in rows.values()]
    axes.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value == value:  # no NaN
                axes.text(x, y, f"{value:.1f}", ha="center", va="center", color="white" if value < 65 else "black")
    axes.axvline(gap - 0.5, color="white", linewidth=4)
    axes.set_yticks(range(len(rows)), list(map(_wrapped, rows)))
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right", rotation_mode="anchor")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=10, loc="left")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."), dpi=110)


def _wrapped(name: str) -> str:
    """Return a name in at most two lines, so that a long one leaves room for what it names."""
    return "\n".join(textwrap.wrap(name, 40, max_lines=2, placeholder=" …")) or name
