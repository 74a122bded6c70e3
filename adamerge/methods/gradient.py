"""Coefficients move by gradient descent on an unsupervised objective."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from adamerge.methods.method import MergingMethod
from adamerge.methods.step import StepOptions
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
        options: Those of :class:`~adamerge.methods.step.StepOptions`.

    Raises:
        InputError: If an option is unknown or the objective cannot be called with a step.
    """

    def __init__(
        self,
        model: MergedModel,
        objective: Objective,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = ADAM,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, objective, StepOptions(**options))
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
