"""What an objective is held to, before the first step and in every step."""

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from adamerge.errors import InputError, did_you_mean
from adamerge.objectives import Objective
from adamerge.system import ranks


def check_loss(loss: object, objective: Objective, task: str) -> Tensor:
    """Return what an objective gave for a task.

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
                "task's images, and at logarithms and divisions in the objective."
            )
    if ranks.total(gradient).any():
        return
    moved, _ = step(values * 0.5 + 0.1, False)
    if all(torch.equal(moved[task], loss) for task, loss in losses.items()):
        raise InputError(
            f"Objective {name} does not change with the coefficients on the first batch. Compute it from "
            "step.outputs, and check that a filter does not leave every sample out."
        )
