"""Charts by matplotlib: files for papers and model cards, and pixels for loggers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adamerge.results.numbers import decimal
from adamerge.results.report.charts import BarChart, Chart, HeatMap, LineChart, short
from adamerge.system.files import atomic_path

Image = np.ndarray[Any, np.dtype[np.uint8]]

_STYLES = ("-", "--", ":", "-.")
_MARKERS = "oDs*^P"
_COLUMN = 7.0  # inches
_MAPS = {"sequential": "Blues", "diverging": "RdBu"}
# Names are shown as they are (parse_math), text stays text in a PDF, and nothing in a file tells when it was made.
_SETTINGS: Any = {"pdf.fonttype": 42, "svg.hashsalt": "adamerge", "text.parse_math": False, "font.size": 9}
_UNDATED = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": None}


def save(chart: Chart, path: Path) -> None:
    """Write a chart, atomically; the same bytes each time.

    Args:
        chart: What it shows.
        path: A ``.png``, ``.svg`` or ``.pdf`` file.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    import matplotlib as mpl

    suffix = path.suffix.removeprefix(".")
    with mpl.rc_context(_SETTINGS):
        figure = draw(chart)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format=suffix, dpi=150, metadata=_UNDATED[suffix])


def pixels(chart: Chart) -> Image:
    """Return a chart's pixels (height, width, 3), 8 bits each."""
    import matplotlib as mpl

    with mpl.rc_context(_SETTINGS):
        canvas = draw(chart).canvas
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw(chart: Chart) -> Any:
    """Return a chart as a figure of matplotlib's."""
    if isinstance(chart, HeatMap):
        return _heat_map(chart)
    if isinstance(chart, LineChart):
        return _lines(chart)
    assert isinstance(chart, BarChart)
    return _bars(chart)


def _figure(height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_COLUMN, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _lines(chart: LineChart) -> Any:
    figure = _figure(3.2)
    axes = figure.add_subplot()
    for name, (color, style) in chart.looks().items():
        xs, ys = chart.series[name]
        marker = "o" if len(xs) == 1 else None
        axes.plot(xs, ys, label=_shown(name), linewidth=1.4, marker=marker, color=color, linestyle=_STYLES[style])
    axes.set(xlabel=chart.x, ylabel=chart.y, yscale="log" if chart.is_log else "linear")
    if chart.ticks:
        axes.set_xticks(list(chart.ticks), list(chart.ticks.values()))
    axes.grid(axis="y", color="#e6e6e6")
    axes.spines[["top", "right"]].set_visible(False)
    if len(chart.series) > 1:
        figure.legend(loc="outside upper left", ncols=5, frameon=False, fontsize=8)
    return figure


def _heat_map(chart: HeatMap) -> Any:
    count, (low, high) = len(chart.rows), chart.limits()
    figure = _figure(0.7 + len(chart.panels) * (0.45 + 0.17 * count))
    grid = figure.subplots(len(chart.panels), 1, squeeze=False)[:, 0]
    for axes, panel in zip(grid, chart.panels, strict=True):
        values = [[float("nan") if value is None else value for value in row] for row in panel.values]
        image = axes.imshow(values, aspect="auto", cmap=_MAPS[chart.scale], vmin=low, vmax=high, interpolation="none")
        ticks = panel.shown_ticks(16)
        longest = max(map(len, ticks.values()), default=0)
        turned = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if longest * len(ticks) > 80 else {}
        axes.set_xticks(list(ticks), [_shown(name) for name in ticks.values()], **turned)
        axes.set_yticks(range(count), [_shown(name) for name in chart.rows])
        axes.set_title(panel.title, loc="left", fontsize=9)
        axes.tick_params(length=0)
        if chart.shows_values:
            _write_values(axes, image, panel.values, chart.digits)
    grid[-1].set_xlabel("block" if chart.panels[-1].ticks else chart.column)
    figure.colorbar(image, ax=list(grid), label=chart.value, pad=0.01)
    return figure


def _write_values(axes: Any, image: Any, values: Sequence[Sequence[float | None]], digits: int) -> None:
    for at, row in enumerate(values):
        for column, value in enumerate(row):
            if value is not None:
                ink = _ink(image.cmap(image.norm(value)))
                axes.text(column, at, decimal(value, digits), ha="center", va="center", color=ink, fontsize=7)


def _bars(chart: BarChart) -> Any:
    figure = _figure(0.9 + max(0.3, 0.08 * len(chart.marks)) * len(chart.categories))
    axes = figure.add_subplot()
    places, colors, lanes = range(len(chart.categories)), chart.colors(), chart.lanes()
    if chart.bar:
        name, values = chart.bar
        shares = [100 * value for value in values]
        axes.barh(places, shares, height=0.8, color=colors[name], alpha=0.6, label=_shown(name))
        for place, (low, high), share in zip(places, chart.intervals, shares, strict=False):
            ends = [100 * low, 100 * high]
            axes.plot(ends, [place, place], color="black", linewidth=1.5, marker="|", label="_interval")
            axes.text(max(101, *ends), place, decimal(share, 1), va="center", fontweight="bold", clip_on=False)
    for number, (name, values) in enumerate(chart.marks.items()):
        marker = _MARKERS[number % len(_MARKERS)]
        axes.plot(
            [100 * value for value in values], [place + lanes[name] for place in places], linestyle="",
            marker=marker, color=colors[name], label=_shown(name), markersize=10 if marker == "*" else 6,
            markeredgecolor="white", markeredgewidth=0.7,
        )  # fmt: skip
    axes.set_yticks(places, [_shown(name) for name in chart.categories])
    axes.set_ylim(len(places) - 0.4, -0.6)
    axes.set_xlim(0, 101)
    axes.set_xlabel(chart.x)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#e6e6e6")
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper left", ncols=4, frameon=False, fontsize=8)
    return figure


def _ink(fill: Sequence[float]) -> str:
    """Return the colour of letters that can be read on a fill (red, green, blue, ... in [0, 1])."""
    return "white" if 0.3 * fill[0] + 0.59 * fill[1] + 0.11 * fill[2] < 0.55 else "black"


def _shown(name: str) -> str:
    """Return a name for a legend or an axis; one that begins with _ would be left out of a legend."""
    text = short(name)
    return f" {text}" if text.startswith("_") else text
