"""Charts by matplotlib: SVG for the page, files for papers and model cards, and pixels for loggers."""

import html
import io
import itertools
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adamerge.results.numbers import decimal, number
from adamerge.results.report.charts import BarChart, Chart, HeatMap, LineChart, short
from adamerge.system.files import atomic_path

log = logging.getLogger(__name__)

Image = np.ndarray[Any, np.dtype[np.uint8]]

_STYLES = ("-", "--", ":", "-.")
_MARKERS = "oDs*^P"
_COLUMN = 7.0  # inches
_PAGE = 11.0  # inches, as wide as the page shows it
_MAPS = {"sequential": "Blues", "diverging": "RdBu"}
_INK, _GRID, _CARD = "#1f2733", "#dde3ea", "#fefefe"
_THEME = {_INK: "var(--ink)", _GRID: "var(--line)", _CARD: "var(--card)"}  # a colour in files, and that of the page
# Names are shown as they are (parse_math), text stays text, and nothing in a file tells when it was made.
_SETTINGS: Any = {
    "pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "adamerge", "text.parse_math": False, "font.size": 9,
    "grid.color": _GRID,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}  # fmt: skip
_UNDATED = {"pdf": {"CreationDate": None}, "svg": dict.fromkeys(("Creator", "Date", "Format", "Type")), "png": None}


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


def save_if_possible(chart: Chart, path: Path) -> bool:
    """Write a chart as :func:`save` does; where matplotlib is not installed, warn, and return False."""
    try:
        save(chart, path)
    except ImportError:
        log.warning('No %s: matplotlib is not installed (pip install "adamerge[report]").', path.name)
        return False
    return True


def svg(chart: Chart) -> str:
    """Return a chart as an element of a page, in the colours of its theme; cells of heat maps tell what they show.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    file = io.StringIO()
    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": chart.key}):  # names of shapes are those of one chart
        figure = draw(chart, _PAGE)
        for drawn in (figure, *figure.axes):
            drawn.patch.set_visible(False)
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(file, metadata=_UNDATED["svg"])
    text = file.getvalue()
    text = re.sub("|".join(_THEME), lambda match: _THEME[match[0]], text[text.index("<svg") :])
    if isinstance(chart, HeatMap):
        text = _with_hints(text, chart)
    return re.sub(r'<g id="[^"]*"', "<g", text)


def _with_hints(text: str, chart: HeatMap) -> str:
    """Give each cell of a heat map a title, which browsers show beside the pointer."""
    for at, panel in enumerate(chart.panels):
        start = text.index(f'<g id="cells-{at}"')
        stop = text.index("</g>", start)
        hints = (
            html.escape(f"{name}, {column}: {chart.value} {number(value)}")
            for name, row in zip(chart.rows, panel.values, strict=True)
            for column, value in zip(panel.columns, row, strict=True)
        )
        paths = text[start:stop].split("/>")[:-1]  # one for each cell, row by row
        cells = [f"{path}><title>{hint}</title></path>" for path, hint in zip(paths, hints, strict=True)]
        text = text[:start] + "".join(cells) + text[stop:]
    return text


def pixels(chart: Chart) -> Image:
    """Return a chart's pixels (height, width, 3), 8 bits each."""
    import matplotlib as mpl

    with mpl.rc_context(_SETTINGS):
        canvas = draw(chart).canvas
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw(chart: Chart, width: float = _COLUMN) -> Any:
    """Return a chart as a figure of matplotlib's, so many inches wide."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    if isinstance(chart, HeatMap):
        height = _heat_map(figure, chart)
    elif isinstance(chart, LineChart):
        height = _lines(figure, chart)
    else:
        assert isinstance(chart, BarChart)
        height = _bars(figure, chart)
    figure.set_size_inches(width, height)
    return figure


def _lines(figure: Any, chart: LineChart) -> float:
    axes = figure.add_subplot()
    for name, (color, style) in chart.looks().items():
        xs, ys = chart.series[name]
        marker = "o" if len(xs) == 1 else None
        axes.plot(xs, ys, label=_shown(name), linewidth=1.4, marker=marker, color=color, linestyle=_STYLES[style])
    axes.set(xlabel=chart.x, ylabel=chart.y, yscale="log" if chart.is_log else "linear")
    if chart.ticks:
        axes.set_xticks(list(chart.ticks), list(chart.ticks.values()))
    axes.grid(axis="y")
    axes.spines[["top", "right"]].set_visible(False)
    if len(chart.looks()) > 1:
        figure.legend(loc="outside upper left", ncols=5, frameon=False, fontsize=8)
    return 3.2


def _heat_map(figure: Any, chart: HeatMap) -> float:
    count, (low, high) = len(chart.rows), chart.limits()
    height = 0.7 + len(chart.panels) * (0.45 + 0.17 * count)
    grid = figure.subplots(len(chart.panels), 1, squeeze=False)[:, 0]
    for at, (axes, panel) in enumerate(zip(grid, chart.panels, strict=True)):
        values = np.ma.masked_invalid(np.array(panel.values, dtype=float))
        cells = axes.pcolormesh(
            values, cmap=_MAPS[chart.scale], vmin=low, vmax=high, edgecolors=_CARD, linewidth=0.5, gid=f"cells-{at}"
        )
        ticks = panel.shown_ticks(16)
        names = [_shown(name) for name in ticks.values()]
        longest = max(map(len, names), default=0)
        is_turned = longest * len(ticks) > 80
        turned = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if is_turned else {}
        axes.set_xticks([column + 0.5 for column in ticks], names, **turned)
        height += 0.04 * longest * is_turned
        axes.set_yticks([row + 0.5 for row in range(count)], [_shown(name) for name in chart.rows])
        axes.invert_yaxis()
        axes.set_title(panel.title, loc="left", fontsize=9)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if chart.shows_values:
            _write_values(axes, cells, panel.values, chart.digits)
    grid[-1].set_xlabel("block" if chart.panels[-1].ticks else chart.column)
    figure.colorbar(cells, ax=list(grid), label=chart.value, pad=0.01)
    return height


def _write_values(axes: Any, cells: Any, values: Sequence[Sequence[float | None]], digits: int) -> None:
    for at, row in enumerate(values):
        for column, value in enumerate(row):
            if value is not None:
                ink = _ink(cells.cmap(cells.norm(value)))
                axes.text(
                    column + 0.5, at + 0.5, decimal(value, digits), ha="center", va="center", color=ink, fontsize=7
                )


def _bars(figure: Any, chart: BarChart) -> float:
    axes = figure.add_subplot()
    places, colors, lanes = range(len(chart.categories)), chart.colors(), chart.lanes()
    if chart.bar:
        name, values = chart.bar
        shares = [100 * value for value in values]
        axes.barh(places, shares, height=0.8, color=colors[name], alpha=0.6, label=_shown(name))
        for place, (low, high), share in zip(places, chart.intervals, shares, strict=False):
            ends = [100 * low, 100 * high]
            axes.plot(ends, [place, place], color=_INK, linewidth=1.5, marker="|", label="_interval")
            axes.text(max(101, *ends), place, decimal(share, 1), va="center", fontweight="bold", clip_on=False)
    for (name, values), marker in zip(chart.marks.items(), itertools.cycle(_MARKERS), strict=False):
        axes.plot(
            [100 * value for value in values], [place + lanes[name] for place in places], linestyle="",
            marker=marker, color=colors[name], label=_shown(name), markersize=10 if marker == "*" else 6,
            markeredgecolor=_CARD, markeredgewidth=0.7,
        )  # fmt: skip
    axes.set_yticks(places, [_shown(name) for name in chart.categories])
    axes.set(ylim=(len(places) - 0.4, -0.6), xlim=(0, 101), xlabel=chart.x)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper left", ncols=4, frameon=False, fontsize=8)
    return 0.9 + max(0.3, 0.08 * len(chart.marks)) * len(chart.categories)


def _ink(fill: Sequence[float]) -> str:
    """Return the colour of letters that can be read on a fill (red, green, blue, ... in [0, 1])."""
    return "white" if 0.3 * fill[0] + 0.59 * fill[1] + 0.11 * fill[2] < 0.55 else "black"


def _shown(name: str) -> str:
    """Return a name for a legend or an axis; one that begins with _ would be left out of a legend."""
    text = short(name)
    return f" {text}" if text.startswith("_") else text
