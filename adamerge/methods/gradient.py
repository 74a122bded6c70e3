"""Coefficients move by gradient descent on an unsupervised objective."""

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from adamerge.data import TaskBatch, UnlabeledTasks
from adamerge.errors import GuardError, InputError, did_you_mean
from adamerge.model import MergedModel, Outputs, TaskStep
from adamerge.objectives import Objective

log = logging.getLogger(__name__)

ADAM = functools.partial(torch.optim.Adam, lr=1e-3)  # AdaMerging's


class GradientMerging(LightningModule):
    r"""Minimize an objective over the merging coefficients with any torch optimizer.

    A training step returns the surrogate :math:`L + \langle \lambda - \bar\lambda, g \rangle` where
    :math:`\bar\lambda` is the detached :math:`\lambda` and :math:`g = dL/d\lambda` comes from the engine:
    its value is the loss and its gradient is g, so that Lightning's automatic optimization does clipping,
    accumulation, gradient scaling and the reduction over devices, and constraints differentiate themselves.

    Args:
        model: The merged model; its coefficients are the only parameters.
        objective: The loss, see :mod:`adamerge.objectives`.
        optimizer: Parameters to optimizer. Adam moves a coefficient by at most about lr per step.
        scheduler: Optimizer to learning-rate scheduler, stepped once per optimizer step.
        task_weights: Task to the factor of its loss, default 1.
        reduction: ``"mean"`` or ``"sum"`` over the tasks (AdaMerging sums; Adam is indifferent).
        micro_batch: Most inputs in one forward pass, in whole tasks; None for no limit.

    Raises:
        InputError: If an option is unknown or the objective is not callable.
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
        micro_batch: int | None = None,
    ) -> None:
        super().__init__()
        if not callable(objective):
            raise InputError(f"objective: expected a callable that takes a TaskStep, found {objective!r}.")
        if reduction not in ("mean", "sum"):
            raise InputError(f"method.reduction: expected 'mean' or 'sum', found {reduction!r}.")
        self.model = model
        self.objective = objective
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._task_weights = dict(task_weights or {})
        self._reduction = reduction
        self._micro_batch = micro_batch

    def on_fit_start(self) -> None:
        """Move what Lightning does not see to the device, and ask the teachers if the objective needs them."""
        self.model.to_device(self.device)
        data = self._datamodule()
        tasks: Mapping[str, Any] = data.streams if data else self._task_weights
        for task in self._task_weights:
            if task not in tasks:
                raise InputError(f"method.task_weights: no task {task!r}.{did_you_mean(task, tasks)}")
        if getattr(self.objective, "uses_teacher", False) and data:
            self._ask_teachers(data)

    def training_step(self, batch: Mapping[str, TaskBatch], batch_idx: int) -> Tensor:
        """Return the surrogate loss of one step; ``batch`` maps tasks to their unlabeled batches."""
        values = self.model.coefficients()
        weights = self._weights(batch)
        result = self.model.step(
            {task: data.inputs for task, data in batch.items()},
            functools.partial(self._loss, batch),
            values=values,
            weights=weights,
            hidden_layers=tuple(getattr(self.objective, "hidden_layers", ())),
            micro_batch=self._micro_batch,
            scale=self._loss_scale(),
        )
        loss: Tensor = torch.stack([result.losses[task] * weights[task] for task in batch]).sum()
        self._guard(result.losses, result.gradient)
        self._report(loss, result.losses, values, sum(len(data.indices) for data in batch.values()))
        surrogate: Tensor = loss + ((values - values.detach()) * result.gradient).sum()
        return surrogate

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

    def _loss(
        self,
        batch: Mapping[str, TaskBatch],
        task: str,
        outputs: Outputs,
        coefficients: Tensor,
        forward: Callable[[Tensor, str], Outputs],
    ) -> Tensor:
        """Hand one task's step to the objective, and check what comes back."""
        inputs, indices = batch[task]
        loss = self.objective(TaskStep(task, inputs, indices, outputs, coefficients, self._teacher, forward))
        name = type(self.objective).__name__
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise InputError(
                f"Objective {name} must return a scalar tensor, found {found}. Take the mean over the batch."
            )
        if not loss.requires_grad:
            raise InputError(
                f"Objective {name} returned a loss that does not depend on the merged model's outputs (task {task!r}). "
                "Compute it from step.outputs, without detach() or no_grad()."
            )
        return loss

    def _teacher(self, task: str, inputs: Tensor, indices: Tensor) -> Outputs:
        return self.model.teacher(task, inputs, indices, tuple(getattr(self.objective, "hidden_layers", ())))

    def _ask_teachers(self, data: UnlabeledTasks) -> None:
        """Fill the teacher cache in a fixed order, one expert in memory at a time."""
        steps = self.trainer.max_steps * self.trainer.accumulate_grad_batches if self.trainer.max_steps > 0 else None
        hidden = tuple(getattr(self.objective, "hidden_layers", ()))
        console = Console(stderr=True)
        hide = not (console.is_terminal and self.trainer.is_global_zero and self.trainer.progress_bar_callback)
        for task in track(data.streams, "Asking the experts", console=console, transient=True, disable=hide):
            batches = [TaskBatch(*batch) for batch in data.teacher_loader(task, steps)]
            inputs = ((task, batch.inputs.to(self.device)) for batch in batches)
            with self.trainer.precision_plugin.forward_context():
                outputs = self.model.expert_outputs(self.model.teacher_of(task), inputs, hidden)
                for batch, output in zip(batches, outputs, strict=True):
                    self.model.teacher_cache.put(task, batch.indices, output)

    def _datamodule(self) -> UnlabeledTasks | None:
        data = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, UnlabeledTasks) else None

    def _weights(self, batch: Mapping[str, TaskBatch]) -> dict[str, float]:
        share = 1 / len(batch) if self._reduction == "mean" else 1.0
        return {task: share * self._task_weights.get(task, 1.0) for task in batch}

    def _loss_scale(self) -> float | Tensor:
        """The factor of the inner backward pass, so that fp16 gradients do not underflow."""
        plugin = self.trainer.precision_plugin
        scaler = plugin.scaler if isinstance(plugin, MixedPrecision) else None
        return 1.0 if scaler is None else scaler.get_scale()

    def _guard(self, losses: Mapping[str, Tensor], gradient: Tensor) -> None:
        """Stop on NaN or infinity before the optimizer sees it; the coefficients keep their last good values."""
        bad = [task for task, loss in losses.items() if not torch.isfinite(loss)]
        if bad:
            raise GuardError(
                f"Step {self.global_step}: the loss of task {bad[0]!r} is {losses[bad[0]].item()}. The coefficients "
                "keep their last good values. Lower the learning rate, or look at that task's images."
            )
        scaled = isinstance(self.trainer.precision_plugin, MixedPrecision) and self.trainer.precision_plugin.scaler
        if not scaled and not torch.isfinite(gradient).all():
            expert, group = (~torch.isfinite(gradient)).nonzero()[0].tolist()
            raise GuardError(
                f"Step {self.global_step}: the gradient of the coefficient of expert "
                f"{self.model.pool.expert_names[expert]!r}, group {self.model.coefficients.group_names[group]!r}, "
                "is not finite. The coefficients keep their last good values. Lower the learning rate."
            )

    def _report(self, loss: Tensor, losses: Mapping[str, Tensor], values: Tensor, batch_size: int) -> None:
        values = values.detach()
        travel = (values - self.model.coefficients.initial).abs().mean()
        self.log("adapt/loss", loss, prog_bar=True, batch_size=batch_size)
        self.log("adapt/coefficient", values.mean(), prog_bar=True, batch_size=batch_size)
        scalars = {f"adapt/loss/{task}": value for task, value in losses.items()}
        scalars |= {"adapt/coefficient/min": values.min(), "adapt/coefficient/max": values.max()}
        self.log_dict({**scalars, "adapt/travel": travel}, batch_size=batch_size)
