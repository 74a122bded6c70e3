"""The figures of one run, from what is known of it; a figure whose facts are missing is None."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from adamerge.results.report.charts import BarChart, Cell, HeatMap, LineChart, Panel, scale_of
from adamerge.results.report.facts import Learned, Run, Series, Values
from adamerge.results.report.places import KINDS, are_parameters, by_depth, place_of
from adamerge.results.summary_table import marks_of

_POINTS = 200  # of a line; more would not be seen
_BINS = 60
_FEW = 9  # tensors that share a panel
_MOST_VALUES = 12  # rows of a matrix whose cells have room for their values
_CRITERIA = {  # title, text and axis of what can be seen without labels
    "marginal": (
        "Variety of predictions",
        "Entropy of the mean prediction, as a share of its largest value. A task that collapses into few classes falls "
        "here, whatever its loss does.",
        "entropy of the mean",
    ),
    "entropy": (
        "Uncertainty of predictions",
        "Mean entropy of the predictions, as a share of its largest value: 0 is sure, 1 is a guess.",
        "mean entropy",
    ),
    "disagreement": (
        "Disagreement with the task's expert",
        "Share of inputs on which merged model and expert name different classes.",
        "share of inputs",
    ),
}
Points = tuple[list[float], list[float]]


def accuracies(run: Run) -> BarChart | None:
    """Accuracy by task: the run's, beside those of base, task arithmetic and experts."""
    rows, own_row = run.summary.get("rows", {}), run.own_row
    if own_row is None:
        return None
    tasks = run.summary["tasks"]
    shares = {name: [row["per_task"][task] for task in tasks] for name, row in rows.items()}
    references = [
        name for name, row in rows.items() if name != own_row and not (row.get("uses_labels") or row.get("control"))
    ]
    few = [*references[:1], *references[1:][-3:]]  # the first is the pretrained model, the last the experts
    text = "Bars: the merged checkpoint. Marks: what it is compared with, on the same inputs."
    marks = {name: shares[name] for name in few}
    return BarChart("accuracies", "Accuracy by task", text, tasks, (own_row, shares[own_row]), marks)


def rows_by_task(summary: Mapping[str, Any]) -> HeatMap:
    """Return a heat map of accuracies in percent, rows by tasks."""
    rows, tasks = summary["rows"], [str(task) for task in summary["tasks"]]
    values = [[round(100 * row["per_task"][task], 2) for task in tasks] for row in rows.values()]
    title, text, panel = "Accuracy by row and task", "Each row's accuracy in percent.", Panel("", tasks, values)
    return HeatMap(
        "matrix", title, text, list(rows), [panel], "accuracy, %", "task", shows_values=len(tasks) <= 10, digits=1
    )


def rows_with_means(summary: Mapping[str, Any]) -> BarChart:
    """Return a bar chart of a summary: per row a bar for the mean with its 95 % interval, and a mark for each task."""
    rows, tasks = summary["rows"], summary["tasks"]
    marks, notes = marks_of(rows), {"*": "uses labels", "‡": "control"}
    note = "".join(f", {mark} {text}" for mark, text in notes.items() if any(mark in name for name in marks.values()))
    return BarChart(
        "comparison", "Accuracy by row and task", "Bars: mean accuracy with its 95 % interval. Marks: tasks.",
        [name + marks.get(at, "") for at, name in enumerate(rows)],
        ("mean", [row["mean"] for row in rows.values()]),
        {task: [row["per_task"][task] for row in rows.values()] for task in tasks},
        [tuple(row["interval"]) for row in rows.values()],
        f"accuracy, %, and mean with 95 % interval ({summary['protocol']} protocol{note})",
    )  # fmt: skip


def coefficients(run: Run) -> HeatMap | None:
    """Coefficients by expert and depth, where there are several of an expert."""
    learned = run.learned
    return coefficient_map(learned) if learned and (len(learned.values) > 1 or learned.is_fine) else None


def coefficient_map(learned: Learned) -> HeatMap:
    """Coefficients by expert and depth, attention, MLP and norms apart; means where a tensor has several."""
    text = "One row per expert, depth from left to right, one panel per kind of layer; hover for names and values."
    text += " A cell is the mean over a tensor's coefficients." if learned.is_fine else ""
    means = np.concatenate([array.mean(1) for array in learned.values.values()])
    return HeatMap(
        "coefficients", "Coefficients by expert and depth", text, learned.experts,
        _panels(learned, lambda values: values.mean(1)),
        value="mean coefficient" if learned.is_fine else "coefficient",
        column="parameter tensor" if are_parameters(learned.values) else "group",
        scale=scale_of(means.min(), means.max()),
    )  # fmt: skip


def spread(run: Run) -> HeatMap | None:
    """How much the coefficients within each tensor differ."""
    learned = run.learned
    if learned is None or not learned.is_fine:
        return None
    text = "Standard deviation over a tensor's coefficients: where it is high, single rows (columns, chunks) of an "
    text += "expert are chosen."
    panels = _panels(learned, lambda values: values.std(1))
    title = "Spread of the coefficients within each tensor"
    return HeatMap("spread", title, text, learned.experts, panels, "standard deviation", "parameter tensor")


def distribution(run: Run) -> LineChart | None:
    """How the coefficients of each expert are distributed, where a tensor has several."""
    return distribution_of(run.learned) if run.learned and run.learned.is_fine else None


def distribution_of(learned: Learned) -> LineChart:
    """How the coefficients of each expert are distributed."""
    every = np.concatenate(list(learned.values.values()), axis=1)
    low, high = (float(np.quantile(every, share)) for share in (0.002, 0.998))
    edges = np.linspace(low, high if high > low else low + 1e-6, _BINS + 1)
    centres = _rounded((edges[1:] + edges[:-1]) / 2)
    counts = [np.histogram(np.clip(row, edges[0], edges[-1]), edges)[0] for row in every]
    series = {
        expert: (centres, _rounded(100 * count / every.shape[1]))
        for expert, count in zip(learned.experts, counts, strict=True)
    }
    text = f"Share of each expert's {every.shape[1]:,} coefficients by value; the outermost bins hold what lies beyond."
    title = "Distribution of the coefficients"
    return LineChart("distribution", title, text, series, x="coefficient", y="% of coefficients")


def trajectories(run: Run) -> LineChart | None:
    """The mean coefficient of each expert by step, and the extremes of all where tensors have one coefficient."""
    means = {name: _line(series) for name, series in _in_order(run.logged("coefficient/"), run.experts).items()}
    if not means and "adapt/coefficient" in run.metrics:
        means = {"mean of all": _line(run.metrics["adapt/coefficient"])}
    if not means:
        return None
    ends = {"lowest of all": "adapt/coefficient/min", "highest of all": "adapt/coefficient/max"}
    extremes = {name: _line(run.metrics[key]) for name, key in ends.items() if key in run.metrics}
    hidden = frozenset(extremes if run.learned and run.learned.is_fine else ())  # they would squeeze the means
    text = "Mean coefficient of each expert." + (" The extremes of all are in the table." if hidden else "")
    return LineChart(
        "trajectories", "Coefficients over the steps", text, {**means, **extremes}, y="coefficient",
        quiet=frozenset(extremes), hidden=hidden,
    )  # fmt: skip


def losses(run: Run) -> LineChart | None:
    """The objective by task and step."""
    series = {name: _smooth(values) for name, values in _in_order(run.logged("adapt/loss/"), run.tasks).items()}
    if "adapt/loss" in run.metrics:
        series["all"] = _smooth(run.metrics["adapt/loss"])
    if "holdout/loss" in run.metrics:
        series["held-out inputs"] = _line(run.metrics["holdout/loss"])
    if not series:
        return None
    text = "What is minimized, on unlabeled inputs; a running mean over the nearest steps."
    return LineChart("losses", "Objective by task", text, series, y="objective", quiet=frozenset({"all"}))


def unlabeled(run: Run, kind: str) -> dict[str, Series]:
    """Return a criterion that needs no label, by task: ``marginal``, ``entropy`` or ``disagreement``."""
    return _in_order(run.logged(f"unlabeled/{kind}/") or run.logged(f"guard/{kind}/"), run.tasks)


def criteria(run: Run) -> list[LineChart]:
    """What can be seen of each task without labels, by step."""
    return [
        LineChart(kind, title, text, {task: _line(values) for task, values in series.items()}, y=y)
        for kind, (title, text, y) in _CRITERIA.items()
        if (series := unlabeled(run, kind))
    ]


def picks(run: Run) -> HeatMap | None:
    """Frank-Wolfe: which share of the groups moved towards which vertex, by iteration."""
    lines = {name: _line(series) for name, series in _in_order(run.logged("pick/"), run.experts).items()}
    if not lines:
        return None
    steps = next(iter(lines.values()))[0]
    panel = Panel("", [f"{step:.0f}" for step in steps], [ys for _, ys in lines.values()])
    text = "Share of the groups that an iteration moved towards each vertex."
    return HeatMap("picks", "Frank-Wolfe: picks", text, list(lines), [panel], "share of the groups", "step")


def gap(run: Run) -> LineChart | None:
    """Frank-Wolfe: the duality gap by iteration."""
    series = run.metrics.get("adapt/gap")
    if series is None:
        return None
    text = "How far a linear loss would still fall, by iteration; noisy, as each is of one batch."
    is_log = min(series.values) > 0
    return LineChart("gap", "Frank-Wolfe: duality gap", text, {"gap": _line(series)}, y="duality gap", is_log=is_log)


def cosines(run: Run) -> HeatMap | None:
    """Cosines between the experts' task vectors."""
    matrix, names = run.pool.get("cosines"), run.experts
    if not matrix or {len(matrix), *map(len, matrix)} != {len(names)}:
        return None
    values = [
        [value if i != j and math.isfinite(value) else None for j, value in enumerate(row)]
        for i, row in enumerate(matrix)
    ]
    text = "Near 0: the experts changed the base in different directions and interfere little. High: they are alike."
    return HeatMap(
        "cosines", "Cosines of the task vectors", text, names, [Panel("", names, values)], "cosine", "expert",
        scale="diverging", shows_values=len(names) <= _MOST_VALUES, reaches=(0.25, 1.0),
    )  # fmt: skip


def norms(run: Run) -> LineChart | None:
    """Norms of the task vectors by block, relative to the base's."""
    by_name, base = run.pool.get("norms") or {}, run.pool.get("base_norms") or {}
    if not by_name or set(by_name) - set(base):
        return None
    blocks: dict[str, list[str]] = {}
    for name in by_depth(by_name):
        blocks.setdefault(place_of(name).block, []).append(name)
    places = list(map(float, range(len(blocks))))
    series = {}
    for at, expert in enumerate(run.experts):
        ratios = [_ratio([by_name[n][at] for n in names], [base[n] for n in names]) for names in blocks.values()]
        series[expert] = (places, ratios)
    text = "Norm of each expert's change to a block, relative to the norm of the base's weights there."
    title, ticks = "Size of the task vectors by depth", dict(zip(places, blocks, strict=True))
    return LineChart("norms", title, text, series, x="block", y="relative norm", ticks=ticks)


def _in_order(series: Mapping[str, Series], names: Sequence[str]) -> dict[str, Series]:
    """Order series by ``names``, so that a colour means the same in all figures; CSV files are ordered by letters."""
    places = {name: at for at, name in enumerate(names)}
    return dict(sorted(series.items(), key=lambda item: places.get(item[0], len(places))))


def _ratio(changes: Sequence[float], weights: Sequence[float]) -> float:
    whole = math.hypot(*weights)
    return float(f"{math.hypot(*changes) / whole:.4g}") if whole else 0.0


def _panels(learned: Learned, statistic: Callable[[Values], Values]) -> list[Panel]:
    """Divide the labels by kind of layer, in order of depth, and reduce each one's array (E, groups) to (E,)."""
    labels = by_depth(learned.values)
    is_divided = are_parameters(labels)
    kinds = {kind: [name for name in labels if place_of(name).kind == kind] for kind in KINDS}
    last = [name for kind in KINDS[3:] for name in kinds[kind]]
    if len(last) < _FEW:  # a stem and a projection, say: no panel each
        kinds = {kind: kinds[kind] for kind in KINDS[:3]} | {"other": by_depth(last)}
    panels = []
    for kind, names in kinds.items() if is_divided else [("", labels)]:
        if names:
            values: list[list[Cell]] = [
                [*_rounded(row)] for row in np.stack([statistic(learned.values[name]) for name in names], axis=1)
            ]
            blocks = [place_of(name).block for name in names] if is_divided else []
            panels.append(Panel(kind, names, values, {blocks.index(block): block for block in blocks}))
    return panels


def _rounded(values: Values) -> list[float]:
    """Round to four digits, as many as a figure shows."""
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
    sums = np.cumsum(np.concatenate([[0.0], series.values]))
    at = np.arange(len(series.values))
    start, stop = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(at))
    return _line(Series(series.steps, ((sums[stop] - sums[start]) / (stop - start)).tolist()))
