"""Export the start where learning did not make the merge agree better with the experts, on held-out samples."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from adamerge.callbacks.keep_best import check_held_out
from adamerge.data.unlabeled_tasks import UnlabeledTasks
from adamerge.errors import InputError, shorten
from adamerge.methods.method import MergingMethod
from adamerge.model.task_step import TaskStep
from adamerge.results.agreement import Agreement, Tally, mean_of

log = logging.getLogger(__name__)


class NeverWorse(Callback):
    """Measure start and result against the experts on held-out samples; end with the start unless the result is better.

    Needs ``data.holdout``; no label is used. Better means: a lower divergence from the experts, and agreement with them
    on no fewer samples than chance explains (:meth:`~adamerge.results.agreement.Agreement.is_better_than`). What was
    measured is logged, and goes to ``merge.json`` as ``evidence``. A task without an expert has no part in it: it is
    named, and ``callbacks=collapse_guard`` is all that can watch it. Without any, the result is kept.
    Few held-out samples prove little. ``adamerge adapt`` therefore learns on parts of few samples first (the ``folds``
    of :class:`~adamerge.UnlabeledTasks`), each judged by the samples that it lacks, and then on all of them.

    Attributes:
        evidence: What was measured, and which of the two was kept; None before the end.
        folds: Start and result of each fold, which decide where data have folds.
        is_fold: Whether the fit is a fold's, whose result is measured only.
    """

    def __init__(self) -> None:
        self._start: Tensor | None = None
        self.folds: Sequence[tuple[Agreement, Agreement]] = ()
        self.is_fold = False
        self.evidence: dict[str, Any] | None = None

    def check_data(self, data: object) -> None:
        """Refuse data without held-out samples or folds.

        Raises:
            InputError: If none are held out.
        """
        if not getattr(data, "folds", 0):
            check_held_out("NeverWorse", data)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember the start, before a checkpoint is read."""
        if not isinstance(pl_module, MergingMethod) or not pl_module.learns_coefficients:
            raise InputError(
                f"NeverWorse: expected a method that learns coefficients, found {type(pl_module).__name__}."
            )
        data = getattr(trainer, "datamodule", None)
        self.check_data(data)
        if not self.folds and any(task in pl_module.model.teachers for task in data.streams):  # type: ignore[union-attr]
            check_held_out("NeverWorse", data)
        self._start = pl_module.model.coefficients.raw.detach().clone()

    @torch.no_grad()
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure both, and put the start back where the result is not better."""
        assert isinstance(pl_module, MergingMethod)
        assert self._start is not None
        if self.evidence is None:  # else the fit had ended before a resume
            raw = pl_module.model.coefficients.raw
            learned, at_start = raw.clone(), self._start.to(raw)
            start: Agreement | None
            result: Agreement | None
            if self.folds:
                start, result = map(mean_of, zip(*self.folds, strict=True))
            else:
                result = measure(trainer, pl_module)
                raw.copy_(at_start)
                start = measure(trainer, pl_module)
            self.evidence = _evidence(start, result)
            raw.copy_(learned if self.evidence["exported"] == "result" else at_start)
            streams = trainer.datamodule.streams  # type: ignore[attr-defined]
            unproved = [task for task in streams if task not in pl_module.model.teachers]
            self.evidence |= {"tasks_without_expert": unproved} if unproved else {}
            self.evidence |= {"folds": len(self.folds)} if self.folds else {}
        pl_module.evidence = self.evidence
        if trainer.is_global_zero:
            level, sentence = _sentence(self.evidence)
            log.log(logging.DEBUG if self.is_fold else level, sentence)

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured, for the last checkpoint."""
        return {"evidence": self.evidence}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint stood."""
        self.evidence = state_dict["evidence"]


def _evidence(start: Agreement | None, result: Agreement | None) -> dict[str, Any]:
    if start is None or result is None:
        return {"exported": "result", "start": None, "result": None}
    exported = "result" if result.is_better_than(start) else "start"
    return {"exported": exported, "start": asdict(start), "result": asdict(result)}


def _sentence(evidence: dict[str, Any]) -> tuple[int, str]:
    """Say what was measured, with the level to log it at."""
    start, result = evidence["start"], evidence["result"]
    if start is None:
        return logging.WARNING, (
            "NeverWorse: no held-out task has an expert to agree with, so that the result is kept without proof; "
            "callbacks=collapse_guard sees whether it collapses."
        )
    samples = f"samples, held out in {evidence['folds']} folds," if "folds" in evidence else "held-out samples"
    figures = (
        f"On {result['rows']} {samples} the result agrees with the experts on {100 * result['agreement']:.1f} % "
        f"(start: {100 * start['agreement']:.1f} %), at {result['kl']:.4f} nats from them (start: {start['kl']:.4f})"
    )
    tasks = shorten(evidence.get("tasks_without_expert", ()))
    unproved = f" Nothing is proved for what has no expert: {tasks}." if tasks else ""
    if evidence["exported"] == "result":
        return logging.WARNING if tasks else logging.INFO, f"{figures}: it is better, and kept.{unproved}"
    return logging.WARNING, f"{figures}: it is not better, so the start is exported.{unproved}"


@torch.no_grad()
def measure(trainer: Trainer, method: MergingMethod) -> Agreement | None:
    """Measure the present coefficients on the held-out samples; None where no task has an expert.

    The devices share the work, and get the same.
    """
    data: UnlabeledTasks = trainer.datamodule  # type: ignore[attr-defined]
    tally = Tally(task for task in data.holdout_streams if task in method.model.teachers)

    def observe(step: TaskStep) -> None:
        if step.task in tally:
            tally.add(step.task, step.outputs.rows(), step.teacher())

    values = method.model.coefficients()
    with trainer.precision_plugin.forward_context():
        for batch in data.holdout_batches():
            if batch or method.model.is_sharded:
                moved = {task: part.to(method.device) for task, part in batch.items()}
                method.run(moved, values, needs_gradient=False, observers=[observe])
    return tally.result(method.device)
