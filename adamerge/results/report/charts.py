"""What a figure shows, apart from how it is drawn, and as a table for those who cannot see it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from adamerge.results.numbers import number, percent
from adamerge.results.table import Table

# Mid-tones that stand out on white and on near-black.
COLORS = ("#3b82c4", "#e0566b", "#2e9e6b", "#c98a12", "#9b6bd3", "#1a9fb3", "#d0668f", "#7d8f2a", "#a06a45", "#5f7d95")
QUIET = "#8b95a3"
_REFERENCES = {  # look the same in every figure
    "pretrained": QUIET,
    "experts": COLORS[2],
    "task_arithmetic_0.3": COLORS[3],
    "weight_average": COLORS[4],
}
_LONGEST = 28  # characters of a name in a figure; tables have it whole
Cell = float | None
_MOST_CELLS = 4000  # of a table that stands for a heat map


@dataclass(frozen=True)
class Chart(ABC):
    """What all figures have.

    Attributes:
        key: Short name, for files and anchors.
        title: Title of the figure.
        text: What it shows and how to read it, a sentence or two.
    """

    key: str
    title: str
    text: str
    block: ClassVar[str] = "chart"

    @property
    def alternative(self) -> str:
        """What the figure shows, for those who cannot see it."""
        return f"{self.title}. {self.text} The numbers are in the table that follows."

    @abstractmethod
    def table(self) -> Table:
        """Return the figure's numbers."""


@dataclass(frozen=True)
class LineChart(Chart):
    """Lines over a common axis.

    Attributes:
        series: Name to positions and values.
        x: What the positions are.
        y: What the values are.
        is_log: Whether the vertical axis is logarithmic.
        quiet: Names of lines that are context.
        hidden: Names of lines that only the table has.
        ticks: Positions to name, where they are not numbers.
    """

    series: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    x: str = "step"
    y: str = ""
    is_log: bool = False
    quiet: frozenset[str] = frozenset()
    hidden: frozenset[str] = frozenset()
    ticks: Mapping[float, str] = field(default_factory=dict)

    def looks(self) -> dict[str, tuple[str, int]]:
        """Return the colour of each line that is drawn, and the number of its style: 0 is solid, 2 is dotted."""
        loud = [name for name in self.series if name not in self.quiet]
        looks = {name: (COLORS[at % len(COLORS)], at // len(COLORS) % 4) for at, name in enumerate(loud)}
        return {name: looks.get(name, (QUIET, 2)) for name in self.series if name not in self.hidden}

    def table(self) -> Table:
        """Return where each line begins and ends, and its extremes."""
        rows = [
            [name, number(ys[0]), number(ys[-1]), number(min(ys)), number(max(ys))]
            for name, (_, ys) in self.series.items()
        ]
        return Table(["", "first", "last", "lowest", "highest"], rows, f"{self.title}: {self.y}")


@dataclass(frozen=True)
class Panel:
    """A part of a heat map: columns, and values (rows x columns).

    Attributes:
        ticks: Column number to a shorter name for the axis; empty for all columns' own names.
    """

    title: str
    columns: Sequence[str]
    values: Sequence[Sequence[Cell]]
    ticks: Mapping[int, str] = field(default_factory=dict)

    def shown_ticks(self, most: int) -> dict[int, str]:
        """Return at most so many columns and their names for the axis."""
        ticks = list((self.ticks or dict(enumerate(self.columns))).items())
        return dict(ticks[:: max(1, -(-len(ticks) // most))])


@dataclass(frozen=True)
class HeatMap(Chart):
    """Heat maps with the same rows and the same scale, one below the other.

    Attributes:
        scale: ``"sequential"`` from the lowest to the highest value, or ``"diverging"`` around 0.
        shows_values: Whether the values are written into the cells, with ``digits`` decimals.
        reaches: Ends that a diverging scale may have, ascending, of which the first that holds all values counts; so
            that noise around 0 does not look like extremes.
    """

    rows: Sequence[str]
    panels: Sequence[Panel]
    value: str
    column: str
    scale: str = "sequential"
    shows_values: bool = False
    digits: int = 2
    reaches: Sequence[float] = ()

    def table(self) -> Table:
        """Return the values, columns down the page; of maps with very many cells the means of the panels."""
        cells = len(self.rows) * sum(len(panel.columns) for panel in self.panels)
        header = [self.column, *self.rows]
        if cells > _MOST_CELLS:
            rows = [[p.title, *(number(_mean(row)) for row in p.values)] for p in self.panels]
            return Table(header, rows, f"{self.title}: mean {self.value}")
        rows = [
            [column, *(number(row[at]) for row in panel.values)]
            for panel in self.panels
            for at, column in enumerate(panel.columns)
        ]
        return Table(header, rows, f"{self.title}: {self.value}")

    def limits(self) -> tuple[float, float]:
        """Return the ends of the colour scale."""
        numbers = [value for panel in self.panels for row in panel.values for value in row if value is not None]
        low, high = (min(numbers), max(numbers)) if numbers else (0.0, 1.0)
        if self.scale == "diverging":
            high = max(abs(low), abs(high))
            high = next((reach for reach in self.reaches if reach >= high), high)
            low = -high
        return (low, high) if high > low else (low - 0.5, high + 0.5)


@dataclass(frozen=True)
class BarChart(Chart):
    """Accuracies by task: a bar for what the page is about, marks for what it is compared with.

    Attributes:
        categories: Names of the tasks.
        bar: Name and values in [0, 1], or None.
        marks: Name to values in [0, 1].
        intervals: Ends in [0, 1] of the interval of each bar; empty for none.
        x: The quantity that the values are of.
    """

    categories: Sequence[str]
    bar: tuple[str, Sequence[float]] | None
    marks: Mapping[str, Sequence[float]]
    intervals: Sequence[tuple[float, float]] = ()
    x: str = "accuracy, %"

    def table(self) -> Table:
        """Return all values, in percent."""
        every = {**({self.bar[0]: self.bar[1]} if self.bar else {}), **self.marks}
        rows = [[name, *(percent(values[at]) for values in every.values())] for at, name in enumerate(self.categories)]
        return Table(["task", *every], rows, f"{self.title}, %")

    def colors(self) -> dict[str, str]:
        """Return the colour of the bar and of each mark, by name: what runs are compared with has its own."""
        names = [*([self.bar[0]] if self.bar else []), *self.marks]
        shown = {name: _REFERENCES[name] for name in names if name in _REFERENCES}
        free = [color for color in COLORS if color not in shown.values()]
        others = [name for name in names if name not in shown]
        return {**shown, **{name: free[number % len(free)] for number, name in enumerate(others)}}

    def lanes(self) -> dict[str, float]:
        """Return how far from the middle of its row each mark is drawn, in rows, so that equal values are all seen."""
        step = min(0.2, 0.8 / max(1, len(self.marks)))
        return {name: (number - (len(self.marks) - 1) / 2) * step for number, name in enumerate(self.marks)}


def short(name: str) -> str:
    """Return a name, of a long one its start and its end."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 10]}…{name[-9:]}"


def scale_of(low: float, high: float) -> str:
    """Return the colour scale of values from low to high: around 0 where some are negative, but for rounding."""
    return "diverging" if low < -0.01 * abs(high) else "sequential"


def _mean(values: Sequence[Cell]) -> Cell:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None
