"""Coefficients move by gradient descent on an unsupervised objective."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from adamerge.methods.method import MergingMethod, OnNonfinite
from adamerge.model.merged_model import MergedModel
from adamerge.objectives import Objective

ADAM = functools.partial(torch.optim.Adam, lr=1e-3)  # AdaMerging's


class GradientMerging(MergingMethod):
    """Minimize an objective over the merging coefficients with any torch optimizer.

    Args:
        model: The merged model; its coefficients are the only parameters.
        objective: The loss, see :mod:`adamerge.objectives`.
        optimizer: Parameters to optimizer. Adam moves a coefficient by at most about lr per step.
        scheduler: Optimizer to learning-rate scheduler, stepped once per optimizer step.
        task_weights: Task to the factor of its loss, default 1.
        reduction: ``"mean"`` or ``"sum"`` over the tasks (AdaMerging sums; Adam is indifferent).
        micro_batch: Most inputs in one forward pass, in whole tasks; ``"auto"`` for a rule by size, None for no limit.
        on_nonfinite: ``"stop"`` the run where a loss or gradient is NaN or infinite, or ``"skip"`` the batch.
        max_skipped: Skipped batches, beyond which the run stops after all.

    Raises:
        InputError: If an option is unknown or the objective cannot be called with a step.
    """

    def __init__(
        self,
        model: MergedModel,
        objective: Objective,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = ADAM,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        *,
        task_weights: Mapping[str, float] | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        micro_batch: int | Literal["auto"] | None = "auto",
        on_nonfinite: OnNonfinite = "stop",
        max_skipped: int = 10,
    ) -> None:
        super().__init__(
            model, objective, task_weights=task_weights, reduction=reduction, micro_batch=micro_batch,
            on_nonfinite=on_nonfinite, max_skipped=max_skipped,
        )  # fmt: skip
        self._optimizer = optimizer
        self._scheduler = scheduler

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then project the coefficients back into their constraint's set."""
        super().optimizer_step(*args, **kwargs)
        self.model.coefficients.project()

    def configure_optimizers(self) -> Any:
        """Return the optimizer of the coefficients, and its scheduler."""
        optimizer = self._optimizer([self.model.coefficients.raw])
        if self._scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._scheduler(optimizer), "interval": "step"}}
