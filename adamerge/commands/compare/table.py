"""Many rows side by side: means over seeds, and tables for the terminal and for Markdown."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from adamerge.results.evaluation import FORMAT, gap_closed, ratios
from adamerge.results.numbers import percent
from adamerge.results.table import Table

START, GOAL = "task_arithmetic_0.3", "experts"  # what the measures refer to

Result = Mapping[str, Any]


def compared(results: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    """Return the content of ``summary.json``: rows averaged over their seeds, and measures relative to others.

    Args:
        results: Row name to its results, one per seed, in the format of ``summary.json``.

    Returns:
        The rows with ``normalised_per_task``, ``seeds`` and ``spread`` (standard deviation of the mean accuracy over
        the seeds; None for one) besides. Measures compare results of the same seed.
    """
    by_seed = {name: {result["seed"]: result for result in every} for name, every in results.items() if every}
    rows = {name: _averaged(seeds, by_seed) for name, seeds in by_seed.items()}
    first = next(iter(next(iter(by_seed.values())).values()))
    unseen = list(dict.fromkeys(task for row in rows.values() for task in row.get("unseen", ())))
    tasks = {"tasks": list(first["per_task"]), **({"unseen": unseen} if unseen else {})}
    return {"format": FORMAT, "protocol": first["protocol"], **tasks, "rows": rows}


def _averaged(by_seed: Mapping[int, Result], every: Mapping[str, Mapping[int, Result]]) -> dict[str, Any]:
    results = list(by_seed.values())
    tasks = list(results[0]["per_task"])
    start, goal = every.get(START, {}), every.get(GOAL, {})
    with_goal = [(result, goal[seed]) for seed, result in by_seed.items() if seed in goal]
    relative = [r for result, experts in with_goal if (r := ratios(result["per_task"], experts["per_task"]))]
    gaps = [
        gap_closed(result["mean"], start[result["seed"]]["mean"], experts["mean"])
        for result, experts in with_goal
        if result["seed"] in start
    ]
    closed = [gap for gap in gaps if gap is not None]
    means = [result["mean"] for result in results]
    per_task = {task: _mean([ratio[task] for ratio in relative]) for task in tasks} if relative else None
    unseen = {task: _mean([result["unseen"][task] for result in results]) for task in results[0].get("unseen", ())}
    return {
        **({"unseen": unseen} if unseen else {}),
        "per_task": {task: _mean([result["per_task"][task] for result in results]) for task in tasks},
        "calibration_error": {task: _mean([r["calibration_error"][task] for r in results]) for task in tasks},
        "mean": _mean(means),
        "interval": [_mean([result["interval"][side] for result in results]) for side in (0, 1)],
        "normalised": _mean(list(per_task.values())) if per_task else None,
        "normalised_per_task": per_task,
        "gap_closed": _mean(closed) if closed else None,
        "uses_labels": any(result["uses_labels"] for result in results),
        "uses_data": any(result["uses_data"] for result in results),
        "seconds": _mean([result["seconds"] for result in results]),
        "peak_memory_bytes": max(result["peak_memory_bytes"] for result in results),
        "seed": results[0]["seed"],
        "seeds": list(by_seed),
        "spread": statistics.stdev(means) if len(means) > 1 else None,
        **{key: _mean([result[key] for result in results]) for key in ("coefficient",) if key in results[0]},
    }


def table(content: Mapping[str, Any]) -> Table:
    """Return the table of a comparison, its rows being code in Markdown."""
    per_task = "normalised_per_task" if _is_normalised(content) else "per_task"
    unseen = content.get("unseen", [])
    lines = []
    for name, row in content["rows"].items():
        half = (row["interval"][1] - row["interval"][0]) / 2
        lines.append(
            [
                name,
                *(percent(row[per_task][task]) for task in content["tasks"]),
                percent(row["normalised"]),
                percent(row["mean"]),
                percent(half) if row["spread"] is None else f"sd {percent(row['spread'])}",
                percent(row["gap_closed"], 0),
                *(percent(row.get("unseen", {}).get(task)) for task in unseen),
                "labels" if row["uses_labels"] else "unlabeled" if row["uses_data"] else "none",
                f"{row['seconds']:.1f}",
                f"{row['peak_memory_bytes'] / 1e6:.0f}",
            ]
        )
    marked = [f"{task} †" for task in unseen]
    header = ["row", *content["tasks"], "norm.", "acc.", "±", "gap", *marked, "data", "s", "MB"]
    return Table(header, lines, caption=_caption(content))


def _caption(content: Mapping[str, Any]) -> str:
    """Say what the columns are."""
    measure = "accuracy relative to the task's expert" if _is_normalised(content) else "accuracy"
    return (
        f"Tasks: {measure}, %; norm.: their mean; acc.: mean accuracy, %, ±: 95 % over images, or sd over seeds; "
        f"gap: share of the way from task arithmetic (0.3) to the experts, %; data: what it saw beside the weights; "
        f"s: to make it; MB: peak memory of its process. Protocol: {content['protocol']}."
        + (" †: unseen task, accuracy, %: no expert, no images to adapt on." if content.get("unseen") else "")
    )


def _is_normalised(content: Mapping[str, Any]) -> bool:
    return all(row["normalised"] is not None for row in content["rows"].values())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
