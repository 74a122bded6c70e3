"""Where a NaN or an infinite number came from."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from adamerge.data.batch import TaskBatch
from adamerge.model.merged_model import MergedModel
from adamerge.system import ranks

KEPT = "The coefficients keep their last good values."

# Runs a step again on some of its tasks, and hands each parameter's name and gradient (*S) to a function.
Again = Callable[[Mapping[str, TaskBatch], Callable[[str, Tensor], None]], object]


def loss_problem(losses: Mapping[str, Tensor], batch: Mapping[str, TaskBatch]) -> str | None:
    """Say which loss is not finite, and on which images; None where all are."""
    for task, loss in losses.items():
        if not torch.isfinite(loss):
            at = f"on the images at {_positions(batch[task])}" if ranks.count() == 1 else "on images"
            return (
                f"the loss of task {task!r} is {loss.item()} {at} of its stream. {KEPT} "
                "Look at them, or lower the learning rate."
            )
    return None


def gradient_problem(model: MergedModel, gradient: Tensor, batch: Mapping[str, TaskBatch], again: Again) -> str | None:
    """Say of which coefficient the gradient (E, G) is not finite, and where that came from; None where it is."""
    bad = ~torch.isfinite(gradient)
    if not bad.any():
        return None
    return (
        f"the gradient of the coefficient of {coefficient_name(model, bad)} is not finite{_origin(batch, again)}. "
        f"{KEPT} Lower the learning rate."
    )


def coefficient_name(model: MergedModel, mask: Tensor) -> str:
    """Name the first coefficient of a mask (E, G)."""
    expert, group = mask.nonzero()[0].tolist()
    return f"expert {model.pool.expert_names[expert]!r}, group {model.coefficients.group_names[group]!r}"


def _origin(batch: Mapping[str, TaskBatch], again: Again) -> str:
    """Find the task and the tensor whose gradient is not finite, by running the step again task by task."""
    if ranks.count() > 1:  # devices that wait for one another would wait for ever
        return ""
    tensors: list[str] = []

    def look(name: str, gradient: Tensor) -> None:
        if not torch.isfinite(gradient).all():
            tensors.append(name)

    for task, data in batch.items():
        again({task: data}, look)
        if tensors:
            return f": tensor {tensors[0]!r} for task {task!r}, images at {_positions(data)} of its stream"
    return ""


def _positions(batch: TaskBatch, limit: int = 8) -> str:
    """Name the positions of a batch's first images."""
    positions = batch.indices.tolist()
    return f"positions {', '.join(map(str, positions[:limit]))}{', ...' if len(positions) > limit else ''}"
