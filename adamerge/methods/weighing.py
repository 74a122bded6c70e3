"""How batches whose samples have unequal numbers of rows count: by their rows, wherever these lie.

A task's loss is the mean over the rows of its whole batch. Where that batch is in parts, on several devices or in
batches whose gradients are accumulated, the mean of the parts' means would give each row of a short part more weight.
"""

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from adamerge.data.batch import Outputs, TaskBatch
from adamerge.methods.step import StepResult
from adamerge.model.merged_model import MergedModel
from adamerge.system import ranks


class Window:
    """The batches of one step whose gradients are accumulated.

    They run when the last of them has come: before, it is not known how much the rows of each count.
    """

    def __init__(self) -> None:
        self._batches: list[Mapping[str, TaskBatch]] = []

    def complete(self, batch: Mapping[str, TaskBatch], number: int, trainer: Trainer) -> list[Mapping[str, TaskBatch]]:
        """Add a batch, the ``number``-th of an epoch; return all of the step if it is its last, else none."""
        self._batches.append(batch)
        if (number + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return []
        batches, self._batches = self._batches, []
        return batches


def row_shares(
    model: MergedModel, batches: Sequence[Mapping[str, TaskBatch]], tasks: Sequence[str]
) -> list[dict[str, float]]:
    """Return, for each batch, the part of every task's rows that it has, times the number of devices.

    All devices must call. The mean over devices of the sum over batches of (share x mean over the batch's rows) is the
    mean over all rows.

    Args:
        model: Counts the rows of inputs.
        batches: This device's parts of one step, task to batch.
        tasks: Those of all devices, in the same order on each.
    """
    device = model.pool.device
    counts = torch.tensor(
        [[model.count_rows(batch[task].inputs) if task in batch else 0 for task in tasks] for batch in batches],
        dtype=torch.float32 if device.type == "mps" else torch.float64,
        device=device,
    )
    shares = counts * ranks.count() / ranks.total(counts.sum(0)).clamp(min=1)
    return [dict(zip(tasks, row, strict=True)) for row in shares.tolist()]


def shares_of_parts(outputs: Outputs, parts: Sequence[slice]) -> list[float | None]:
    """Return the factor of each part of a batch, 1 on average, so that the sum of their means is one of all rows.

    None stands for 1, where all rows of a batch count.
    """
    if outputs.valid is None or len(parts) == 1:
        return [None] * len(parts)
    counts = torch.stack([outputs.valid[part].sum() for part in parts]).tolist()
    return [count * len(parts) / max(1, sum(counts)) for count in counts]


def has_rows(outputs: Outputs) -> bool:
    """Whether any row of a batch counts: of none there is no mean."""
    return outputs.valid is None or bool(outputs.valid.any())


def summed(results: Sequence[StepResult]) -> StepResult:
    """Return the sum of the results of batches whose shares of a step add up to one."""
    losses = {task: torch.stack([result.losses[task] for result in results]).sum() for task in results[0].losses}
    return StepResult(losses, torch.stack([result.gradient for result in results]).sum(0))


def of_all_devices(
    loss: Tensor, result: StepResult, shares: Mapping[str, float], weights: Mapping[str, float], values: Tensor
) -> tuple[Tensor, StepResult]:
    """Return the loss and the losses by task of all devices, beside this device's gradient; all must call.

    A gradient that is not finite on one device is not on any.

    Args:
        loss: This device's.
        result: This device's.
        shares: Its part of each task of all devices, times their number.
        weights: The factor of each task's loss.
        values: The coefficients (E, G), whose dtype the losses get.
    """
    if ranks.count() == 1:
        parts = {task: value * shares[task] for task, value in result.losses.items()}
        return loss, result if set(shares.values()) == {1.0} else StepResult(parts, result.gradient)
    zero = values.new_zeros(())
    losses = [result.losses[task] * share if task in result.losses else zero for task, share in shares.items()]
    finite = (result.gradient * 0).sum()  # NaN unless it is
    sums = ranks.total(torch.stack([part.to(values) for part in (*losses, finite)]))
    *means, finite = (sums / ranks.count()).unbind()
    by_task = dict(zip(shares, means, strict=True))
    gradient = result.gradient if torch.isfinite(finite) else ranks.total(result.gradient)
    return torch.stack([by_task[task] * weights[task] for task in by_task]).sum(), StepResult(by_task, gradient)
