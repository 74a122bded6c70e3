"""Pictures of results, with matplotlib (extra ``demo``)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adamerge.checkpoints import atomic_path


def save_comparison(content: Mapping[str, Any], path: Path) -> None:
    """Draw a summary: mean accuracy with its interval per row, and a dot per task.

    Args:
        content: What ``summary.json`` holds.
        path: A ``.png``, ``.svg`` or ``.pdf`` file, written atomically.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = content["rows"]
    names = list(rows)
    figure = Figure(figsize=(8, 0.42 * len(names) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    positions = range(len(names))
    means = [100 * rows[name]["mean"] for name in names]
    errors = [
        [mean - 100 * rows[name]["interval"][side] for name, mean in zip(names, means, strict=True)] for side in (0, 1)
    ]
    colors = [
        "#c9c9c9" if rows[name]["uses_labels"] else "#4878a8" if rows[name]["uses_data"] else "#9ab8d3"
        for name in names
    ]
    axes.barh(positions, means, xerr=[errors[0], [-e for e in errors[1]]], color=colors, height=0.7, capsize=2)
    for number, task in enumerate(content["tasks"]):
        values = [100 * rows[name]["per_task"][task] for name in names]
        axes.plot(values, positions, "o^sDvP*X"[number % 8], color="black", markersize=4, alpha=0.65, label=task)
    for position, mean in zip(positions, means, strict=True):
        axes.text(1, position, f"{mean:.1f}", va="center", ha="left", color="white", fontweight="bold", fontsize=9)
    axes.set_yticks(positions, [name + (" *" if rows[name]["uses_labels"] else "") for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"accuracy on held-out images, %   ({content['protocol']} protocol, * uses labels)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(content["tasks"]), frameon=False, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."), dpi=150, metadata={"Software": None})
