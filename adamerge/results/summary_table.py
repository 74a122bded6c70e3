"""The table of ``summary.json``: its columns, marks and notes."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from adamerge.results.numbers import percent
from adamerge.results.table import Table
from adamerge.results.text_scores import KEPT

_CONTROLS = {
    "random_experts": "random directions of the task vectors' norms in their place; same start, steps and samples",
    "distillation": "all weights trained on the experts' answers, no merge; same start, steps and samples",
}


def table(content: Mapping[str, Any], title: str = "") -> Table:
    """Return the table of a summary: accuracies in percent, rows that use labels marked with *, controls with ‡.

    Args:
        content: What ``summary.json`` holds.
        title: Above the table.
    """
    tasks, unseen = content["tasks"], content.get("unseen", [])
    rows = list(content["rows"].values())
    names = dict.fromkeys(name for row in rows for name in row.get("measures", ()))
    kinds = content.get("measures", {})
    measures: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "95 %": lambda row: f"±{50 * (row['interval'][1] - row['interval'][0]):.1f}",
        "spread": lambda row: "" if row.get("spread") is None else f"±{100 * row['spread']:.1f}",
        "gap": lambda row: percent(row.get("gap_closed"), 0),
        "norm.": lambda row: percent(row.get("normalised")),
        "diff.": lambda row: "" if row.get("difference") is None else f"{row['difference']:+.1f}",
        **{_heading(name, kinds.get(name)): functools.partial(_measured, name, kinds.get(name)) for name in names},
        "ECE": lambda row: percent(_mean(row["calibration_error"]) if row.get("calibration_error") else None),
        "s": lambda row: "" if row.get("seconds") is None else f"{row['seconds']:.1f}",
        "MB": lambda row: f"{row['peak_memory_bytes'] / 1e6:.0f}" if "peak_memory_bytes" in row else "",
    }
    kept = {name: show for name, show in measures.items() if any(map(show, rows))}
    lines = [
        [
            name, *(_beside(row["per_task"][task], row, task) for task in tasks), _beside(row["mean"], row),
            *(percent(row.get("unseen", {}).get(task)) for task in unseen), *(show(row) for show in kept.values()),
        ]
        for name, row in content["rows"].items()
    ]  # fmt: skip
    heading = "score, %" if content.get("metrics") else "accuracy, %"
    return Table(
        [heading, *map(str, tasks), "mean", *(f"{task} †" for task in unseen), *kept], lines,
        caption=_caption(content), title=title, marks=marks_of(content["rows"]), strong_columns=frozenset({"mean"}),
        optional=len(kept),
    )  # fmt: skip


def _heading(name: str, kind: Mapping[str, Any] | None) -> str:
    """Return the heading of a measure, with its unit and its better direction."""
    if kind is None:
        return name
    unit = f", {kind['unit']}" if kind["unit"] else ""
    return f"{name}{unit} {'↓' if kind['lower_is_better'] else '↑'}"


def _measured(name: str, kind: Mapping[str, Any] | None, row: Mapping[str, Any]) -> str:
    """Return the mean of a measure over a row's tasks that have it; of perplexities the geometric one."""
    values = list(row.get("measures", {}).get(name, {}).values())
    if not values:
        return ""
    if name == "perplexity":
        return f"{math.exp(sum(map(math.log, values)) / len(values)):.4g}"
    mean = sum(values) / len(values)
    return percent(mean) if kind and kind["unit"] == "%" else f"{mean:.3g}"


def _beside(value: float, row: Mapping[str, Any], task: str | None = None) -> str:
    """Return an accuracy in percent, and in parentheses the published one of the task, or the mean, if any."""
    published = row.get("published") or {}
    figure = published.get("mean") if task is None else published.get("tasks", {}).get(task)
    return percent(value) if figure is None else f"{percent(value)} ({figure:.1f})"


def marks_of(rows: Mapping[str, Mapping[str, Any]]) -> dict[int, str]:
    """Return the marks of rows by position: ``*`` of those that use labels, ``‡`` of controls."""
    marks = (" *" * bool(row.get("uses_labels")) + " ‡" * bool(row.get("control")) for row in rows.values())
    return {at: mark for at, mark in enumerate(marks) if mark}


def _about_texts(content: Mapping[str, Any]) -> str:
    """Say what the scores of texts are, and what was measured beside them."""
    text = ""
    if content.get("metrics"):
        text += "\nScores: " + ", ".join(f"{task}: {metric}" for task, metric in content["metrics"].items()) + "."
    if content.get("measures"):
        text += "\n↓: lower is better, ↑: higher; means over tasks, of perplexity the geometric one."
    if "KL" in content.get("measures", {}):
        text += f"\nagreement, KL: with the task's expert; KL from its {KEPT} likeliest classes and one for all others."
    return text


def _caption(content: Mapping[str, Any]) -> str:
    notes = {
        "split": "Protocol: split, inputs that adapted are not scored.",
        "transductive": "Protocol: transductive, adapted on the scored inputs without their labels.",
    }
    text = notes.get(str(content.get("protocol")), f"Protocol: {content.get('protocol')}.")
    text += _about_texts(content)
    if left_out := sum(map(len, content.get("unreadable", {}).values())):
        text += f"\nNot scored: {left_out} inputs that cannot be read (summary.json names them)."
    if content.get("unseen"):
        text += "\n† unseen: no expert and no inputs to adapt on; all its labelled inputs are scored; not in the mean."
    if any(row.get("uses_labels") for row in content["rows"].values()):
        text += "\n* uses labels."
    for control in dict.fromkeys(row["control"] for row in content["rows"].values() if row.get("control")):
        text += f"\n‡ control: {_CONTROLS.get(control, control)}."
    if any(row.get("published") for row in content["rows"].values()):
        text += "\n(in parentheses): published, %; diff.: from that, in points."
    if any("peak_memory_bytes" in row for row in content["rows"].values()):
        text += "\nMB: peak memory of the process."
    if any(row.get("gap_closed") is not None for row in content["rows"].values()):
        text += "\ngap: share of the way from task arithmetic (0.3) to the experts, %."
    if any(row.get("normalised") is not None for row in content["rows"].values()):
        text += "\nnorm.: accuracy relative to the task's expert, %."
    if any(row.get("calibration_error") for row in content["rows"].values()):
        text += "\nECE: expected calibration error, %."
    return f"{text}\n95 %: bootstrap over the scored inputs; s: seconds."


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)
