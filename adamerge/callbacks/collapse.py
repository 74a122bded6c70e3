"""Watch what the merged model predicts on the unlabeled streams, and act where a task collapses."""

import logging
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from adamerge.errors import InputError
from adamerge.methods.method import MergingMethod
from adamerge.model.merged_model import TaskStep
from adamerge.system import ranks

log = logging.getLogger(__name__)

_ACTIONS = ("warn", "lower", "stop")


@dataclass
class _Watch:
    """One task's running means, and what they were when watching began.

    Attributes:
        marginal: Mean predicted probabilities, (C,).
        disagreement: Share of samples on which the expert names another class; None if it is not asked.
        steps: Seen so far.
        reference: Marginal entropy and disagreement after the first ``window`` steps, or when its weight was
            last lowered; None before.
        was_told: Whether a warning has been given.
    """

    marginal: Tensor
    disagreement: float | None
    steps: int = 0
    reference: tuple[float, float] | None = None
    was_told: bool = False

    def entropy(self) -> float:
        """Entropy of the marginal as a share of ln C."""
        p = self.marginal / self.marginal.sum()
        return float(torch.special.entr(p).sum()) / math.log(len(p))

    def now(self) -> tuple[float, float]:
        """Marginal entropy and disagreement."""
        return self.entropy(), self.disagreement or 0.0


@dataclass
class _Sums:
    """Over one task's samples of a step on one device: predicted probabilities (C,), disagreements, samples."""

    predicted: Tensor | float = 0.0
    differing: int = 0
    count: int = 0


class CollapseGuard(Callback):
    """Act where the predicted classes of a task's stream become few, or leave the expert's.

    Entropy can fall while a task is destroyed: all its inputs end in a few classes. No label is needed to
    see that. Per task, over about the last ``window`` steps: the entropy of the mean prediction (as a share
    of ln C), logged as ``guard/marginal/<task>``, and the share of samples on which the task's expert names
    another class, ``guard/disagreement/<task>``. Both are compared with what they were after ``window`` steps.

    Args:
        action: ``"warn"``: once per task. ``"lower"``: multiply the task's weight by ``factor``, and compare
            with the present from then on. ``"stop"``: end the run, and go back to the coefficients of the last
            step at which no task was half-way to collapse; they are exported, and the command ends with exit code 3.
        marginal: A task has collapsed when its marginal entropy is below this share of what it was.
        disagreement: Or when its disagreement has risen by this much, in [0, 1]; None to not ask the experts.
        window: Steps.
        factor: Of ``"lower"``.

    Attributes:
        reason: Why the run was stopped; None if it was not.
    """

    def __init__(
        self,
        action: Literal["warn", "lower", "stop"] = "warn",
        marginal: float = 0.7,
        disagreement: float | None = None,
        window: int = 10,
        factor: float = 0.5,
    ) -> None:
        if action not in _ACTIONS:
            raise InputError(f"CollapseGuard.action: expected {' or '.join(_ACTIONS)}, found {action!r}.")
        for option, value in (("marginal", marginal), ("factor", factor), ("disagreement", disagreement)):
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"CollapseGuard.{option}: expected a number in [0, 1], found {value}.")
        if window < 1:
            raise InputError(f"CollapseGuard.window: expected a number of steps >= 1, found {window}.")
        self._action = action
        self._marginal = marginal
        self._disagreement = disagreement
        self._window = window
        self._factor = factor
        self._watched: dict[str, _Watch] = {}
        self._seen: dict[str, _Sums] = {}
        self._lowered: dict[str, float] = {}
        self._good: tuple[int, Tensor] | None = None  # the last good step, and its coefficients
        self.reason: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask to see the steps, and the experts if they are to be compared with."""
        if not isinstance(pl_module, MergingMethod):
            raise InputError(f"CollapseGuard: expected a method of adamerge, found {type(pl_module).__name__}.")
        pl_module.uses_teacher |= self._disagreement is not None
        pl_module.observers.append(self.observe)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lower again what was lowered before a resume."""
        assert isinstance(pl_module, MergingMethod)
        for task, factor in self._lowered.items():
            pl_module.task_weights[task] = pl_module.task_weights.get(task, 1.0) * factor

    @torch.no_grad()
    def observe(self, step: TaskStep) -> None:
        """Count one task's batch into the sums of the step."""
        logits = step.outputs.logits.detach().float().flatten(0, -2)
        predicted = logits.softmax(-1).sum(0).cpu()
        if not torch.isfinite(predicted).all():
            return  # the method's to handle
        seen = self._seen.setdefault(step.task, _Sums())
        seen.count += len(logits)
        seen.predicted = seen.predicted + predicted
        if self._disagreement is not None:
            differs = logits.argmax(-1) != step.teacher().logits.flatten(0, -2).argmax(-1)
            seen.differing += int(differs.sum())

    def _update(self) -> None:
        """Update the running means with what all devices saw in a step."""
        everyones, self._seen = ranks.everyones(self._seen), {}
        for task in dict.fromkeys(task for seen in everyones for task in seen):
            parts = [seen[task] for seen in everyones if task in seen]
            count = sum(part.count for part in parts)
            marginal = torch.stack([torch.as_tensor(part.predicted) for part in parts]).sum(0) / count
            disagreement = None if self._disagreement is None else sum(part.differing for part in parts) / count
            self._move(task, marginal, disagreement)

    def _move(self, task: str, marginal: Tensor, disagreement: float | None) -> None:
        watch = self._watched.get(task)
        if watch is None:
            self._watched[task] = _Watch(marginal, disagreement, steps=1)
            return
        watch.steps += 1
        share = 1 / min(watch.steps, self._window)
        watch.marginal += share * (marginal - watch.marginal)
        if disagreement is not None and watch.disagreement is not None:
            watch.disagreement += share * (disagreement - watch.disagreement)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, and act on what has collapsed."""
        assert isinstance(pl_module, MergingMethod)
        self._update()
        if self._action == "stop" and self._is_good():
            self._good = (trainer.global_step, pl_module.model.coefficients.raw.detach().clone())
        for task, watch in self._watched.items():
            pl_module.log(f"guard/marginal/{task}", watch.entropy())
            if watch.disagreement is not None:
                pl_module.log(f"guard/disagreement/{task}", watch.disagreement)
            now = watch.now()
            if watch.reference is None:
                watch.reference = now if watch.steps >= self._window else None
            elif (problem := self._problem(watch.reference, now)) and not watch.was_told:
                self._act(trainer, pl_module, task, problem)
                watch.was_told = self._action == "warn"
                watch.reference = now

    def _is_good(self) -> bool:
        """Whether no task is half-way to collapse."""
        watched = [watch for watch in self._watched.values() if watch.reference is not None]
        return not any(self._problem(watch.reference, watch.now(), share=0.5) for watch in watched if watch.reference)

    def _problem(self, before: tuple[float, float], now: tuple[float, float], share: float = 1.0) -> str | None:
        """Say what is wrong with a task, from its marginal entropies and disagreements, at a share of the limits."""
        if now[0] < (1 - share * (1 - self._marginal)) * before[0]:
            return f"its predictions name ever fewer classes (marginal entropy {before[0]:.2f}, now {now[0]:.2f})"
        if self._disagreement is not None and now[1] - before[1] > share * self._disagreement:
            return f"it leaves its expert (disagreement {before[1]:.2f}, now {now[1]:.2f})"
        return None

    def _act(self, trainer: Trainer, method: MergingMethod, task: str, problem: str) -> None:
        found = f"Step {trainer.global_step}: task {task!r} collapses: {problem}."
        if self._action == "warn":
            log.warning("%s Lower its weight with method.task_weights, or use objective=infomax.", found)
        elif self._action == "lower":
            method.task_weights[task] = method.task_weights.get(task, 1.0) * self._factor
            self._lowered[task] = self._lowered.get(task, 1.0) * self._factor
            log.warning("%s Its weight is now %g.", found, method.task_weights[task])
        elif self.reason is None:
            step = trainer.global_step
            if self._good is not None:
                step, values = self._good
                with torch.no_grad():
                    method.model.coefficients.raw.copy_(values)
            self.reason = f"{found} The run was stopped there, and what it had learned until step {step} saved."
            log.warning(self.reason)
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Return the running means, for checkpoints."""
        watched = {task: dict(vars(watch)) for task, watch in self._watched.items()}
        return {"watched": watched, "lowered": self._lowered, "good": self._good}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint stood."""
        self._watched = {task: _Watch(**watch) for task, watch in state_dict["watched"].items()}
        self._lowered = dict(state_dict["lowered"])
        self._good = state_dict["good"]
