"""A step's options, and its result."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal

from torch import Tensor

from adamerge.errors import InputError, check_choice, check_number
from adamerge.model.encoder import MicroBatch
from adamerge.model.task_step import TaskStep

Observer = Callable[[TaskStep], None]


@dataclass(frozen=True)
class StepOptions:
    """How the tasks count in a step, and what becomes of a step that is not finite.

    Args:
        task_weights: Task to the factor of its loss, default 1.
        reduction: ``"mean"`` or ``"sum"`` over the tasks (AdaMerging sums; Adam is indifferent).
        micro_batch: Most inputs in one forward pass, in whole tasks; ``"auto"`` for a rule by size, None for no limit.
        on_nonfinite: What a loss or gradient that is NaN or infinite does: ``"stop"`` the run, or ``"skip"`` the
            batch: coefficients and optimizer stay as they are.
        max_skipped: Skipped batches, beyond which the run stops after all.
        anchor: Factor of the mean squared distance of the coefficients from their start, in the objective's unit;
            ``"auto"`` for a rule by the number of samples, see :func:`~adamerge.methods.anchor.strength`.

    Raises:
        InputError: If an option has another value.
    """

    task_weights: Mapping[str, float] | None = None
    reduction: Literal["mean", "sum"] = "mean"
    micro_batch: MicroBatch = "auto"
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped: int = 10
    anchor: float | Literal["auto"] = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.task_weights, (Mapping, NoneType)):
            raise InputError(f"method.task_weights: expected a factor by task, found {self.task_weights!r}.")
        for task, factor in (self.task_weights or {}).items():
            check_number(f"method.task_weights.{task}", factor)
        check_choice("method.reduction", self.reduction, ("mean", "sum"))
        if self.micro_batch not in ("auto", None):
            check_number("method.micro_batch", self.micro_batch, 1, whole=True)
        check_choice("method.on_nonfinite", self.on_nonfinite, ("stop", "skip"))
        check_number("method.max_skipped", self.max_skipped, 0, whole=True)
        if self.anchor != "auto":
            check_number("method.anchor", self.anchor, 0)


@dataclass
class StepResult:
    """Losses by task (detached scalars) and the gradient of their weighted sum, (E, G)."""

    losses: dict[str, Tensor]
    gradient: Tensor


def report(method: Any, loss: Tensor, losses: Mapping[str, Tensor], values: Tensor, batch_size: int) -> None:
    """Log a step: the losses and, if they are learned, where the coefficients (E, G) stand."""
    method.log("adapt/loss", loss, prog_bar=True, batch_size=batch_size)
    by_task = {f"adapt/loss/{task}": value for task, value in losses.items()}
    if not method.learns_coefficients:
        method.log_dict(by_task, batch_size=batch_size)
        return
    coefficients, names = method.model.coefficients, method.model.pool.expert_names
    travel = (values - coefficients.initial).abs().mean()
    method.log("adapt/coefficient", values.mean(), prog_bar=True, batch_size=batch_size)
    scalars = {**by_task, "adapt/coefficient/min": values.min(), "adapt/coefficient/max": values.max()}
    scalars |= {f"coefficient/{name}": mean for name, mean in zip(names, values.mean(1), strict=True)}
    method.log_dict({**scalars, "adapt/travel": travel}, batch_size=batch_size)
