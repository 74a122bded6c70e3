"""What all methods share: one step of the objective on the merged model, its teachers, guards and reports."""

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from adamerge.data.batch import Outputs, TaskBatch, take
from adamerge.data.random_states import generator_states, set_generator_states
from adamerge.data.unlabeled_tasks import UnlabeledTasks
from adamerge.errors import NonfiniteError
from adamerge.methods import checks
from adamerge.methods.anchor import penalised, strength
from adamerge.methods.step import Observer, StepOptions, StepResult, report
from adamerge.methods.teaching import Teaching
from adamerge.methods.trial import try_objective
from adamerge.methods.weighing import Window, has_rows, of_all_devices, row_shares, shares_of_parts, summed
from adamerge.model.coefficients import Coefficients
from adamerge.model.merged_encoder import MergedEncoder
from adamerge.model.merged_model import MergedModel
from adamerge.model.task_step import TaskStep
from adamerge.model.teacher_files import TeacherFiles
from adamerge.objectives import Objective, check_objective
from adamerge.system import ranks

log = logging.getLogger(__name__)


def data_of(trainer: Trainer) -> UnlabeledTasks | None:
    """Return the unlabeled tasks that a trainer fits on; None where its data are of another kind."""
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, UnlabeledTasks) else None


class MergingMethod(LightningModule):
    r"""Hand each task's batch to an objective; how the coefficients move is for the methods to say.

    A training step returns the surrogate :math:`L + \langle \lambda - \bar\lambda, g \rangle` where
    :math:`\bar\lambda` is the detached :math:`\lambda` and :math:`g = dL/d\lambda` comes from the engine:
    its value is the loss and its gradient is g, so that Lightning's automatic optimization does clipping,
    accumulation, gradient scaling and the reduction over devices, and constraints differentiate themselves.

    On several devices each runs its part of a step: g is averaged by Lightning, (E, G) numbers per step; the losses,
    one number per task, are summed here, so that all devices see the same and act alike.

    Args:
        model: The merged model; its coefficients are the only parameters.
        objective: The loss, see :mod:`adamerge.objectives`.
        options: How the tasks count, and what becomes of a step that is not finite.

    Raises:
        InputError: If an option is unknown or the objective cannot be called with a step.

    Attributes:
        task_weights: Task to factor; callbacks may change it between steps.
        uses_teacher: Whether the experts are asked before the first step; callbacks may set it in ``setup``.
        observers: Called with each :class:`TaskStep` of a training step; they must not change it.
        teacher_files: A folder that keeps the experts' outputs from run to run; None to ask them in each run.
        recipe: JSON-ready content for the checkpoints, such as the resolved configuration.
        start: The same: file and hash of the coefficients that the run starts from, if any.
        skipped: Batches skipped so far because a loss or gradient was not finite.
        evidence: JSON-ready facts about the result for ``merge.json``, which a callback has measured.
        learns_coefficients: Whether the result is a merge; else it is the state dict that :meth:`exported` returns.
    """

    learns_coefficients: ClassVar[bool] = True

    def __init__(self, model: MergedModel, objective: Objective, options: StepOptions | None = None) -> None:
        super().__init__()
        check_objective(objective)
        self.model = model
        self.objective = objective
        self.options = options or StepOptions()
        self.task_weights = dict(self.options.task_weights or {})
        self.uses_teacher = bool(getattr(objective, "uses_teacher", False))
        self.observers: list[Observer] = []
        self.teacher_files: TeacherFiles | None = None
        self.recipe: Mapping[str, Any] = {}
        self.start: Mapping[str, Any] = {}
        self.skipped = 0
        self.evidence: Mapping[str, Any] = {}
        self._strength = 0.0  # of the anchor, known when a fit begins
        self._has_gradient = False  # whether any batch of the step to come was not skipped
        self._window = Window()
        self._generators: Mapping[str, Any] | None = None  # of a checkpoint, until the first step after it
        # Constants, the same on all devices: torch would broadcast them before each step.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]

    def on_fit_start(self) -> None:
        """Move what Lightning does not see to the device, ask the teachers if needed, and try the objective."""
        self.model.to_device(self.device)
        self.model.teacher_cache.clear()
        data = data_of(self.trainer)
        means = math.fsum(self.weights(data.streams).values()) * data.batches_per_step if data is not None else 1.0
        self._strength = strength(self.options.anchor, data, means)
        if data is not None:
            checks.check_task_weights(self.task_weights, self.objective, data.streams)
            if self.uses_teacher:
                self._teaching.ask_all(data)
            try_objective(self, data)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record which pool the coefficients are for, the recipe, and the states of the random generators."""
        facts = {"recipe": dict(self.recipe), "start": dict(self.start), "threads": torch.get_num_threads()}
        facts |= {"skipped": self.skipped, "generators": generator_states()}
        checkpoint.update({"pool": self.model.pool.hashes(), **facts})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with a checkpoint; raise :class:`~adamerge.InputError` where it is another pool's."""
        checks.check_same_pool(checkpoint.get("pool", {}), self.model.pool.hashes())
        threads = torch.get_num_threads()
        if checkpoint.get("threads", threads) != threads:
            log.warning(
                "The run had %d threads, this process has %d: its result may differ in the last bits. For the same "
                "bytes set OMP_NUM_THREADS=%d.", checkpoint["threads"], threads, checkpoint["threads"]
            )  # fmt: skip
        self.skipped = checkpoint.get("skipped", 0)
        self._generators = checkpoint.get("generators")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Go on with a checkpoint's random numbers; not before, as the preparations of a run draw some too."""
        if self._generators is not None:
            set_generator_states(self._generators)
            self._generators = None

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Leave the optimizer nothing to do where all batches of a step were skipped; a gradient of 0 would move it."""
        for parameter in self.learned if not self._has_gradient else ():
            parameter.grad = None
        self._has_gradient = False

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step; take it back, and raise :class:`NonfiniteError`, where what is learned is no longer finite."""
        good = [parameter.detach().clone() for parameter in self.learned]
        super().optimizer_step(*args, **kwargs)
        if (bad := checks.taken_back(self.learned, good)) is not None:
            problem = f"Step {self.global_step}: the step made {self._name_of(*bad)} infinite or NaN."
            raise NonfiniteError(f"{problem} {checks.KEPT} Lower the learning rate.")

    @property
    def learned(self) -> list[nn.Parameter]:
        """The parameters that the optimizer moves."""
        return [self.model.coefficients.raw]

    def _name_of(self, number: int, mask: Tensor) -> str:
        """Name the first entry of a mask on one of :attr:`learned`."""
        return f"the coefficient of {checks.coefficient_name(self.model, mask)}"

    def training_step(self, batch: Mapping[str, TaskBatch], batch_idx: int) -> Tensor:
        """Return the surrogate loss of one step, 0 to skip it; ``batch`` maps tasks to their unlabeled batches."""
        values = self.model.coefficients()
        batches = [batch] if self.model.valid is None else self._window.complete(batch, batch_idx, self.trainer)
        nothing = self._surrogate(values.new_zeros(()), values, None)
        if not batches:
            return nothing
        scale = self._scaler.get_scale() if self._scaler else 1.0  # so that fp16 gradients do not underflow
        loss, result = self.step(
            batches, values, scale=scale, observers=self.observers, on_gradient=self.on_parameter_gradient
        )
        if (problem := self._problem(batches, values, result)) is not None:  # the same on all devices
            self._skip(problem)
            return nothing
        self._has_gradient = True
        if self._strength:
            loss, result = self._anchored(loss, result, values.detach())
        samples = sum(len(data.indices) for part in batches for data in part.values())
        report(self, loss, result.losses, values.detach(), samples)
        surrogate = self._surrogate(loss, values, result)
        factor = 1 if self.model.valid is None else self.trainer.accumulate_grad_batches  # by which Lightning divides
        return surrogate if factor == 1 else surrogate * factor

    def _anchored(self, loss: Tensor, result: StepResult, values: Tensor) -> tuple[Tensor, StepResult]:
        """Add the anchor to a step's loss and gradient."""
        return penalised(loss, result, values, self.model.coefficients.initial, self._strength)

    def _surrogate(self, loss: Tensor, values: Tensor, result: StepResult | None) -> Tensor:
        """Return a scalar of the loss's value, whose gradient is the step's; without gradient where there is none."""
        change = values - values.detach()
        surrogate: Tensor = loss + (change * (0.0 if result is None else result.gradient)).sum()
        return surrogate

    def step(
        self, batches: Sequence[Mapping[str, TaskBatch]], values: Tensor, **options: Any
    ) -> tuple[Tensor, StepResult]:
        """Run this device's part of a step.

        Args:
            batches: Task to its unlabeled batch; several where these are one step in parts.
            values: Coefficients (E, G).
            options: Those of :meth:`run`.

        Returns:
            The total loss, the losses by task, both of all devices, and this device's gradient (E, G): the mean over
            devices is the whole one. Where it is not finite on one of them, it is not on any.
        """
        data = data_of(self.trainer) if ranks.count() > 1 else None
        shares = data.shares() if data else dict.fromkeys(batches[0], 1.0)
        if self.model.valid is None or (len(batches) == 1 and ranks.count() == 1):
            return self._shared_step(batches[0], values, shares, **options)
        parts = zip(batches, row_shares(self.model, batches, list(shares)), strict=True)
        losses, results = zip(
            *(self._shared_step(batch, values, part, **options) for batch, part in parts), strict=True
        )
        return torch.stack(losses).sum(), summed(results)

    def _shared_step(
        self, batch: Mapping[str, TaskBatch], values: Tensor, shares: Mapping[str, float], **options: Any
    ) -> tuple[Tensor, StepResult]:
        """Run one batch, whose tasks count by their shares of a step."""
        loss, result = self.run(batch, values, shares=shares, **options)
        return of_all_devices(loss, result, shares, self.weights(shares), values)

    def run(
        self,
        batch: Mapping[str, TaskBatch],
        values: Tensor,
        *,
        scale: float | Tensor = 1.0,
        needs_gradient: bool = True,
        shares: Mapping[str, float] | None = None,
        observers: Sequence[Observer] = (),
        on_gradient: Callable[[str, Tensor], None] | None = None,
    ) -> tuple[Tensor, StepResult]:
        """Run a step on this device alone.

        Args:
            batch: Task to its unlabeled batch.
            values: Coefficients (E, G); only their values are used.
            scale: Factor of the losses in the backward pass, which the gradient is divided by (fp16).
            needs_gradient: False to compute the losses only; the gradient is 0 then.
            shares: Further factors of the tasks of all devices; default 1 for those of the batch.
            observers: Called with each :class:`TaskStep`.
            on_gradient: Sees each merged parameter's name and gradient (*S), times ``scale``, before it is dropped.

        Returns:
            The total loss, the losses by task, and the gradient (E, G).
        """
        if self.model.is_sharded and self.uses_teacher:
            self._teaching.ask_together(batch)
        shares = shares or dict.fromkeys(batch, 1.0)
        weights = {task: weight * shares[task] for task, weight in self.weights(shares).items()}
        losses: dict[str, Tensor] = {}
        with self.model.merged(
            values, hidden_layers=self._hidden_layers, micro_batch=self.options.micro_batch, scale=scale,
            needs_gradient=needs_gradient, on_gradient=on_gradient,
        ) as merged:  # fmt: skip
            for inputs in merged.groups({task: data.inputs for task, data in batch.items()}):
                total = values.new_zeros(())
                for task, outputs in merged(inputs).items():
                    loss = self._loss(task, batch[task], outputs, merged, len(shares), observers)
                    losses[task] = loss.detach()
                    total = total + loss * weights[task]
                merged.backward(total)
        parts = [losses[task] * weights[task] for task in batch]
        return torch.stack(parts).sum() if parts else values.new_zeros(()), StepResult(losses, merged.gradient)

    def ask_held_out(self, data: UnlabeledTasks, tasks: Iterable[str]) -> None:
        """Ask the experts of tasks about held-out inputs, while no merge is in memory; all devices must call."""
        self._teaching.ask_held_out(data, tasks)

    def weights(self, tasks: Collection[str]) -> dict[str, float]:
        """Return the factor of each task's loss in a step of these tasks."""
        share = 1 / max(1, len(tasks)) if self.options.reduction == "mean" else 1.0
        return {task: share * self.task_weights.get(task, 1.0) for task in tasks}

    def exported(self) -> Coefficients | Mapping[str, Tensor]:
        """Return the result: coefficients, or a state dict with every key of the base."""
        self.model.weights.forget()  # an export has use for their memory
        return self.model.coefficients

    def export_recipe(self) -> dict[str, Any]:
        """Return what ``merge.json`` tells of the method's result, by a key of the method's own; JSON-ready."""
        return {"anchor": self._strength} if self._strength else {}

    def on_parameter_gradient(self, name: str, gradient: Tensor) -> None:
        """See the gradient (*S) of one merged parameter during a training step's backward pass."""

    @property
    def _hidden_layers(self) -> tuple[str, ...]:
        return tuple(getattr(self.objective, "hidden_layers", ()))

    def _loss(
        self,
        task: str,
        data: TaskBatch,
        outputs: Outputs,
        merged: MergedEncoder,
        num_tasks: int,
        observers: Sequence[Observer],
    ) -> Tensor:
        """Hand one task's batches to the objective, and sum what comes back."""
        module = data_of(self.trainer)
        count = module.batches_per_step if module else 1
        size = -(-len(data.indices) // count)
        losses = []
        checks.check_rows(outputs, self.model, self.trainer)
        if not has_rows(outputs):
            zero: Tensor = outputs.logits.sum() * 0
            return zero
        parts = [slice(start, start + size) for start in range(0, len(data.indices), size)]
        for rows, share in zip(parts, shares_of_parts(outputs, parts), strict=True):
            step = TaskStep(
                task, take(data.inputs, rows), data.indices[rows], outputs if count == 1 else outputs[rows],
                merged.coefficients, self._teaching, merged.forward,
                initial=self.model.coefficients.initial, num_tasks=num_tasks * count,
            )  # fmt: skip
            loss = checks.check_loss(self.objective(step), self.objective, task)
            losses.append(loss if share is None else loss * share)
            for observer in observers:
                observer(step)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    @property
    def _teaching(self) -> Teaching:
        return Teaching(self.model, self._hidden_layers, self.teacher_files, self.trainer)

    @property
    def _scaler(self) -> Any:
        """Lightning's gradient scaler; None without one."""
        plugin = self.trainer.precision_plugin
        return plugin.scaler if isinstance(plugin, MixedPrecision) else None

    def _problem(self, batches: Sequence[Mapping[str, TaskBatch]], values: Tensor, result: StepResult) -> str | None:
        """Say what of a step is NaN or infinite, before the optimizer sees it; None where nothing is."""
        batch = batches[-1]
        problem = checks.loss_problem(result.losses, batch)
        if problem is None and self._scaler is None:  # a gradient scaler sees to gradients itself
            problem = checks.gradient_problem(
                self.model, result.gradient, batch, lambda part, look: self.run(part, values, on_gradient=look)
            )
        return None if problem is None else f"Step {self.global_step}: {problem}"

    def _skip(self, problem: str) -> None:
        """Count a batch that is left out, or stop.

        Raises:
            NonfiniteError: If there were too many.
        """
        limit = self.options.max_skipped if self.options.on_nonfinite == "skip" else 0
        if self.skipped >= limit:
            so_far = f" {self.skipped} batches were skipped before, as method.max_skipped allows."
            raise NonfiniteError(problem + so_far * bool(self.skipped))
        self.skipped += 1
        log.warning("%s Skipped, %d so far.", problem.split(f" {checks.KEPT}")[0], self.skipped)
        self.log("adapt/skipped", float(self.skipped), batch_size=1)
