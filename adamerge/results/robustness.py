"""Accuracy under corruptions: a merged checkpoint and its references, corruption by corruption."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adamerge.data.corruptions import Corruption
from adamerge.data.unlabeled_tasks import UnlabeledTasks
from adamerge.model.batch_norm import BatchNormPolicy
from adamerge.model.merged_model import MergedModel
from adamerge.results.evaluation import summary
from adamerge.results.numbers import percent
from adamerge.results.report import drawing
from adamerge.results.report.charts import HeatMap, Panel
from adamerge.results.scoring import MergeResult, score_run
from adamerge.results.table import Table
from adamerge.system.files import save_json

log = logging.getLogger(__name__)

CLEAN = "clean"


def score_corruptions(
    model: MergedModel,
    data: UnlabeledTasks,
    batch_norm: BatchNormPolicy,
    result: MergeResult,
    corruptions: Sequence[Corruption],
) -> dict[str, Any]:
    """Score a checkpoint, the pretrained model, task arithmetic and the experts, on clean and on corrupted images.

    Args:
        model: The model of the run, as it adapted.
        data: The data of the run.
        batch_norm: Which statistics each row has.
        result: The checkpoint.
        corruptions: What is done to the scored images; each image is corrupted in the same way for every row.

    Returns:
        ``format``, ``protocol``, ``tasks``, ``checkpoint`` (its row), ``adapted_on`` and ``corruptions``: name, with
        severity, to the ``rows`` of a ``summary.json``.
    """
    content: dict[str, Any] = {}
    for corruption in (None, *corruptions):
        name = CLEAN if corruption is None else str(corruption)
        log.info("Scoring: %s", name)
        scored = data if corruption is None else data.with_corrupted_evaluation(corruption)
        content[name] = summary(score_run(model, scored, result, batch_norm, references=True), scored.protocol)
    first = content[CLEAN]
    return {
        **{key: first.get(key, []) for key in ("format", "protocol", "tasks", "unseen")},
        "checkpoint": result.name,
        "adapted_on": CLEAN if data.corruption is None else str(data.corruption),
        "seed": data.seed,
        "corruptions": {name: {"rows": scored["rows"]} for name, scored in content.items()},
    }


def save_robustness(content: Mapping[str, Any], folder: Path, stem: str = "robustness") -> None:
    """Write ``robustness.json`` and its picture; where matplotlib is not installed a warning stands for that."""
    save_json(content, folder / f"{stem}.json")
    title = f"Accuracy of {content['checkpoint']}, %, adapted on {content['adapted_on']} images; right: means of others"
    shown, width = table(content), len(content["tasks"]) + 1 + len(content["unseen"])  # width: the checkpoint's columns
    (_, *columns), *lines = [[*cells[: width + 1], "", *cells[width + 1 :]] for cells in (shown.header, *shown.rows)]
    values = [[float(cell) if cell else None for cell in cells] for _, *cells in lines]
    rows, panel = [name for name, *_ in lines], Panel(title, columns, values)
    chart = HeatMap(
        "accuracies", title, "Accuracies in percent.", rows, [panel], "accuracy, %", "", shows_values=True, digits=1
    )
    drawing.save_if_possible(chart, folder / f"{stem}.png")


def table(content: Mapping[str, Any]) -> Table:
    """Return a row for each corruption: the checkpoint's accuracies, and the means of the others."""
    name, tasks, unseen = content["checkpoint"], content["tasks"], content["unseen"]
    first = next(iter(content["corruptions"].values()))["rows"]
    others = [row for row in first if row != name]
    lines = []
    for corruption, scored in content["corruptions"].items():
        rows = scored["rows"]
        values = [
            *(rows[name]["per_task"][task] for task in tasks),
            rows[name]["mean"],
            *(rows[name]["unseen"][task] for task in unseen),
            *(rows[row]["mean"] for row in others),
        ]
        lines.append([corruption, *map(percent, values)])
    caption = (
        f"Adapted on {content['adapted_on']} images; protocol: {content['protocol']}. After mean: means of others, on "
        "the same images. Severities: Hendrycks and Dietterich, arXiv:1903.12261."
    )
    header = ["images", *tasks, "mean", *(f"{task} (unseen)" for task in unseen), *others]
    title = f"Accuracy of {name}, %"
    return Table(header, lines, caption=caption, title=title, strong_columns=frozenset({"mean"}))
