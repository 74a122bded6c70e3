"""Log what can be known of each task without labels: how sure, how varied and how like the expert predictions are."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from adamerge.methods.method import MergingMethod
from adamerge.model.merged_model import MergedModel, TaskStep
from adamerge.system import ranks


@dataclass
class _Sums:
    """Over one task's samples since the last update on one device.

    Attributes:
        predicted: Probabilities, (C,).
        entropy: Of the predictions, in nats.
        differing: Samples for which the expert names another class; None if it is not asked.
        count: Samples.
    """

    predicted: Tensor | float = 0.0
    entropy: float = 0.0
    differing: int | None = None
    count: int = 0


@dataclass
class _Means:
    """One task's running means over about the last ``window`` steps."""

    predicted: Tensor
    entropy: float
    disagreement: float | None
    steps: int = 1

    def criteria(self) -> dict[str, float]:
        """Entropies as a share of ln C."""
        p, most = self.predicted / self.predicted.sum(), math.log(len(self.predicted))
        found = {"entropy": self.entropy / most, "marginal": float(torch.special.entr(p).sum()) / most}
        return found if self.disagreement is None else {**found, "disagreement": self.disagreement}


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
        self._window = window
        self._seen: dict[str, _Sums] = {}
        self._means: dict[str, _Means] = {}
        self._model: MergedModel | None = None  # where the experts are asked

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask to see the steps."""
        if isinstance(pl_module, MergingMethod):
            pl_module.observers.append(self.observe)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See whether the experts are asked."""
        if isinstance(pl_module, MergingMethod) and pl_module.uses_teacher:
            self._model = pl_module.model

    @torch.no_grad()
    def observe(self, step: TaskStep) -> None:
        """Count one task's batch."""
        logits = step.outputs.logits.detach().float().flatten(0, -2)
        p = logits.softmax(-1)
        if logits.shape[-1] < 2 or not torch.isfinite(p).all():
            return
        seen = self._seen.setdefault(step.task, _Sums())
        seen.count += len(p)
        seen.predicted = seen.predicted + p.sum(0).cpu()
        seen.entropy += float(torch.special.entr(p).sum())
        if self._model is not None and step.task in self._model.teachers:
            differs = p.argmax(-1) != step.teacher().logits.flatten(0, -2).argmax(-1)
            seen.differing = (seen.differing or 0) + int(differs.sum())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the means with what all devices saw, and log."""
        everyones, self._seen = ranks.everyones(self._seen), {}
        scalars: dict[str, float] = {}
        for task in dict.fromkeys(task for seen in everyones for task in seen):
            means = self._moved(task, [seen[task] for seen in everyones if task in seen])
            scalars |= {f"unlabeled/{name}/{task}": value for name, value in means.criteria().items()}
        pl_module.log_dict(scalars)

    def _moved(self, task: str, parts: list[_Sums]) -> _Means:
        count = sum(part.count for part in parts)
        predicted = torch.stack([torch.as_tensor(part.predicted) for part in parts]).sum(0) / count
        entropy = sum(part.entropy for part in parts) / count
        asked = [part.differing for part in parts if part.differing is not None]
        disagreement = sum(asked) / count if asked else None
        means = self._means.get(task)
        if means is None:
            means = self._means[task] = _Means(predicted, entropy, disagreement)
            return means
        means.steps += 1
        share = 1 / min(means.steps, self._window)
        means.predicted = means.predicted + share * (predicted - means.predicted)
        means.entropy += share * (entropy - means.entropy)
        if disagreement is not None:
            before = disagreement if means.disagreement is None else means.disagreement
            means.disagreement = before + share * (disagreement - before)
        return means

    def state_dict(self) -> dict[str, Any]:
        """Return the running means, for checkpoints."""
        return {"means": {task: dict(vars(means)) for task, means in self._means.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint stood."""
        self._means = {task: _Means(**means) for task, means in state_dict["means"].items()}
