"""Reference points that use labels, kept apart: what they find is marked ``uses_labels`` wherever it is shown."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from adamerge.coefficients import Coefficients
from adamerge.data import Unlabeled
from adamerge.model import MergedModel, TaskStep

GRID = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7)


@dataclass(frozen=True)
class LabelledCrossEntropy:
    """Cross-entropy to the true labels: the oracle that bounds what a granularity can reach.

    A stream never carries labels, so they are handed over here, by the caller, beside it.

    Args:
        labels: Task to the labels of its adaptation stream, (N,), in the stream's order.
    """

    labels: Mapping[str, Tensor]
    hidden_layers: tuple[str, ...] = field(default=())
    uses_labels: ClassVar[bool] = True

    def __call__(self, step: TaskStep) -> Tensor:
        """Return the mean cross-entropy of the batch in nats."""
        labels = self.labels[step.task][step.indices.cpu()].to(step.outputs.logits.device)
        return functional.cross_entropy(step.outputs.logits.float(), labels)


def stream_labels(stream: Unlabeled, labelled: Dataset[Any]) -> Tensor:
    """Return the labels of the data set behind a stream, (N,), for :class:`LabelledCrossEntropy`."""
    return torch.tensor([int(labelled[i][1]) for i in range(len(stream))])


@torch.no_grad()
def search_task_arithmetic(
    model: MergedModel, accuracy: Callable[[MergedModel], float], grid: Sequence[float] = GRID
) -> float:
    """Return the shared coefficient with the best labelled accuracy.

    Args:
        model: Its coefficients are set to the best value.
        accuracy: Scores the model on labelled images that are not the test images.
        grid: Coefficients to try.
    """

    def score(value: float) -> float:
        model.coefficients.assign(torch.full_like(model.coefficients.raw, value))
        return accuracy(model)

    best = max(grid, key=score)
    score(best)
    return best


def constant(coefficients: Coefficients, value: float) -> None:
    """Set every coefficient to one value: task arithmetic, or weight averaging at 1 / E."""
    coefficients.assign(torch.full_like(coefficients.raw, value))
