"""Score models on labelled data: accuracy, calibration, bootstrap intervals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from adamerge.data.batch import Inputs, Outputs, to
from adamerge.data.unlabeled_tasks import UnlabeledTasks
from adamerge.errors import InputError
from adamerge.model.merged_model import MergedModel
from adamerge.results.task_score import MEASURES
from adamerge.results.task_score import TaskScore as TaskScore
from adamerge.results.text_scores import ExpertAnswers, is_text, of_metrics, score_texts
from adamerge.system import progress

FORMAT = 1
_CHUNK = 100  # bootstrap resamples at a time, to bound memory


@dataclass
class TableRow:
    """One line of a comparison: what was scored, and what it took.

    Attributes:
        scores: Task to score.
        unseen: Scores of tasks without an expert and without a stream, which no measure counts.
        uses_labels: Whether labels entered anywhere before scoring.
        uses_data: Whether unlabeled (or labelled) data was used.
        seconds: To make it, without scoring.
        seed: Seed of the adaptation.
    """

    scores: Mapping[str, TaskScore]
    unseen: Mapping[str, TaskScore] = field(default_factory=dict)
    uses_labels: bool = False
    uses_data: bool = False
    seconds: float = 0.0
    seed: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def accuracies(self) -> dict[str, float]:
        """Accuracy by task."""
        return {task: score.accuracy for task, score in self.scores.items()}

    @property
    def mean(self) -> float:
        """Mean accuracy over the tasks."""
        accuracies = self.accuracies.values()
        return sum(accuracies) / len(accuracies)


@torch.no_grad()
def score_task(
    logits: Callable[[Inputs, str], Tensor],
    data: UnlabeledTasks,
    task: str,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], None] | None = None,
) -> TaskScore:
    """Score one task's evaluation inputs.

    Args:
        logits: ``(inputs, task) -> (B, C)``.
        data: Holds the labelled inputs.
        task: Its name.
        device: Where the inputs go.
        on_batch: Called with the number of inputs of each batch once it is done, for progress bars.

    Raises:
        InputError: If a label is outside the head's classes.
    """
    outputs, labels = [], []
    for inputs, targets in data.evaluation_loader(task):
        outputs.append(logits(to(inputs, device), task).float().cpu())
        labels.append(targets)
        if on_batch is not None:
            on_batch(len(targets))
    predictions, truth = torch.cat(outputs), torch.cat(labels)
    classes = predictions.shape[-1]
    outside = truth[(truth < 0) | (truth >= classes)]
    if len(outside):
        raise InputError(
            f"data.tasks.{task}: found label {int(outside[0])}, but its head has {classes} classes. "
            "Do the class names belong to this data set?"
        )
    measures, kinds = of_metrics(data, task, predictions, truth)
    return TaskScore(
        accuracy=MulticlassAccuracy(classes, average="micro")(predictions, truth).item(),
        calibration_error=MulticlassCalibrationError(classes, n_bins=15)(predictions.softmax(-1), truth).item(),
        correct=predictions.argmax(-1) == truth,
        measures=measures,
        kinds=kinds,
    )


def score_tasks(
    model: MergedModel,
    params: Mapping[str, Tensor],
    data: UnlabeledTasks,
    description: str = "Scoring",
    tasks: Sequence[str] | None = None,
    experts: ExpertAnswers | None = None,
) -> dict[str, TaskScore]:
    """Score given parameters on every task's evaluation data.

    Args:
        model: Its encoder and heads are used, on the device of its pool.
        params: Parameter name to tensor (*S), such as a merge or an expert.
        data: Holds the labelled inputs.
        description: Text of the progress bar.
        tasks: Which tasks; default all that have evaluation data.
        experts: What the experts say of texts, to compare with.
    """
    todo, device = list(tasks or data.evaluation), model.pool.device
    count = sum(len(data.scored[task]) for task in todo)

    def outputs(inputs: Inputs, task: str) -> Outputs:
        return model.outputs(inputs, task, params)

    def logits(inputs: Inputs, task: str) -> Tensor:
        return model.logits(inputs, task, params)

    scores = {}
    with progress.phase(description, count, "inputs") as advance:
        for task in todo:
            by_texts = score_texts(outputs, data, task, device, experts, advance) if is_text(data, task) else None
            scores[task] = by_texts or score_task(logits, data, task, device, advance)
    return scores


def bootstrap(
    scores: Mapping[str, TaskScore], minus: Mapping[str, TaskScore] | None = None, samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % interval of the mean accuracy, resampling inputs within each task.

    It covers the choice of test inputs, not of training seeds.

    Args:
        scores: Scores of the tasks.
        minus: Scores to subtract, paired by input: the interval is that of the difference of the means.
        samples: Number of resamples.
        seed: Seed of the resamples.
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(samples)
    for task, score in scores.items():
        values = score.correct.float() - (minus[task].correct.float() if minus else 0)
        for start in range(0, samples, _CHUNK):
            count = min(_CHUNK, samples - start)
            picks = torch.randint(len(values), (count, len(values)), generator=generator)
            total[start : start + count] += values[picks].mean(1)
    low, high = (total / len(scores)).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def ratios(accuracies: Mapping[str, float], experts: Mapping[str, float]) -> dict[str, float] | None:
    """Return each task's accuracy relative to that of the task's own expert; None where an expert has no hit at all."""
    if any(not experts.get(task) for task in accuracies):
        return None
    return {task: accuracy / experts[task] for task, accuracy in accuracies.items()}


def normalised(accuracies: Mapping[str, float], experts: Mapping[str, float]) -> float | None:
    """Return the mean of :func:`ratios`, the field's measure."""
    relative = ratios(accuracies, experts)
    return None if relative is None else _mean(relative)


def gap_closed(mean: float, start: float, experts: float) -> float | None:
    """Return how much of the gap between two mean accuracies a third closes; 1 is all.

    None where the experts are no better than ``start``.
    """
    return (mean - start) / (experts - start) if experts > start else None


def summary(
    rows: Mapping[str, TableRow], protocol: str, unreadable: Mapping[str, list[str]] | None = None
) -> dict[str, Any]:
    """Return the content of ``summary.json`` (accuracies in [0, 1], seconds).

    Args:
        rows: What was scored, by name.
        protocol: The data's protocol.
        unreadable: Inputs that could not be read and are not scored, by task.
    """
    experts, start = rows.get("experts"), rows.get("task_arithmetic_0.3")
    content: dict[str, Any] = {}
    for name, row in rows.items():
        low, high = bootstrap(row.scores)
        content[name] = {
            "per_task": row.accuracies,
            "calibration_error": {
                task: score.calibration_error
                for task, score in row.scores.items()
                if score.calibration_error is not None
            },
            "mean": row.mean,
            "interval": [low, high],
            "correct": {task: _written(score.correct) for task, score in row.scores.items()},
            "normalised": normalised(row.accuracies, experts.accuracies) if experts else None,
            "gap_closed": gap_closed(row.mean, start.mean, experts.mean) if experts and start else None,
            "uses_labels": row.uses_labels,
            "uses_data": row.uses_data,
            "seconds": row.seconds,
            "seed": row.seed,
            **({"measures": measures} if (measures := _measures(row)) else {}),
            **({"unseen": {task: score.accuracy for task, score in row.unseen.items()}} if row.unseen else {}),
            **row.extra,
        }
    first = next(iter(rows.values())).scores
    tasks, metrics = list(first), {task: score.metric for task, score in first.items()}
    unseen = list(dict.fromkeys(task for row in rows.values() for task in row.unseen))
    shown = dict.fromkeys(name for row in content.values() for name in row.get("measures", ()))
    kinds = {**MEASURES, **{name: kind for score in first.values() for name, kind in score.kinds.items()}}
    optional = {
        "unseen": unseen,
        "unreadable": dict(unreadable or {}),
        "metrics": metrics if set(metrics.values()) != {"accuracy"} else {},
        "measures": {name: asdict(kinds[name]) for name in shown if name in kinds},
    }
    stated = {key: value for key, value in optional.items() if value}
    return {"format": FORMAT, "protocol": protocol, "tasks": tasks, **stated, "rows": content}


def _measures(row: TableRow) -> dict[str, dict[str, float]]:
    """Return what was measured beside the scores, by name and task."""
    names = dict.fromkeys(name for score in row.scores.values() for name in score.measures)
    return {
        name: {task: score.measures[name] for task, score in row.scores.items() if name in score.measures}
        for name in names
    }


def _written(correct: Tensor) -> str | list[float]:
    """Return what each sample adds to a score: a text of 0 and 1, or a list of shares."""
    return "".join("01"[hit] for hit in correct.tolist()) if correct.dtype == torch.bool else correct.tolist()


def scores_in(row: Mapping[str, Any]) -> dict[str, TaskScore]:
    """Return the scores of a row of ``summary.json``, sample by sample, such as :func:`bootstrap` takes them."""
    return {
        task: TaskScore(
            row["per_task"][task],
            (row.get("calibration_error") or {}).get(task),
            torch.tensor([hit == "1" for hit in written] if isinstance(written, str) else written),
        )
        for task, written in row["correct"].items()
    }


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)
