"""Coefficients move by gradient descent on an unsupervised objective."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from adamerge.methods.method import MergingMethod
from adamerge.methods.step import StepOptions
from adamerge.model.encoder import MicroBatch
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
        task_weights: This and what follows: see :class:`~adamerge.methods.step.StepOptions`.
        reduction: Of the tasks' losses.
        micro_batch: Most inputs in one forward pass.
        on_nonfinite: What a NaN or infinite number does.
        max_skipped: Skipped batches, beyond which the run stops after all.
        anchor: Pull to the start: a factor, or ``"auto"``.

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
        micro_batch: MicroBatch = "auto",
        on_nonfinite: Literal["stop", "skip"] = "stop",
        max_skipped: int = 10,
        anchor: float | Literal["auto"] = 0.0,
    ) -> None:
        options = StepOptions(task_weights, reduction, micro_batch, on_nonfinite, max_skipped, anchor)
        super().__init__(model, objective, options)
        self._optimizer = optimizer
        self._scheduler = scheduler

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then project the coefficients back into their constraint's set."""
        super().optimizer_step(*args, **kwargs)
        self.model.coefficients.project()

    def configure_optimizers(self) -> Any:
        """Return the optimizer of what is learned, and its scheduler."""
        optimizer = self._optimizer(self.learned)
        if self._scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._scheduler(optimizer), "interval": "step"}}
