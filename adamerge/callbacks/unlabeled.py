"""What can be known of each task without labels: criteria of its predictions, and a guard that acts on them.

Legend: C classes.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from adamerge.errors import InputError, check_choice, check_number
from adamerge.methods.method import MergingMethod
from adamerge.model.answers import best_classes
from adamerge.model.merged_model import MergedModel
from adamerge.model.task_step import TaskStep
from adamerge.system import ranks

log = logging.getLogger(__name__)


class RunningCriteria:
    """Criteria of each task's predictions that need no label, as running means over about the last ``window`` steps.

    ``entropy`` is the mean entropy of the predictions, ``marginal`` the entropy of the mean prediction, both as a share
    of ln C; ``disagreement`` the share of rows (samples, or positions of texts) on which the task's expert names
    another class.

    Attributes:
        means: Task to its running means (2 + C,): entropy in nats, disagreement (NaN where no expert is asked), and
            the mean prediction.
        steps: Task to the number of its steps.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._sums: dict[str, Tensor] = {}  # of a step on this device: samples, and what ``means`` has, (3 + C,)
        self.means: dict[str, Tensor] = {}
        self.steps: dict[str, int] = {}

    @torch.no_grad()
    def observe(self, step: TaskStep, asks_expert: bool) -> None:
        """Count one task's batch; one that is not finite, or of a single class, is skipped."""
        logits = step.outputs.rows().detach().float()
        p = logits.softmax(-1)
        if logits.shape[-1] < 2 or not torch.isfinite(p).all():
            return
        differing = math.nan
        if asks_expert:
            classes = best_classes(step.teacher())
            differing = float((p.argmax(-1) != classes).sum())
        facts = torch.tensor([len(p), float(torch.special.entr(p).sum()), differing], dtype=torch.float64)
        sums = torch.cat([facts, p.sum(0).cpu().double()])
        self._sums[step.task] = self._sums.get(step.task, 0) + sums

    def update(self) -> list[str]:
        """Move the means by what all devices counted since the last update; return the tasks that were seen."""
        everyones, self._sums = ranks.everyones(self._sums), {}
        tasks = list(dict.fromkeys(task for sums in everyones for task in sums))
        for task in tasks:
            sums = torch.stack([sums[task] for sums in everyones if task in sums]).sum(0)
            here, self.steps[task] = sums[1:] / sums[0], self.steps.get(task, 0) + 1
            mean = self.means.get(task, here)
            moved = mean + (here - mean) / min(self.steps[task], self._window)
            self.means[task] = torch.where(mean.isnan(), here, moved)
        return tasks

    def criteria(self, task: str) -> dict[str, float]:
        """Return a task's criteria by name; without ``disagreement`` where the expert is not asked."""
        entropy, disagreement, *_ = self.means[task].tolist()
        p = self.means[task][2:]
        marginal = float(torch.special.entr(p / p.sum()).sum())
        criteria = {"entropy": entropy / math.log(len(p)), "marginal": marginal / math.log(len(p))}
        return criteria if math.isnan(disagreement) else {**criteria, "disagreement": disagreement}

    def state_dict(self) -> dict[str, Any]:
        """Return the means, for checkpoints."""
        return {"means": self.means, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint stood."""
        self.means, self.steps = dict(state["means"]), dict(state["steps"])


class UnlabeledCriteria(Callback):
    """Log criteria that need no label, for all tasks, as running means over about the last ``window`` steps.

    ``unlabeled/entropy/<task>``: mean entropy of the predictions; ``unlabeled/marginal/<task>``: entropy of the mean
    prediction, which falls when a task collapses into few classes; both as a share of ln C.
    ``unlabeled/disagreement/<task>``: share of samples on which the task's expert names another class, where the
    objective asks the experts anyway. What a step computes is only looked at, so training stays the same to the bit.

    Args:
        window: Steps.
    """

    def __init__(self, window: int = 10) -> None:
        self._criteria = RunningCriteria(window)
        self._model: MergedModel | None = None  # where the experts are asked

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask the method to hand over its steps."""
        if isinstance(pl_module, MergingMethod):
            pl_module.observers.append(self.observe)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the model if the method asks the experts."""
        if isinstance(pl_module, MergingMethod) and pl_module.uses_teacher:
            self._model = pl_module.model

    def observe(self, step: TaskStep) -> None:
        """Count one task's batch."""
        self._criteria.observe(step, self._model is not None and step.task in self._model.teachers)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Update the means with what all devices saw, and log."""
        for task in self._criteria.update():
            criteria = self._criteria.criteria(task)
            pl_module.log_dict({f"unlabeled/{name}/{task}": value for name, value in criteria.items()})

    def state_dict(self) -> dict[str, Any]:
        """Return the running means, for checkpoints."""
        return self._criteria.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint stood."""
        self._criteria.load_state_dict(state_dict)


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
        factor: What ``"lower"`` multiplies a task's weight by.

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
        check_choice("CollapseGuard.action", action, ("warn", "lower", "stop"))
        for option, value in (("marginal", marginal), ("factor", factor), ("disagreement", disagreement)):
            if option != "disagreement" or value is not None:
                check_number(f"CollapseGuard.{option}", value, 0, 1)
        check_number("CollapseGuard.window", window, 1, whole=True)
        self._action, self._marginal, self._disagreement = action, marginal, disagreement
        self._window, self._factor = window, factor
        self._criteria = RunningCriteria(window)
        self._references: dict[str, dict[str, float]] = {}  # criteria to compare with, by task
        self._told: set[str] = set()  # tasks that were warned of
        self._lowered: dict[str, float] = {}
        self._good: tuple[int, list[Tensor]] | None = None  # the last good step, and what was learned then
        self.reason: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask the method to hand over its steps, and to ask the experts if they are compared with."""
        if not isinstance(pl_module, MergingMethod):
            raise InputError(f"CollapseGuard: expected a method of adamerge, found {type(pl_module).__name__}.")
        pl_module.uses_teacher |= self._disagreement is not None
        pl_module.observers.append(self.observe)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lower the weights of tasks again that were lowered before a resume."""
        assert isinstance(pl_module, MergingMethod)
        for task, factor in self._lowered.items():
            pl_module.task_weights[task] = pl_module.task_weights.get(task, 1.0) * factor

    def observe(self, step: TaskStep) -> None:
        """Count one task's batch."""
        self._criteria.observe(step, asks_expert=self._disagreement is not None)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log, and act on what has collapsed."""
        assert isinstance(pl_module, MergingMethod)
        self._criteria.update()
        if self._action == "stop" and self._is_good():
            self._good = (trainer.global_step, [learned.detach().clone() for learned in pl_module.learned])
        for task, steps in self._criteria.steps.items():
            criteria = self._criteria.criteria(task)
            logged = {f"guard/{name}/{task}": value for name, value in criteria.items() if name != "entropy"}
            pl_module.log_dict(logged)
            reference = self._references.get(task)
            if reference is None:
                if steps >= self._window:
                    self._references[task] = criteria
            elif task not in self._told and (problem := self._problem(reference, criteria)):
                self._act(trainer, pl_module, task, problem)
                self._references[task] = criteria

    def _is_good(self) -> bool:
        """Whether no task is half-way to collapse."""
        criteria = self._criteria.criteria
        return not any(self._problem(before, criteria(task), 0.5) for task, before in self._references.items())

    def _problem(self, before: Mapping[str, float], now: Mapping[str, float], share: float = 1.0) -> str | None:
        """Say what is wrong with a task, from its criteria before and now, at a share of the limits."""
        was, variety = before["marginal"], now["marginal"]
        if variety < (1 - share * (1 - self._marginal)) * was:
            return f"its predictions name ever fewer classes (marginal entropy {was:.2f}, now {variety:.2f})"
        if self._disagreement is not None and now["disagreement"] - before["disagreement"] > share * self._disagreement:
            return f"it leaves its expert (disagreement {before['disagreement']:.2f}, now {now['disagreement']:.2f})"
        return None

    def _act(self, trainer: Trainer, method: MergingMethod, task: str, problem: str) -> None:
        collapse = f"Step {trainer.global_step}: task {task!r} collapses: {problem}."
        if self._action == "warn":
            self._told.add(task)
            log.warning("%s Lower its weight with method.task_weights, or use objective=infomax.", collapse)
        elif self._action == "lower":
            method.task_weights[task] = method.task_weights.get(task, 1.0) * self._factor
            self._lowered[task] = self._lowered.get(task, 1.0) * self._factor
            log.warning("%s Its weight is now %g.", collapse, method.task_weights[task])
        elif self.reason is None:
            step = trainer.global_step
            if self._good is not None:
                step, values = self._good
                with torch.no_grad():
                    for learned, value in zip(method.learned, values, strict=True):
                        learned.copy_(value)
            self.reason = f"{collapse} The run was stopped there, and what it had learned until step {step} saved."
            log.warning(self.reason)
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Return the running means and what was done, for checkpoints."""
        return {
            "means": self._criteria.state_dict(),
            "references": self._references,
            "told": sorted(self._told),
            "lowered": self._lowered,
            "good": self._good,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint stood."""
        self._criteria.load_state_dict(state_dict["means"])
        self._references = dict(state_dict["references"])
        self._told = set(state_dict["told"])
        self._lowered = dict(state_dict["lowered"])
        self._good = state_dict["good"]
