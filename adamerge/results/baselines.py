"""Reference points that use labels, kept apart: what they find is marked ``uses_labels`` wherever it is shown."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from adamerge.data.batch import to
from adamerge.data.datasets import Unlabeled, length_of
from adamerge.data.unlabeled_tasks import UnlabeledTasks
from adamerge.errors import InputError
from adamerge.model.coefficients import Coefficients
from adamerge.model.merged_model import MergedModel
from adamerge.model.task_step import TaskStep
from adamerge.system import progress

GRID = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7)


@dataclass(frozen=True)
class LabelledCrossEntropy:
    """Cross-entropy to the true labels: the oracle that bounds what a granularity can reach.

    A stream never carries labels, so they are handed over here, by the caller or by
    :class:`~adamerge.callbacks.HandOverLabels`, beside it.

    Args:
        labels: Task to the labels of its adaptation stream, (N,), in the stream's order.
    """

    labels: dict[str, Any] = field(default_factory=dict)  # Hydra looks at the fields, and knows no tensors
    hidden_layers: tuple[str, ...] = ()
    uses_labels: ClassVar[bool] = True

    def __call__(self, step: TaskStep) -> Tensor:
        """Return the mean cross-entropy of the batch in nats."""
        labels = self.labels.get(step.task)
        if labels is None:
            raise InputError(
                f"objective: LabelledCrossEntropy has no labels of {step.task!r}. Add the callback that hands them "
                "over: +callbacks.labels._target_=adamerge.callbacks.HandOverLabels."
            )
        labels = labels[step.indices.cpu() % len(labels)].to(step.outputs.logits.device)  # views repeat the inputs
        return functional.cross_entropy(step.outputs.logits.float(), labels)


def stream_labels(stream: Unlabeled) -> Tensor:
    """Return the labels of the data set behind a stream, one per input (N,); unreadable ones have their stand-in's."""
    images = range(length_of(stream.source))
    return torch.tensor([int(stream.readable.first(i, stream.source.__getitem__)[1][1]) for i in images])


@torch.no_grad()
def search_task_arithmetic(model: MergedModel, data: UnlabeledTasks, grid: Sequence[float] = GRID) -> float:
    """Set the coefficients to the shared value with the best labelled accuracy on the adaptation inputs.

    Args:
        model: Its coefficients are set.
        data: The labels behind its streams are used; the scored inputs are not (under the split protocol).
        grid: Coefficients to try.

    Returns:
        The best value.
    """
    labels = {task: stream_labels(stream) for task, stream in data.streams.items()}

    def accuracy(value: float) -> float:
        constant(model.coefficients, value)
        params = model.merge()
        hits = [
            (
                model.logits(to(inputs, model.pool.device), task, params).argmax(-1).cpu()
                == labels[task][indices % len(labels[task])]
            )
            .float()
            .sum()
            / len(data.streams[task])
            for task in data.streams
            for inputs, indices in data.teacher_loader(task)
        ]
        return float(torch.stack(hits).sum())

    best = max(progress.track(grid, "Searching the best shared coefficient", "values"), key=accuracy)
    constant(model.coefficients, best)
    return best


def constant(coefficients: Coefficients, value: float) -> None:
    """Set every coefficient to one value: task arithmetic, or weight averaging at 1 / E."""
    coefficients.assign(torch.full_like(coefficients.raw, value))
