"""What a step is told, and what it gives."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from adamerge.errors import InputError
from adamerge.model.encoder import MicroBatch
from adamerge.model.merged_model import TaskStep

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

    Raises:
        InputError: If an option has another value.
    """

    task_weights: Mapping[str, float] | None = None
    reduction: Literal["mean", "sum"] = "mean"
    micro_batch: MicroBatch = "auto"
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped: int = 10

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise InputError(f"method.reduction: expected 'mean' or 'sum', found {self.reduction!r}.")
        if self.on_nonfinite not in ("stop", "skip"):
            raise InputError(f"method.on_nonfinite: expected 'stop' or 'skip', found {self.on_nonfinite!r}.")
        if self.max_skipped < 0:
            raise InputError(f"method.max_skipped: expected a number of batches >= 0, found {self.max_skipped}.")


@dataclass
class StepResult:
    """Losses by task (detached scalars) and the gradient of their weighted sum, (E, G)."""

    losses: dict[str, Tensor]
    gradient: Tensor
