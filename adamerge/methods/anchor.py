"""The pull of coefficients back to where they started: the fewer the samples, the stronger.

Legend: E experts, G groups.
"""

from typing import Literal

from torch import Tensor

from adamerge.data.datasets import length_of
from adamerge.data.unlabeled_tasks import UnlabeledTasks
from adamerge.errors import InputError
from adamerge.methods.step import StepResult

Anchor = float | Literal["auto"]
EVIDENCE = 150.0  # samples of all tasks whose evidence the start weighs as much as, per nat and unit of displacement


def strength(anchor: Anchor, data: UnlabeledTasks | None, means: float = 1.0) -> float:
    r"""Return A of the penalty :math:`A \frac{1}{EG} \sum_{e,g} (\lambda_{eg} - \lambda^0_{eg})^2`, in nats.

    ``auto`` is :math:`A = 150 / N` with N samples of all tasks (views of a sample count once): per coefficient
    :math:`150 / (N E G)`. The loss is a mean over N samples, so that this is a normal prior around the start, which
    more samples outweigh. As a mean over coefficients it is one on how far the weights move, relative to the task
    vectors, whatever the granularity. Where a step's loss is a sum of several means, A counts as often.

    Args:
        anchor: A number, taken as it is, or ``auto``.
        data: The samples.
        means: Of how many means over samples the loss is the sum.

    Raises:
        InputError: If the number of samples is not known.
    """
    if anchor != "auto":
        return anchor
    if data is None:
        raise InputError(
            "method.anchor=auto: the number of samples is not known, as the data are no UnlabeledTasks. Give a number."
        )
    return means * EVIDENCE / sum(length_of(stream.source) for stream in data.streams.values())


def penalised(
    loss: Tensor, result: StepResult, values: Tensor, initial: Tensor, strength: float
) -> tuple[Tensor, StepResult]:
    """Add the penalty to a step's loss and gradient (E, G); the losses by task stay those of the objective.

    >>> import torch
    >>> step = StepResult({}, torch.zeros(1, 2))
    >>> loss, step = penalised(torch.tensor(1.0), step, torch.tensor([[1.0, 3.0]]), torch.ones(1, 2), strength=0.5)
    >>> loss, step.gradient
    (tensor(2.), tensor([[0., 1.]]))
    """
    change = values - initial
    return (
        loss + strength * change.square().mean(),
        StepResult(result.losses, result.gradient + change * (2 * strength / change.numel())),
    )
