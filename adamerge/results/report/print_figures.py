"""Charts by matplotlib, as PDF, SVG or PNG, for papers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adamerge.errors import InputError
from adamerge.results.numbers import decimal
from adamerge.results.report import comparison_page, run_page
from adamerge.results.report.charts import COLORS, QUIET, Bars, Chart, Heat, Lines
from adamerge.results.report.facts import Run
from adamerge.system.files import atomic_path, ensure_writable

_STYLES = ("-", "--", ":", "-.")
_MARKERS = "oDs*^P"
_COLUMN = 7.0  # inches
_MAPS = {"sequential": "Blues", "diverging": "RdBu"}


def save_figures(runs: Sequence[Run], folder: Path, suffix: str) -> list[Path]:
    """Write each figure of the page of these runs into a file of its own; the same bytes each time.

    Args:
        runs: One, or several to compare.
        folder: Made if needed.
        suffix: ``pdf``, ``svg`` or ``png``.

    Returns:
        The files.

    Raises:
        InputError: If matplotlib is missing, or the folder is not writable.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise InputError('Figures as files need the package matplotlib: pip install "adamerge[report]".') from error
    ensure_writable(folder)
    sections = run_page.sections(runs[0]) if len(runs) == 1 else comparison_page.sections(runs)
    charts = [block for section in sections for block in section.blocks if isinstance(block, Chart)]
    paths = []
    # Names are shown as they are (parse_math), text stays text in a PDF, and nothing in a file tells when it was made.
    style: Any = {"pdf.fonttype": 42, "svg.hashsalt": "adamerge", "text.parse_math": False, "font.size": 9}
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": None}[suffix]
    with mpl.rc_context(style):
        for chart in charts:
            path = folder / f"{chart.key}.{suffix}"
            with atomic_path(path) as temporary:
                _draw(chart).savefig(temporary, format=suffix, dpi=200, metadata=undated)
            paths.append(path)
    return paths


def _draw(chart: Chart) -> Any:
    if isinstance(chart, Heat):
        return _heat(chart)
    if isinstance(chart, Lines):
        return _lines(chart)
    assert isinstance(chart, Bars)
    return _bars(chart)


def _figure(height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_COLUMN, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _lines(chart: Lines) -> Any:
    figure = _figure(3.2)
    axes = figure.add_subplot()
    loud = [name for name in chart.series if name not in chart.quiet]
    for name, (xs, ys) in chart.series.items():
        number = loud.index(name) if name in loud else 0
        look: dict[str, Any] = {"color": COLORS[number % len(COLORS)], "linestyle": _STYLES[number // len(COLORS) % 4]}
        if name in chart.quiet:
            look = {"color": QUIET, "linestyle": ":"}
        axes.plot(xs, ys, label=_shown(name), linewidth=1.4, marker="o" if len(xs) == 1 else None, **look)
    axes.set(xlabel=chart.x, ylabel=chart.y, yscale="log" if chart.is_log else "linear")
    if chart.ticks:
        axes.set_xticks(list(chart.ticks), list(chart.ticks.values()))
    axes.grid(axis="y", color="#e6e6e6")
    axes.spines[["top", "right"]].set_visible(False)
    if len(chart.series) > 1:
        figure.legend(loc="outside upper left", ncols=5, frameon=False, fontsize=8)
    return figure


def _heat(chart: Heat) -> Any:
    count, low_high = len(chart.rows), chart.limits()
    figure = _figure(0.7 + len(chart.panels) * (0.45 + 0.17 * count))
    grid = figure.subplots(len(chart.panels), 1, squeeze=False)[:, 0]
    for axes, panel in zip(grid, chart.panels, strict=True):
        values = [[float("nan") if value is None else value for value in row] for row in panel.values]
        image = axes.imshow(
            values, aspect="auto", cmap=_MAPS[chart.scale], vmin=low_high[0], vmax=low_high[1], interpolation="none"
        )
        ticks = dict(panel.ticks) or dict(enumerate(panel.columns))
        step = -(-len(ticks) // 16)
        shown = dict(list(ticks.items())[::step])
        axes.set_xticks(list(shown), [_shown(name) for name in shown.values()])
        axes.set_yticks(range(count), [_shown(name) for name in chart.rows])
        axes.set_title(panel.title, loc="left", fontsize=9)
        axes.tick_params(length=0)
        if chart.shows_values:
            for at, row in enumerate(panel.values):
                for column, value in enumerate(row):
                    if value is not None:
                        ink = _ink(image.cmap(image.norm(value)))
                        axes.text(column, at, decimal(value, 2), ha="center", va="center", color=ink, fontsize=7)
    grid[-1].set_xlabel("block" if chart.panels[-1].ticks else chart.column)
    figure.colorbar(image, ax=list(grid), label=chart.value, pad=0.01)
    return figure


def _bars(chart: Bars) -> Any:
    figure = _figure(0.9 + max(0.3, 0.08 * len(chart.marks)) * len(chart.categories))
    axes = figure.add_subplot()
    places, colors, lanes = range(len(chart.categories)), chart.colors(), chart.lanes()
    if chart.bar:
        name, values = chart.bar
        shares = [100 * value for value in values]
        axes.barh(places, shares, height=0.8, color=colors[name], alpha=0.6, label=_shown(name))
    for number, (name, values) in enumerate(chart.marks.items()):
        marker = _MARKERS[number % len(_MARKERS)]
        axes.plot(
            [100 * value for value in values], [place + lanes[name] for place in places], linestyle="",
            marker=marker, color=colors[name], label=_shown(name), markersize=10 if marker == "*" else 6,
            markeredgecolor="white", markeredgewidth=0.7,
        )  # fmt: skip
    axes.set_yticks(places, [_shown(name) for name in chart.categories])
    axes.set_ylim(len(places) - 0.4, -0.6)
    axes.set_xlabel("accuracy, %")
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
    short = name if len(name) <= 28 else f"{name[:18]}…{name[-9:]}"
    return f" {short}" if short.startswith("_") else short
