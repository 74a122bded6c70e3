"""The sections of a page that puts several runs side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adamerge.results.numbers import duration, number, percent, size
from adamerge.results.recipes import PLACES
from adamerge.results.recipes import flat as flattened
from adamerge.results.report import run_charts
from adamerge.results.report.charts import BarChart, Cell, HeatMap, LineChart, Panel, scale_of
from adamerge.results.report.facts import Run, mapping
from adamerge.results.report.page import Note, Plan, Section, build_sections
from adamerge.results.report.run_page import table_of
from adamerge.results.table import Table

_FEW = 5  # runs that marks can still tell apart
_APART = (*PLACES, "name")  # options that differ anyway


def names_of(runs: Sequence[Run]) -> list[str]:
    """Return a name for each run: its configuration's, and as much of its path as tells them apart."""
    names = [str(run.config.get("name") or run.name) for run in runs]
    if len(set(names)) == len(names):
        return names
    for depth in range(1, 1 + max(len(run.folder.parts) for run in runs)):
        ends = ["/".join(run.folder.parts[-depth:]) for run in runs]
        if len(set(ends)) == len(ends):
            return ends
    return [f"{name} ({number})" for number, name in enumerate(names, 1)]  # a folder named twice


def sections(runs: Sequence[Run]) -> list[Section]:
    """Return the page's sections."""
    named = dict(zip(names_of(runs), runs, strict=True))
    plan: Plan = [
        ("result", "Result", [accuracies, accuracy_table]),
        ("differences", "What differs", [differences]),
        ("learned", "Coefficients", [mean_coefficients]),
        ("adaptation", "Adaptation", [losses]),
        ("costs", "Time and memory", [costs]),
    ]
    return build_sections(named, plan, [f"{name}: {note}" for name, run in named.items() for note in run.notes])


def _summary(named: Mapping[str, Run]) -> dict[str, Any] | None:
    """Return one summary of all: each run's own row, between the references of the first that has them.

    Runs of different pools have references of their own.
    """
    scored = {name: run for name, run in named.items() if run.summary}
    if not scored:
        return None
    hashes = {str(sorted(mapping(run.recipe.get("hashes")).items())) for run in scored.values()}
    differ = len(hashes - {"[]"}) > 1
    references: dict[str, Any] = {}
    rows: dict[str, Any] = {}
    experts: dict[str, Any] = {}
    for name, run in scored.items():
        for row, content in run.summary["rows"].items():
            if run.own_row in (row, None):
                rows[name if row == run.own_row else f"{name}: {row}"] = content
            else:
                of_kind = experts if row == "experts" else references
                of_kind.setdefault(f"{name}: {row}" if differ else row, content)
    rows = {**references, **rows, **experts}
    tasks = next(iter(scored.values())).summary["tasks"]
    common = [task for task in tasks if all(task in row["per_task"] for row in rows.values())]
    protocols = {str(run.summary.get("protocol")) for run in scored.values()}
    return {"rows": rows, "tasks": common, "protocol": " and ".join(sorted(protocols)), "pools_differ": differ}


def accuracies(named: Mapping[str, Run]) -> BarChart | HeatMap | None:
    """Accuracy by task and run."""
    summary = _summary(named)
    if summary is None or not summary["tasks"]:
        return None
    rows = summary["rows"]
    if len(rows) > _FEW:
        return run_charts.rows_by_task(summary)
    marks = {name: [row["per_task"][task] for task in summary["tasks"]] for name, row in rows.items()}
    text = "Each run, and what they are compared with."
    return BarChart("accuracies", "Accuracy by task", text, summary["tasks"], None, marks)


def accuracy_table(named: Mapping[str, Run]) -> list[Table | Note] | None:
    """Accuracies of all runs."""
    summary = _summary(named)
    if summary is None:
        return None
    every = {task for run in named.values() for task in run.summary.get("tasks", [])}
    blocks: list[Table | Note] = [table_of(summary, None)]
    if left := sorted(every - set(summary["tasks"])):
        blocks.append(Note(f"Not all runs scored {', '.join(map(str, left))}; the means are each run's own.", True))
    if " and " in summary["protocol"]:
        blocks.append(Note("The runs have different protocols: their accuracies are not comparable.", True))
    if summary["pools_differ"]:
        blocks.append(Note("The runs merged different checkpoints: each has references of its own.", True))
    return blocks


def differences(named: Mapping[str, Run]) -> Table | Note | None:
    """Options in which the runs differ, those that all of them have first."""
    flat = {name: flattened(run.config) for name, run in named.items() if run.config}
    if len(flat) < 2:
        return None
    options_of_any = dict.fromkeys(key for options in flat.values() for key in options)
    keys = sorted(options_of_any, key=lambda key: not all(key in options for options in flat.values()))
    rows = [
        [key, *(str(options.get(key, "")) for options in flat.values())]
        for key in keys
        if not key.startswith(_APART) and len({str(options.get(key, "")) for options in flat.values()}) > 1
    ]
    if not rows:
        return Note("The runs have the same configuration.")
    return Table(["option", *flat], rows, "Options in which the runs differ")


def mean_coefficients(named: Mapping[str, Run]) -> HeatMap | None:
    """Mean coefficient of each expert in each run."""
    means: dict[str, dict[str, float]] = {}
    for name, run in named.items():
        if run.learned is not None:
            every = np.concatenate(list(run.learned.values.values()), axis=1)
            means[name] = dict(zip(run.learned.experts, every.mean(1).tolist(), strict=True))
    if not means:
        return None
    experts = list(dict.fromkeys(expert for of_run in means.values() for expert in of_run))
    values: list[list[Cell]] = [
        [float(f"{of_run[expert]:.4g}") if expert in of_run else None for expert in experts]
        for of_run in means.values()
    ]
    shown = [value for of_run in means.values() for value in of_run.values()]
    return HeatMap(
        "means", "Mean coefficient of each expert", "Over all of a run's coefficients.", list(means),
        [Panel("", experts, values)], "mean coefficient", "expert", shows_values=len(experts) <= 12,
        scale=scale_of(min(shown), max(shown)),
    )  # fmt: skip


def losses(named: Mapping[str, Run]) -> list[LineChart]:
    """The objective by run, one figure per kind of objective, as other kinds have other scales."""
    by_objective: dict[str, dict[str, Any]] = {}
    for name, run in named.items():
        chart = run_charts.losses(run)
        if chart is not None and "all" in chart.series:
            objective = str((run.config.get("objective") or {}).get("_target_", "objective")).rsplit(".", 1)[-1]
            by_objective.setdefault(objective, {})[name] = chart.series["all"]
    text = "All tasks together, by step."
    return [
        LineChart(f"losses-{at}", f"Objective: {objective}", text, series, y="objective")
        for at, (objective, series) in enumerate(by_objective.items())
    ]


def costs(named: Mapping[str, Run]) -> Table:
    """Time and memory of each run."""
    rows = []
    for name, run in named.items():
        seconds = (run.costs.get("seconds") or {}).get("adapt", run.recipe.get("seconds"))
        memory = run.costs.get("peak_memory_bytes", run.recipe.get("peak_memory_bytes"))
        row = run.summary.get("rows", {}).get(run.own_row or "", {})
        rows.append(
            [
                name, percent(row.get("mean")), "" if seconds is None else duration(seconds),
                number(run.recipe.get("steps")), f"{run.learned.count:,}" if run.learned else "", size(memory),
                size(run.costs.get("peak_device_memory_bytes")), str(run.costs.get("device") or ""),
            ]
        )  # fmt: skip
    header = ["run", "mean accuracy, %", "adaptation", "steps", "coefficients", "memory", "device memory", "device"]
    return Table(header, rows, "What each run took").filled()
