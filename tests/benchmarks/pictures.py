"""Lines side by side, for the pictures of docs/benchmarks.md."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adamerge.results.report.charts import COLORS
from adamerge.system.files import atomic_path

_MARKERS = "o^sDvP*X"


def save_lines(
    panels: Mapping[str, Mapping[str, Mapping[float, float]]],
    path: Path,
    *,
    x: str,
    y: str,
    low: float | None = None,
    ticks: Mapping[float, str] | None = None,
) -> None:
    """Draw lines side by side, the same colour for the same name, with one legend and one vertical scale.

    Args:
        panels: Title to line to its points, position to value.
        path: A ``.png``, ``.svg`` or ``.pdf`` file, written atomically.
        x: Name of the positions.
        y: Name of the values.
        low: Where the vertical scale begins; lines leave the picture below it. Default: at the lowest value.
        ticks: Position to what is written there; the scale is logarithmic then. Default: the positions themselves.
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
            color, marker = COLORS[number % len(COLORS)], _MARKERS[number % len(_MARKERS)]
            (handles[name],) = axes.plot(
                list(points), list(points.values()), color=color, marker=marker, markersize=5, alpha=0.9
            )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(x)
        if ticks is not None:
            axes.set_xscale("log", base=2)
            axes.set_xticks(list(ticks), list(ticks.values()))
            axes.minorticks_off()
        else:
            axes.set_xticks(sorted({position for points in lines.values() for position in points}))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6")
        axes.set_axisbelow(True)
    figure.axes[0].set_ylabel(y)
    figure.axes[0].set_ylim(bottom=low)
    figure.legend(list(handles.values()), list(handles), loc="outside right center", frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."), dpi=100)
