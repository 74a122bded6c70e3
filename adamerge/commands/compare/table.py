"""Many rows side by side: means over seeds, measures relative to other rows, and figures that were published."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from adamerge.results.evaluation import FORMAT, gap_closed, ratios

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
    """Return the means of a row's results, and its measures relative to the start and the experts of the same seed."""
    start, goal = every.get(START, {}), every.get(GOAL, {})
    pairs = [(result, goal[seed]) for seed, result in by_seed.items() if seed in goal]
    relative = [r for result, experts in pairs if (r := ratios(result["per_task"], experts["per_task"]))]
    gaps = [
        gap_closed(result["mean"], start[result["seed"]]["mean"], experts["mean"])
        for result, experts in pairs
        if result["seed"] in start
    ]
    closed = [gap for gap in gaps if gap is not None]
    per_task = _mean(relative) if relative else None
    results = [{key: value for key, value in result.items() if key != "correct"} for result in by_seed.values()]
    means = [result["mean"] for result in results]
    return {
        **_mean(results),
        "normalised": _mean(list(per_task.values())) if per_task else None,
        "normalised_per_task": per_task,
        "gap_closed": _mean(closed) if closed else None,
        "peak_memory_bytes": max(result["peak_memory_bytes"] for result in results),
        "seed": results[0]["seed"],
        "seeds": list(by_seed),
        "spread": statistics.stdev(means) if len(means) > 1 else None,
    }


def _mean(values: Sequence[Any]) -> Any:
    """Return the mean of numbers, or of what holds numbers in the same places; of switches, whether any is on."""
    first = values[0]
    if isinstance(first, Mapping):
        return {key: _mean([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [_mean(parts) for parts in zip(*values, strict=True)]
    if isinstance(first, bool):
        return any(values)
    return sum(values) / len(values) if isinstance(first, (int, float)) else first
