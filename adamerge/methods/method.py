"""What all methods share: one step of the objective on the merged model, its teachers, guards and reports."""

import functools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from adamerge.data.batch import Outputs, TaskBatch
from adamerge.data.random_states import generator_states, set_generator_states
from adamerge.data.unlabeled_tasks import UnlabeledTasks
from adamerge.errors import InputError, NonfiniteError, did_you_mean, shorten
from adamerge.model.merged_model import MergedModel, StepResult, TaskStep
from adamerge.model.teacher_files import TeacherFiles, ask_expert
from adamerge.objectives import Objective, check_objective
from adamerge.system import progress, ranks

log = logging.getLogger(__name__)

OnNonfinite = Literal["stop", "skip"]
_KEPT = "The coefficients keep their last good values."


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
        task_weights: Task to the factor of its loss, default 1.
        reduction: ``"mean"`` or ``"sum"`` over the tasks (AdaMerging sums; Adam is indifferent).
        micro_batch: Most inputs in one forward pass, in whole tasks; ``"auto"`` for a rule by size, None for no limit.
        on_nonfinite: What a loss or gradient that is NaN or infinite does: ``"stop"`` the run, or ``"skip"`` the
            batch: coefficients and optimizer stay as they are.
        max_skipped: Skipped batches, beyond which the run stops after all.

    Raises:
        InputError: If an option is unknown or the objective cannot be called with a step.

    Attributes:
        task_weights: Task to factor; callbacks may change it between steps.
        uses_teacher: Whether the experts are asked before the first step; callbacks may set it in ``setup``.
        observers: Called with each :class:`TaskStep` of a training step; they must not change it.
        teacher_files: A folder that keeps the experts' outputs from run to run; None to ask them in each run.
        recipe: JSON-ready content for the checkpoints, such as the resolved configuration.
        skipped: Batches skipped so far because a loss or gradient was not finite.
    """

    def __init__(
        self,
        model: MergedModel,
        objective: Objective,
        *,
        task_weights: Mapping[str, float] | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        micro_batch: int | Literal["auto"] | None = "auto",
        on_nonfinite: OnNonfinite = "stop",
        max_skipped: int = 10,
    ) -> None:
        super().__init__()
        check_objective(objective)
        if reduction not in ("mean", "sum"):
            raise InputError(f"method.reduction: expected 'mean' or 'sum', found {reduction!r}.")
        self.model = model
        self.objective = objective
        self.task_weights = dict(task_weights or {})
        self.uses_teacher = bool(getattr(objective, "uses_teacher", False))
        self.observers: list[Callable[[TaskStep], None]] = []
        self.teacher_files: TeacherFiles | None = None
        if on_nonfinite not in ("stop", "skip"):
            raise InputError(f"method.on_nonfinite: expected 'stop' or 'skip', found {on_nonfinite!r}.")
        if max_skipped < 0:
            raise InputError(f"method.max_skipped: expected a number of batches >= 0, found {max_skipped}.")
        self.recipe: Mapping[str, Any] = {}
        self.skipped = 0
        self._max_skipped = max_skipped if on_nonfinite == "skip" else 0
        self._has_gradient = False  # whether any batch of the step to come was not skipped
        self._generators: Mapping[str, Any] | None = None  # of a checkpoint, until the first step after it
        # Constants, the same on all devices: torch would broadcast them before each step.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]
        self._reduction = reduction
        self._micro_batch = micro_batch

    def on_fit_start(self) -> None:
        """Move what Lightning does not see to the device, ask the teachers if needed, and try the objective."""
        self.model.to_device(self.device)
        self.model.teacher_cache.clear()
        data = self._datamodule()
        tasks: Mapping[str, Any] = data.streams if data else self.task_weights
        for option, weights in (
            ("method.task_weights", self.task_weights),
            ("objective.task_weights", getattr(self.objective, "task_weights", None) or {}),
        ):
            for task in weights:
                if data and task not in tasks:
                    raise InputError(f"{option}: no task {task!r}.{did_you_mean(task, tasks)}")
        if data and self.uses_teacher:
            self._ask_teachers(data)
        if data:
            self._try_objective(data)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record which pool the coefficients are for, the recipe, and the states of the random generators."""
        checkpoint["pool"] = self.model.pool.hashes()
        checkpoint["recipe"] = dict(self.recipe)
        checkpoint["skipped"] = self.skipped
        checkpoint["generators"] = generator_states()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with another pool.

        Raises:
            InputError: If base or experts have changed since the checkpoint was saved.
        """
        saved, here = checkpoint.get("pool", {}), self.model.pool.hashes()
        if saved and list(saved) != list(here):
            raise InputError(f"The checkpoint is for the experts {list(saved)[1:]}, but the pool has {list(here)[1:]}.")
        changed = [name for name in saved if saved[name] != here[name]]
        if changed:
            raise InputError(
                f"The checkpoint cannot be resumed: the content of {shorten(changed)} has changed since it was saved. "
                "Restore the files, or start a new run."
            )
        self.skipped = checkpoint.get("skipped", 0)
        self._generators = checkpoint.get("generators")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Go on with a checkpoint's random numbers; not before, as the preparations of a run draw some too."""
        if self._generators is not None:
            set_generator_states(self._generators)
            self._generators = None

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Leave the optimizer nothing to do where all batches of a step were skipped; a gradient of 0 would move it."""
        if not self._has_gradient:
            self.model.coefficients.raw.grad = None
        self._has_gradient = False

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and take the step back where a coefficient is no longer finite.

        Raises:
            NonfiniteError: If one is not.
        """
        raw = self.model.coefficients.raw
        good = raw.detach().clone()
        super().optimizer_step(*args, **kwargs)
        bad = ~torch.isfinite(raw.detach())
        if bad.any():
            raw.data.copy_(good)
            raise NonfiniteError(
                f"Step {self.global_step}: the step made the coefficient of {self._coefficient(bad)} infinite or NaN. "
                f"{_KEPT} Lower the learning rate."
            )

    def training_step(self, batch: Mapping[str, TaskBatch], batch_idx: int) -> Tensor:
        """Return the surrogate loss of one step, 0 to skip it; ``batch`` maps tasks to their unlabeled batches."""
        values = self.model.coefficients()
        loss, result = self.step(batch, values, scale=self._loss_scale())
        if (problem := self._problem(batch, values, result)) is not None:  # the same on all devices
            self._skip(problem)
            nothing: Tensor = (values * 0).sum()
            return nothing
        self._has_gradient = True
        self._report(loss, result.losses, values, sum(len(data.indices) for data in batch.values()))
        surrogate: Tensor = loss + ((values - values.detach()) * result.gradient).sum()
        return surrogate

    def step(
        self,
        batch: Mapping[str, TaskBatch],
        values: Tensor,
        *,
        scale: float | Tensor = 1.0,
        needs_gradient: bool = True,
    ) -> tuple[Tensor, StepResult]:
        """Run this device's part of a step.

        Returns:
            The total loss at coefficients ``values`` (E, G), the losses by task, both of all devices, and this
            device's gradient (E, G): the mean over devices is the whole one. Where it is not finite on one of them,
            it is not on any.
        """
        data = self._datamodule() if ranks.count() > 1 else None
        shares = data.shares() if data else dict.fromkeys(batch, 1.0)
        loss, result = self.run(batch, values, scale=scale, needs_gradient=needs_gradient, shares=shares)
        if ranks.count() == 1:
            return loss, result
        zero = values.new_zeros(())
        parts = [result.losses[task] * share if task in batch else zero for task, share in shares.items()]
        finite = (result.gradient * 0).sum()  # NaN unless it is
        sums = ranks.total(torch.stack([part.to(values) for part in (*parts, finite)]))
        *means, finite = (sums / ranks.count()).unbind()
        losses = dict(zip(shares, means, strict=True))
        gradient = result.gradient if torch.isfinite(finite) else ranks.total(result.gradient)
        weights = self.weights(shares)
        return torch.stack([losses[task] * weights[task] for task in losses]).sum(), StepResult(losses, gradient)

    def run(
        self,
        batch: Mapping[str, TaskBatch],
        values: Tensor,
        *,
        scale: float | Tensor = 1.0,
        needs_gradient: bool = True,
        shares: Mapping[str, float] | None = None,
        on_gradient: Callable[[str, Tensor], None] | None = None,
    ) -> tuple[Tensor, StepResult]:
        """Return the total loss at coefficients ``values`` (E, G), the losses by task, and the gradient (E, G).

        Of this device alone; ``shares`` are further factors of the tasks of all devices. ``on_gradient`` sees the
        parameters' gradients in the place of :meth:`on_parameter_gradient`.
        """
        if self.model.is_sharded and self.uses_teacher:
            self._ask_together(batch)
        shares = shares or dict.fromkeys(batch, 1.0)
        weights = {task: weight * shares[task] for task, weight in self.weights(shares).items()}
        result = self.model.step(
            {task: data.inputs for task, data in batch.items()},
            functools.partial(self._loss, batch, len(shares)),
            values=values,
            weights=weights,
            hidden_layers=self._hidden_layers,
            micro_batch=self._micro_batch,
            scale=scale,
            needs_gradient=needs_gradient,
            on_gradient=(on_gradient or self.on_parameter_gradient) if needs_gradient else None,
        )
        parts = [result.losses[task] * weights[task] for task in batch]
        return torch.stack(parts).sum() if parts else values.new_zeros(()), result

    def weights(self, tasks: Collection[str]) -> dict[str, float]:
        """Return the factor of each task's loss in a step of these tasks."""
        share = 1 / max(1, len(tasks)) if self._reduction == "mean" else 1.0
        return {task: share * self.task_weights.get(task, 1.0) for task in tasks}

    def export_recipe(self) -> dict[str, Any]:
        """Return what ``merge.json`` tells of the method's result, by a key of the method's own; JSON-ready."""
        return {}

    def on_parameter_gradient(self, name: str, gradient: Tensor) -> None:
        """See the gradient (*S) of one merged parameter during a training step's backward pass."""

    @property
    def _hidden_layers(self) -> tuple[str, ...]:
        return tuple(getattr(self.objective, "hidden_layers", ()))

    def _loss(
        self,
        batch: Mapping[str, TaskBatch],
        num_tasks: int,
        task: str,
        outputs: Outputs,
        coefficients: Tensor,
        forward: Callable[[Tensor, str], Outputs],
    ) -> Tensor:
        """Hand one task's batches to the objective, and check and sum what comes back."""
        data = self._datamodule()
        count = data.batches_per_step if data else 1
        losses = []
        for (inputs, indices), part in _parts(batch[task], outputs, count):
            step = TaskStep(
                task, inputs, indices, part, coefficients, self._teacher, forward,
                initial=self.model.coefficients.initial, num_tasks=num_tasks * count,
            )  # fmt: skip
            loss = self.objective(step)
            self._check(loss, task)
            losses.append(loss)
            if torch.is_grad_enabled():  # a training step, not a line search
                for observer in self.observers:
                    observer(step)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _check(self, loss: object, task: str) -> None:
        name = type(self.objective).__name__
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise InputError(
                f"Objective {name} must return a scalar tensor, found {found}. Take the mean over the batch."
            )
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise InputError(
                f"Objective {name} returned a loss that does not depend on the merged model's outputs (task {task!r}). "
                "Compute it from step.outputs, without detach() or no_grad()."
            )

    def _try_objective(self, data: UnlabeledTasks) -> None:
        """Refuse, before the first step, an objective that is not finite or does not feel the coefficients."""
        batch = {task: TaskBatch(*(t.to(self.device) for t in part)) for task, part in data.first_batch().items()}
        values = self.model.coefficients().detach()
        observers, self.observers = self.observers, []
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self.trainer.precision_plugin.forward_context():
            _, result = self.step(batch, values)
            name = type(self.objective).__name__
            for task, loss in result.losses.items():
                if not torch.isfinite(loss):
                    raise InputError(
                        f"Objective {name} gives {loss.item()} for task {task!r} before the first step. Look at that "
                        "task's images, and at logarithms and divisions in the objective."
                    )
            if not ranks.total(result.gradient).any():
                _, moved = self.step(batch, values * 0.5 + 0.1, needs_gradient=False)
                if all(torch.equal(moved.losses[task], loss) for task, loss in result.losses.items()):
                    raise InputError(
                        f"Objective {name} does not change with the coefficients on the first batch. Compute it from "
                        "step.outputs, and check that a filter does not leave every sample out."
                    )
        self.observers = observers

    def _teacher(self, task: str, inputs: Tensor, indices: Tensor) -> Outputs:
        if self.teacher_files is not None and self.model.teacher_cache.get(task, indices) is None:
            self._ask(task, [TaskBatch(inputs, indices)])  # held-out images
        return self.model.teacher(task, inputs, indices, self._hidden_layers)

    def _ask_teachers(self, data: UnlabeledTasks) -> None:
        """Fill the teacher cache in a fixed order, one expert in memory at a time."""
        steps = self.trainer.max_steps * self.trainer.accumulate_grad_batches if self.trainer.max_steps > 0 else None
        draw = self.trainer.progress_bar_callback is not None
        for task in progress.track(list(data.streams), "Asking the experts", "tasks", draw=draw):
            batches = [TaskBatch(*batch) for batch in data.teacher_loader(task, steps)]
            with self.trainer.precision_plugin.forward_context():
                self._ask(task, batches)
        if self.teacher_files is not None:
            log.info("Teachers: %s", self.teacher_files.summary())

    def _ask_together(self, batch: Mapping[str, TaskBatch]) -> None:
        """Ask the experts about what any process has no answers for, before the encoder holds merged weights."""
        cache = self.model.teacher_cache
        missing = [task for task, part in batch.items() if cache.get(task, part.indices) is None]
        for task in dict.fromkeys(task for tasks in ranks.everyones(missing) for task in tasks):
            self._ask(task, [batch[task]] if task in missing else [])

    def _ask(self, task: str, batches: Sequence[TaskBatch]) -> None:
        computed = {"precision": str(self.trainer.precision), "device": self.device.type}
        ask_expert(self.model, task, batches, self._hidden_layers, self.teacher_files, computed)

    def _datamodule(self) -> UnlabeledTasks | None:
        data = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, UnlabeledTasks) else None

    def _loss_scale(self) -> float | Tensor:
        """The factor of the inner backward pass, so that fp16 gradients do not underflow."""
        plugin = self.trainer.precision_plugin
        scaler = plugin.scaler if isinstance(plugin, MixedPrecision) else None
        return 1.0 if scaler is None else scaler.get_scale()

    def _problem(self, batch: Mapping[str, TaskBatch], values: Tensor, result: StepResult) -> str | None:
        """Say what of a step is NaN or infinite, before the optimizer sees it; None where nothing is."""
        for task, loss in result.losses.items():
            if not torch.isfinite(loss):
                at = f"on the images at {_positions(batch[task])}" if ranks.count() == 1 else "on images"
                return (
                    f"Step {self.global_step}: the loss of task {task!r} is {loss.item()} {at} of its stream. {_KEPT} "
                    "Look at them, or lower the learning rate."
                )
        scaled = isinstance(self.trainer.precision_plugin, MixedPrecision) and self.trainer.precision_plugin.scaler
        bad = ~torch.isfinite(result.gradient)
        if scaled or not bad.any():  # a gradient scaler sees to it itself
            return None
        return (
            f"Step {self.global_step}: the gradient of the coefficient of {self._coefficient(bad)} is not finite"
            f"{self._origin(batch, values)}. {_KEPT} Lower the learning rate."
        )

    def _coefficient(self, where: Tensor) -> str:
        """Name the first coefficient of a mask (E, G)."""
        expert, group = where.nonzero()[0].tolist()
        names = self.model.pool.expert_names, self.model.coefficients.group_names
        return f"expert {names[0][expert]!r}, group {names[1][group]!r}"

    def _origin(self, batch: Mapping[str, TaskBatch], values: Tensor) -> str:
        """Find the task and the tensor whose gradient is not finite, by running the step again task by task."""
        if ranks.count() > 1:  # devices that wait for one another would wait for ever
            return ""
        found: list[str] = []

        def look(name: str, gradient: Tensor) -> None:
            if not torch.isfinite(gradient).all():
                found.append(name)

        observers, self.observers = self.observers, []
        try:
            for task, data in batch.items():
                self.run({task: data}, values, on_gradient=look)
                if found:
                    return f": tensor {found[0]!r} for task {task!r}, images at {_positions(data)} of its stream"
        finally:
            self.observers = observers
        return ""

    def _skip(self, problem: str) -> None:
        """Count a batch that is left out, or stop.

        Raises:
            NonfiniteError: If there were too many.
        """
        if self.skipped >= self._max_skipped:
            so_far = (
                f" {self.skipped} batches were skipped before, as method.max_skipped allows." if self.skipped else ""
            )
            raise NonfiniteError(problem + so_far)
        self.skipped += 1
        log.warning("%s Skipped, %d so far.", problem.split(f" {_KEPT}")[0], self.skipped)
        self.log("adapt/skipped", float(self.skipped), batch_size=1)

    def _report(self, loss: Tensor, losses: Mapping[str, Tensor], values: Tensor, batch_size: int) -> None:
        values = values.detach()
        travel = (values - self.model.coefficients.initial).abs().mean()
        self.log("adapt/loss", loss, prog_bar=True, batch_size=batch_size)
        self.log("adapt/coefficient", values.mean(), prog_bar=True, batch_size=batch_size)
        scalars = {f"adapt/loss/{task}": value for task, value in losses.items()}
        scalars |= {"adapt/coefficient/min": values.min(), "adapt/coefficient/max": values.max()}
        names = self.model.pool.expert_names
        scalars |= {f"coefficient/{name}": mean for name, mean in zip(names, values.mean(1), strict=True)}
        self.log_dict({**scalars, "adapt/travel": travel}, batch_size=batch_size)


def _positions(batch: TaskBatch, limit: int = 8) -> str:
    """Name the positions of a batch's first images."""
    positions = batch.indices.tolist()
    return f"positions {', '.join(map(str, positions[:limit]))}{', ...' if len(positions) > limit else ''}"


def _parts(batch: TaskBatch, outputs: Outputs, count: int) -> Iterator[tuple[TaskBatch, Outputs]]:
    """Divide a task's samples and outputs into ``count`` batches."""
    size = -(-len(batch.indices) // count)
    for start in range(0, len(batch.indices), size):
        at = slice(start, start + size)
        hidden = {name: value[at] for name, value in outputs.hidden.items()}
        part = outputs if count == 1 else Outputs(outputs.logits[at], outputs.features[at], hidden)
        yield TaskBatch(batch.inputs[at], batch.indices[at]), part
