"""What a method is held to: its objective before and in every step, and numbers that are finite."""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from adamerge.data.batch import Outputs, TaskBatch
from adamerge.errors import InputError, did_you_mean, shorten
from adamerge.model.merged_model import MergedModel
from adamerge.objectives import Objective
from adamerge.system import ranks

KEPT = "The coefficients keep their last good values."

# Runs a step again on some of its tasks, and hands each parameter's name and gradient (*S) to a function.
Again = Callable[[Mapping[str, TaskBatch], Callable[[str, Tensor], None]], object]


def check_same_pool(saved: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Refuse to go on with another pool than a checkpoint's; both by name, to the hash of the content.

    Raises:
        InputError: If base or experts have changed since the checkpoint was saved.
    """
    if saved and list(saved) != list(here):
        raise InputError(f"The checkpoint is for the experts {list(saved)[1:]}, but the pool has {list(here)[1:]}.")
    changed = [name for name in saved if saved[name] != here[name]]
    if changed:
        raise InputError(
            f"The checkpoint cannot be resumed: the content of {shorten(changed)} has changed since it was saved. "
            "Restore the files, or start a new run."
        )


def check_rows(outputs: Outputs, model: MergedModel, trainer: Trainer) -> None:
    """Refuse a batch in several parts, whose rows that count are known only once the network has run.

    Args:
        outputs: Of one part.
        model: Whose ``valid`` would have told it before.
        trainer: Says how many batches' gradients are accumulated.

    Raises:
        InputError: If so: the parts would be weighed by their samples.
    """
    if outputs.valid is None or model.valid is not None:
        return
    if ranks.count() * trainer.accumulate_grad_batches > 1:
        raise InputError(
            "backbone: read() says which rows count (Outputs.valid), but a step in several parts, on devices or with "
            "accumulate_grad_batches, has to know it before. Give the backbone a method valid(inputs) that returns it "
            "(of a MergedModel: valid=)."
        )


def check_loss(loss: object, objective: Objective, task: str) -> Tensor:
    """Check the loss that an objective gave for a task, and return it.

    Raises:
        InputError: If that is no scalar, or autograd is on and it has no graph.
    """
    name = type(objective).__name__
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        kind = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InputError(f"Objective {name} must return a scalar tensor, found {kind}. Take the mean over the batch.")
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise InputError(
            f"Objective {name} returned a loss that does not depend on the merged model's outputs (task {task!r}). "
            "Compute it from step.outputs, without detach() or no_grad()."
        )
    return loss


def check_task_weights(method: Mapping[str, float], objective: Objective, tasks: Collection[str]) -> None:
    """Refuse weights of tasks that do not exist, of a method or of an objective."""
    by_option = {"method": method, "objective": getattr(objective, "task_weights", None) or {}}
    for option, weights in by_option.items():
        for task in weights:
            if task not in tasks:
                raise InputError(f"{option}.task_weights: no task {task!r}.{did_you_mean(task, tasks)}")


def check_first_step(
    objective: Objective, step: Callable[[Tensor, bool], tuple[Mapping[str, Tensor], Tensor]], values: Tensor
) -> None:
    """Refuse an objective that is not finite or does not feel the coefficients.

    Args:
        objective: Named in messages.
        step: Coefficients (E, G), and whether their gradient is needed, to the losses by task and the gradient (E, G).
        values: The coefficients to start from.
    """
    name = type(objective).__name__
    losses, gradient = step(values, True)
    for task, loss in losses.items():
        if not torch.isfinite(loss):
            raise InputError(
                f"Objective {name} gives {loss.item()} for task {task!r} before the first step. Look at that "
                "task's inputs, and at logarithms and divisions in the objective."
            )
    if ranks.total(gradient).any():
        return
    moved, _ = step(values * 0.5 + 0.1, False)
    if all(torch.equal(moved[task], loss) for task, loss in losses.items()):
        raise InputError(
            f"Objective {name} does not change with the coefficients on the first batch. Compute it from "
            "step.outputs, and check that a filter does not leave every sample out."
        )


def loss_problem(losses: Mapping[str, Tensor], batch: Mapping[str, TaskBatch]) -> str | None:
    """Say which loss is not finite, and on which inputs; None where all are."""
    for task, loss in losses.items():
        if not torch.isfinite(loss):
            at = f"on the inputs at {_positions(batch[task])}" if ranks.count() == 1 else "on inputs"
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


def taken_back(learned: Sequence[Tensor], good: Sequence[Tensor]) -> tuple[int, Tensor] | None:
    """Put back the values before a step, in place, where one is no longer finite.

    Returns:
        The number of the first tensor that was not finite, and where, as a mask of its shape; None where all are.
    """
    for number, tensor in enumerate(learned):
        bad = ~torch.isfinite(tensor.detach())
        if bad.any():
            for current, value in zip(learned, good, strict=True):
                current.data.copy_(value)
            return number, bad
    return None


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
            return f": tensor {tensors[0]!r} for task {task!r}, inputs at {_positions(data)} of its stream"
    return ""


def _positions(batch: TaskBatch, limit: int = 8) -> str:
    """Name the positions of a batch's first inputs."""
    positions = batch.indices.tolist()
    return f"positions {', '.join(map(str, positions[:limit]))}{', ...' if len(positions) > limit else ''}"
