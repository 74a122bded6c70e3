"""The figures of one run, from what is known of it; a figure whose facts are missing is None."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from adamerge.results.report.charts import BarChart, Cell, HeatMap, LineChart, Panel, scale_of
from adamerge.results.report.facts import Learned, Run, Series, Values
from adamerge.results.report.places import KINDS, are_parameters, by_depth, place_of

_POINTS = 200  # of a line; more would not be seen
_BINS = 60
_FEW = 9  # tensors that share a panel
_MOST_VALUES = 12  # rows of a matrix whose cells have room for their values
Points = tuple[list[float], list[float]]


def accuracies(run: Run) -> BarChart | None:
    """Accuracy by task: the run's, beside those of base, task arithmetic and experts."""
    rows, own = run.summary.get("rows", {}), run.own_row
    if own is None:
        return None
    tasks = run.summary["tasks"]
    shares = {name: [row["per_task"][task] for task in tasks] for name, row in rows.items()}
    marks = {name: values for name, values in shares.items() if name != own}
    known = [name for name in marks if not rows[name].get("uses_labels")]
    few = [*known[:1], *known[1:][-3:]]  # the first is the pretrained model, the last the experts
    return BarChart(
        key="accuracies",
        title="Accuracy by task",
        text="Bars: the merged checkpoint. Marks: what it is compared with, on the same images.",
        categories=tasks,
        bar=(own, shares[own]),
        marks={name: marks[name] for name in marks if name in few},
    )


def coefficients(run: Run) -> HeatMap | None:
    """Coefficients by expert and depth, where there are several of an expert."""
    learned = run.learned
    if learned is None or (len(learned.values) == 1 and not learned.is_fine):
        return None
    return coefficient_map(learned)


def coefficient_map(learned: Learned) -> HeatMap:
    """Coefficients by expert and depth, attention, MLP and norms apart; means where a tensor has several."""
    text = "One row per expert, depth from left to right, one panel per kind of layer; hover for names and values."
    text += " A cell is the mean over a tensor's coefficients." if learned.is_fine else ""
    means = [array.mean(1) for array in learned.values.values()]
    return HeatMap(
        key="coefficients",
        title="Coefficients by expert and depth",
        text=text,
        rows=learned.experts,
        panels=_panels(learned, lambda values: values.mean(1)),
        value="mean coefficient" if learned.is_fine else "coefficient",
        column="parameter tensor" if are_parameters(learned.values) else "group",
        scale=scale_of(min(float(mean.min()) for mean in means), max(float(mean.max()) for mean in means)),
    )


def spread(run: Run) -> HeatMap | None:
    """How much the coefficients within each tensor differ."""
    learned = run.learned
    if learned is None or not learned.is_fine:
        return None
    return HeatMap(
        key="spread",
        title="Spread of the coefficients within each tensor",
        text="Standard deviation over a tensor's coefficients: where it is high, single rows (columns, chunks) of an "
        "expert are chosen.",
        rows=learned.experts,
        panels=_panels(learned, lambda values: values.std(1)),
        value="standard deviation",
        column="parameter tensor",
    )


def distribution(run: Run) -> LineChart | None:
    """How the coefficients of each expert are distributed, where a tensor has several."""
    learned = run.learned
    return None if learned is None or not learned.is_fine else distribution_of(learned)


def distribution_of(learned: Learned) -> LineChart:
    """How the coefficients of each expert are distributed."""
    every = np.concatenate(list(learned.values.values()), axis=1)
    low, high = (float(np.quantile(every, share)) for share in (0.002, 0.998))
    edges = np.linspace(low, high if high > low else low + 1e-6, _BINS + 1)
    centres = _rounded((edges[1:] + edges[:-1]) / 2)
    series = {}
    for expert, row in zip(learned.experts, every, strict=True):
        counts, _ = np.histogram(np.clip(row, edges[0], edges[-1]), edges)
        series[expert] = (centres, _rounded(100 * counts / row.size))
    return LineChart(
        key="distribution",
        title="Distribution of the coefficients",
        text=f"Share of each expert's {every.shape[1]:,} coefficients by value; the outermost bins hold what lies "
        "beyond.",
        series=series,
        x="coefficient",
        y="% of coefficients",
    )


def trajectories(run: Run) -> LineChart | None:
    """The mean coefficient of each expert by step, and the extremes of all."""
    means = {name: _line(series) for name, series in _in_order(run.logged("coefficient/"), run.experts).items()}
    if not means and "adapt/coefficient" in run.metrics:
        means = {"mean of all": _line(run.metrics["adapt/coefficient"])}
    extremes = {
        f"{name} of all": _line(run.metrics[key])
        for name, key in (("lowest", "adapt/coefficient/min"), ("highest", "adapt/coefficient/max"))
        if key in run.metrics
    }
    if not means:
        return None
    return LineChart(
        key="trajectories",
        title="Coefficients over the steps",
        text="Mean coefficient of each expert. Names in the legend show and hide lines: lowest and highest of all too.",
        series={**means, **extremes},
        y="coefficient",
        quiet=frozenset(extremes),
        hidden=frozenset(extremes if run.learned is not None and run.learned.is_fine else ()),
    )


def losses(run: Run) -> LineChart | None:
    """The objective by task and step."""
    found = {name: _smooth(series) for name, series in _in_order(run.logged("adapt/loss/"), run.tasks).items()}
    if "adapt/loss" in run.metrics:
        found["all"] = _smooth(run.metrics["adapt/loss"])
    if "holdout/loss" in run.metrics:
        found["held-out images"] = _line(run.metrics["holdout/loss"])
    if not found:
        return None
    return LineChart(
        key="losses",
        title="Objective by task",
        text="What is minimized, on unlabeled images; a running mean over the nearest steps.",
        series=found,
        y="objective",
        quiet=frozenset({"all"}),
    )


def unlabeled(run: Run, kind: str) -> dict[str, Series]:
    """Return a criterion that needs no label, by task: ``marginal``, ``entropy`` or ``disagreement``."""
    return _in_order(run.logged(f"unlabeled/{kind}/") or run.logged(f"guard/{kind}/"), run.tasks)


def criteria(run: Run) -> list[LineChart]:
    """What can be seen of each task without labels, by step."""
    kinds = {
        "marginal": (
            "Variety of predictions",
            "Entropy of the mean prediction, as a share of its largest value. A task that collapses into few classes "
            "falls here, whatever its loss does.",
            "entropy of the mean",
        ),
        "entropy": (
            "Uncertainty of predictions",
            "Mean entropy of the predictions, as a share of its largest value: 0 is sure, 1 is a guess.",
            "mean entropy",
        ),
        "disagreement": (
            "Disagreement with the task's expert",
            "Share of images on which merged model and expert name different classes.",
            "share of images",
        ),
    }
    charts = []
    for kind, (title, text, y) in kinds.items():
        if found := unlabeled(run, kind):
            series = {task: _line(values) for task, values in found.items()}
            charts.append(LineChart(key=kind, title=title, text=text, series=series, y=y))
    return charts


def picks(run: Run) -> HeatMap | None:
    """Frank-Wolfe: which share of the groups moved towards which vertex, by iteration."""
    found = run.logged("pick/")
    if not found:
        return None
    lines = {name: _line(series) for name, series in _in_order(found, run.experts).items()}
    steps = next(iter(lines.values()))[0]
    return HeatMap(
        key="picks",
        title="Frank-Wolfe: picks",
        text="Share of the groups that an iteration moved towards each vertex.",
        rows=list(lines),
        panels=[Panel("", [f"{step:.0f}" for step in steps], [ys for _, ys in lines.values()])],
        value="share of the groups",
        column="step",
    )


def gap(run: Run) -> LineChart | None:
    """Frank-Wolfe: the duality gap by iteration."""
    series = run.metrics.get("adapt/gap")
    if series is None:
        return None
    return LineChart(
        key="gap",
        title="Frank-Wolfe: duality gap",
        text="How far a linear loss would still fall, by iteration; noisy, as each is of one batch.",
        series={"gap": _line(series)},
        y="duality gap",
        is_log=min(series.values) > 0,
    )


def cosines(run: Run) -> HeatMap | None:
    """Cosines between the experts' task vectors."""
    matrix, names = run.pool.get("cosines"), run.experts
    if not matrix or len(matrix) != len(names):
        return None
    values: list[list[Cell]] = [
        [None if i == j else value for j, value in enumerate(row)] for i, row in enumerate(matrix)
    ]
    return HeatMap(
        key="cosines",
        title="Cosines of the task vectors",
        text="Near 0: the experts changed the base in different directions and interfere little. High: they are alike.",
        rows=names,
        panels=[Panel("", names, values)],
        value="cosine",
        column="expert",
        scale="diverging",
        shows_values=len(names) <= _MOST_VALUES,
        reaches=(0.25, 1.0),
    )


def norms(run: Run) -> LineChart | None:
    """Norms of the task vectors by block, relative to the base's."""
    by_name, base = run.pool.get("norms") or {}, run.pool.get("base_norms") or {}
    if not by_name or set(by_name) - set(base):
        return None
    blocks: dict[str, list[str]] = {}
    for name in by_depth(by_name):
        blocks.setdefault(place_of(name).block, []).append(name)
    series = {}
    for number, expert in enumerate(run.experts):
        ys = [_ratio([by_name[n][number] for n in names], [base[n] for n in names]) for names in blocks.values()]
        series[expert] = (list(map(float, range(len(blocks)))), ys)
    return LineChart(
        key="norms",
        title="Size of the task vectors by depth",
        text="Norm of each expert's change to a block, relative to the norm of the base's weights there.",
        series=series,
        x="block",
        y="relative norm",
        ticks={float(at): block for at, block in enumerate(blocks)},
    )


def _in_order(found: Mapping[str, Series], names: Sequence[str]) -> dict[str, Series]:
    """Order by known names, so that a colour means the same in all figures; CSV files are ordered by letters."""
    places = {name: at for at, name in enumerate(names)}
    return dict(sorted(found.items(), key=lambda item: places.get(item[0], len(places))))


def _ratio(changes: Sequence[float], weights: Sequence[float]) -> float:
    whole = math.hypot(*weights)
    return float(f"{math.hypot(*changes) / whole:.4g}") if whole else 0.0


def _panels(learned: Learned, statistic: Callable[[Values], Values]) -> list[Panel]:
    """Divide the labels by kind of layer, in order of depth."""
    if not are_parameters(learned.values):
        return [_panel("", by_depth(learned.values), learned, statistic, short=False)]
    kinds: dict[str, list[str]] = {}
    for name in by_depth(learned.values):
        kinds.setdefault(place_of(name).kind, []).append(name)
    rest = [name for kind in KINDS[3:] for name in kinds.get(kind, [])]
    if 0 < len(rest) < _FEW:  # a stem and a projection, say: no panel each
        kinds = {kind: names for kind, names in kinds.items() if kind in KINDS[:3]} | {"other": by_depth(rest)}
    return [_panel(kind, kinds[kind], learned, statistic, short=True) for kind in KINDS if kind in kinds]


def _panel(
    title: str, names: Sequence[str], learned: Learned, statistic: Callable[[Values], Values], *, short: bool
) -> Panel:
    """Make a panel of (E, names); where a label has several coefficients, hovering tells their range."""
    arrays = [learned.values[name] for name in names]
    ticks: dict[int, str] = {}
    if short:
        for at, name in enumerate(names):
            if (block := place_of(name).block) not in ticks.values():
                ticks[at] = block
    ranges: Mapping[str, Callable[[Values], Values]] = {
        "lowest": lambda array: array.min(1),
        "highest": lambda array: array.max(1),
        "number": lambda array: np.full(len(array), array.shape[1]),
    }
    details = {name: _by_expert(arrays, of) for name, of in ranges.items()} if learned.is_fine else {}
    return Panel(title, list(names), _by_expert(arrays, statistic), details, ticks)


def _by_expert(arrays: Sequence[Values], statistic: Callable[[Values], Values]) -> list[list[Cell]]:
    """Reduce each array (E, groups) to (E,), and return them side by side, (E, arrays)."""
    table = np.stack([statistic(array) for array in arrays], axis=1)
    return [[*_rounded(row)] for row in table]


def _rounded(values: Values) -> list[float]:
    """Four digits: what can be seen, and half the page's size."""
    return [float(f"{value:.4g}") for value in values.tolist()]


def _line(series: Series) -> Points:
    """Return at most so many points: means of neighbours where there are more."""
    count = len(series.steps)
    pieces = np.array_split(np.arange(count), min(count, _POINTS))
    steps, values = np.array(series.steps, dtype=float), np.array(series.values)
    return _rounded(np.array([steps[p].mean() for p in pieces])), _rounded(np.array([values[p].mean() for p in pieces]))


def _smooth(series: Series) -> Points:
    """Return running means over about a fortieth of the steps on both sides."""
    reach = len(series.values) // 40
    if not reach:
        return _line(series)
    values = np.array(series.values)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    at = np.arange(len(values))
    start, stop = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    return _line(Series(series.steps, ((sums[stop] - sums[start]) / (stop - start)).tolist()))
