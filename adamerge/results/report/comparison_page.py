"""The sections of a page that puts several runs side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from adamerge.results.numbers import duration, number, percent, size
from adamerge.results.recipes import PLACES
from adamerge.results.recipes import flat as flattened
from adamerge.results.report import run_charts
from adamerge.results.report.blocks import Note, Section, built
from adamerge.results.report.charts import BarChart, Cell, HeatMap, LineChart, Panel, scale_of
from adamerge.results.report.facts import Run, mapping
from adamerge.results.report.run_page import rows_by_task, table_of
from adamerge.results.table import Table

_FEW = 5  # runs that marks can still tell apart
_APART = (*PLACES, "name")  # options that differ anyway


def names_of(runs: Sequence[Run]) -> list[str]:
    """Return a name for each run: its configuration's, and as much of its path as tells them apart."""
    own = [str(run.config.get("name") or run.name) for run in runs]
    if len(set(own)) == len(own):
        return own
    for depth in range(1, 1 + max(len(run.folder.parts) for run in runs)):
        ends = ["/".join(run.folder.parts[-depth:]) for run in runs]
        if len(set(ends)) == len(ends):
            return ends
    return [f"{name} ({number})" for number, name in enumerate(own, 1)]  # a folder named twice


def sections(runs: Sequence[Run]) -> list[Section]:
    """Return the page's sections."""
    named = dict(zip(names_of(runs), runs, strict=True))
    notes: list[str] = []

    def section(key: str, title: str, *makers: Any) -> Section:
        return Section(key, title, built(*(lambda make=make: make(named) for make in makers), notes=notes))

    found = [
        section("result", "Result", accuracies, accuracy_table),
        section("differences", "What differs", differences),
        section("learned", "Coefficients", mean_coefficients),
        section("adaptation", "Adaptation", losses),
        section("costs", "Time and memory", costs),
    ]
    found = [section for section in found if section.blocks]
    every = [f"{name}: {note}" for name, run in named.items() for note in run.notes] + notes
    warnings = [Note(text, is_warning=True) for text in every]
    return [Section("notes", "To know", [*warnings]), *found] if warnings else found


def _summary(named: Mapping[str, Run]) -> dict[str, Any] | None:
    """Return one summary of all: each run's own row, between the references of the first that has them.

    Runs of different pools have references of their own.
    """
    rows: dict[str, Any] = {}
    scored = {name: run for name, run in named.items() if run.summary}
    if not scored:
        return None
    differ = len({str(sorted(hashes.items())) for run in scored.values() if (hashes := _hashes(run))}) > 1
    references: dict[str, Any] = {}
    experts: dict[str, Any] = {}
    for name, run in scored.items():
        for row, content in run.summary["rows"].items():
            if row == run.own_row:
                rows[name] = content
            elif run.own_row is None:
                rows[f"{name}: {row}"] = content
            else:
                of_kind = experts if row == "experts" else references
                of_kind.setdefault(f"{name}: {row}" if differ else row, content)
    rows = {**references, **rows, **experts}
    tasks = [
        task for task in next(iter(scored.values())).summary["tasks"]
        if all(task in row["per_task"] for row in rows.values())
    ]  # fmt: skip
    protocols = {str(run.summary.get("protocol")) for run in scored.values()}
    return {"rows": rows, "tasks": tasks, "protocol": " and ".join(sorted(protocols)), "pools_differ": differ}


def _hashes(run: Run) -> dict[str, Any]:
    """Return the hashes of what a run merged; {} where they are not known."""
    return mapping(run.recipe.get("hashes"))


def accuracies(named: Mapping[str, Run]) -> BarChart | HeatMap | None:
    """Accuracy by task and run."""
    summary = _summary(named)
    if summary is None or not summary["tasks"]:
        return None
    rows = summary["rows"]
    if len(rows) > _FEW:
        return rows_by_task(summary)
    marks = {name: [row["per_task"][task] for task in summary["tasks"]] for name, row in rows.items()}
    return BarChart(
        key="accuracies", title="Accuracy by task", text="Each run, and what they are compared with.",
        categories=summary["tasks"], bar=None, marks=marks,
    )  # fmt: skip


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
    found = dict.fromkeys(key for options in flat.values() for key in options)
    keys = sorted(found, key=lambda key: not all(key in options for options in flat.values()))
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
    found: dict[str, dict[str, float]] = {}
    for name, run in named.items():
        if run.learned is not None:
            total = {expert: 0.0 for expert in run.learned.experts}
            count = sum(array.shape[1] for array in run.learned.values.values())
            for array in run.learned.values.values():
                for expert, row in zip(total, array, strict=True):
                    total[expert] += float(row.sum()) / count
            found[name] = total
    if not found:
        return None
    experts = list(dict.fromkeys(expert for means in found.values() for expert in means))
    values: list[list[Cell]] = [
        [None if expert not in means else float(f"{means[expert]:.4g}") for expert in experts]
        for means in found.values()
    ]
    known = [value for row in values for value in row if value is not None]
    return HeatMap(
        key="means", title="Mean coefficient of each expert", text="Over all of a run's coefficients.",
        rows=list(found), panels=[Panel("", experts, values)], value="mean coefficient", column="expert",
        shows_values=len(experts) <= 12, scale=scale_of(min(known), max(known)),
    )  # fmt: skip


def losses(named: Mapping[str, Run]) -> list[LineChart] | None:
    """The objective by run, one figure per kind of objective, as other kinds have other scales."""
    by_objective: dict[str, dict[str, Any]] = {}
    for name, run in named.items():
        chart = run_charts.losses(run)
        if chart is not None and "all" in chart.series:
            objective = str((run.config.get("objective") or {}).get("_target_", "objective")).rsplit(".", 1)[-1]
            by_objective.setdefault(objective, {})[name] = chart.series["all"]
    return [
        LineChart(
            key=f"losses-{number}", title=f"Objective: {objective}", text="All tasks together, by step.", series=series,
            y="objective",
        )
        for number, (objective, series) in enumerate(by_objective.items())
    ]  # fmt: skip


def costs(named: Mapping[str, Run]) -> Table:
    """Time and memory of each run."""
    rows = []
    for name, run in named.items():
        recorded = run.record.get("costs") or {}
        seconds = (recorded.get("seconds") or {}).get("adapt", run.recipe.get("seconds"))
        memory = recorded.get("peak_memory_bytes", run.recipe.get("peak_memory_bytes"))
        row = run.summary.get("rows", {}).get(run.own_row or "", {})
        rows.append(
            [
                name, percent(row.get("mean")), "" if seconds is None else duration(seconds),
                number(run.recipe.get("steps")), f"{run.learned.count:,}" if run.learned else "", size(memory),
                size(recorded.get("peak_device_memory_bytes")), str(recorded.get("device") or ""),
            ]
        )  # fmt: skip
    header = ["run", "mean accuracy, %", "adaptation", "steps", "coefficients", "memory", "device memory", "device"]
    return Table(header, rows, "What each run took").filled()
