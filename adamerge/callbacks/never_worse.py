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
from adamerge.model.batch_norm import BatchNormPolicy
from adamerge.model.merged_model import MergedModel
from adamerge.model.task_step import TaskStep
from adamerge.results.agreement import Comparison, Tally, is_in_doubt

log = logging.getLogger(__name__)


class NeverWorse(Callback):
    """Measure start and result against the experts on held-out samples; end with the start unless the result is better.

    Needs ``data.holdout``; no label is used. Better means: a lower divergence from the experts, and agreement with them
    on no fewer samples than chance explains (:attr:`~adamerge.results.agreement.Comparison.is_better`). What was
    measured is logged, and goes to ``merge.json`` as ``evidence``. A task without an expert has no part in it: it is
    named, and ``callbacks=collapse_guard`` is all that can watch it. Without any, the result is kept. It has the last
    word: put it after callbacks that choose coefficients, such as ``KeepBest``.
    Few held-out samples prove little: ``method.anchor`` is the remedy, this the proof. ``adamerge adapt`` therefore
    learns on parts of few samples first (the ``folds`` of :class:`~adamerge.UnlabeledTasks`), each judged by the
    samples that it lacks, and then on all of them.

    Args:
        batch_norm: The statistics that both are measured with: the export's; None for those of learning.

    Attributes:
        evidence: What was measured, and which of the two was kept; None before the end.
        comparison: Start and result on the held-out samples; None before the end.
        folds: The comparisons of folds, which decide where data have folds; None in a fold, which decides nothing.
    """

    def __init__(self, batch_norm: BatchNormPolicy | None = None) -> None:
        self.batch_norm = batch_norm
        self._start: Tensor | None = None
        self.folds: Sequence[Comparison] | None = ()
        self.comparison: Comparison | None = None
        self.evidence: dict[str, Any] | None = None

    def check_data(self, data: object) -> None:
        """Refuse data without held-out samples or folds.

        Raises:
            InputError: If there are none.
        """
        if not getattr(data, "folds", 0):
            check_held_out("NeverWorse", data)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember the start, before a checkpoint is read."""
        if not isinstance(pl_module, MergingMethod) or not pl_module.learns_coefficients:
            raise InputError(
                f"NeverWorse: expected a method that learns coefficients, found {type(pl_module).__name__}."
            )
        data: Any = getattr(trainer, "datamodule", None)
        self.check_data(data)
        if not self.folds and has_experts(pl_module.model, data):
            check_held_out("NeverWorse", data)
        self._start = pl_module.model.coefficients.raw.detach().clone()

    @torch.no_grad()
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure both, and put the start back where the result is not better."""
        assert isinstance(pl_module, MergingMethod)
        assert self._start is not None
        data: UnlabeledTasks = trainer.datamodule  # type: ignore[attr-defined]
        raw = pl_module.model.coefficients.raw
        learned, at_start = raw.clone(), self._start.to(raw)
        if self.evidence is None:  # else the fit had ended before a resume
            if self.folds:
                self.comparison = sum(self.folds[1:], self.folds[0])
            else:
                if not pl_module.uses_teacher:  # else they were asked before the first step
                    pl_module.ask_held_out(data, _judged(pl_module.model, data))
                result = self._measured(trainer, pl_module)
                raw.copy_(at_start)
                self.comparison = Comparison.of(self._measured(trainer, pl_module), result, pl_module.device)
            self.evidence = self._evidence(data, pl_module)
        raw.copy_(learned if self.evidence["exported"] == "result" else at_start)
        pl_module.evidence = self.evidence
        if trainer.is_global_zero and self.folds is not None:
            log.log(*_sentence(self.evidence))

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured, for the last checkpoint."""
        return {"evidence": self.evidence, "sums": None if self.comparison is None else self.comparison.sums}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint stood."""
        self.evidence = state_dict["evidence"]
        sums = state_dict.get("sums")
        self.comparison = None if sums is None else Comparison(sums)

    def _measured(self, trainer: Trainer, method: MergingMethod) -> Tally:
        """Measure the present coefficients as they would be exported."""
        model, data = method.model, trainer.datamodule  # type: ignore[attr-defined]
        buffers = model.encoder_buffers
        if self.batch_norm is not None and self.batch_norm.applies(model):
            model.set_buffers(self.batch_norm.final(model, model.merge(), data))
        tally = measure(trainer, method)
        model.encoder_buffers = buffers
        return tally

    def _evidence(self, data: UnlabeledTasks, method: MergingMethod) -> dict[str, Any]:
        comparison = self.comparison
        assert comparison is not None
        evidence: dict[str, Any] = {"exported": "result", "start": None, "result": None}
        if comparison.rows:
            evidence["exported"] = "result" if comparison.is_better else "start"
            evidence |= {"start": asdict(comparison.start), "result": asdict(comparison.result)}
            evidence["kl_error"] = comparison.kl_error
        if unproved := [task for task in data.streams if task not in method.model.teachers]:
            evidence["tasks_without_expert"] = unproved
        return evidence | ({"folds": len(self.folds)} if self.folds else {})


def has_experts(model: MergedModel, data: UnlabeledTasks) -> bool:
    """Return whether any task of the data has an expert to agree with."""
    return any(task in model.teachers for task in data.streams)


def _judged(model: MergedModel, data: UnlabeledTasks) -> list[str]:
    """Return the held-out tasks that have an expert."""
    return [task for task in data.holdout_streams if task in model.teachers]


def _sentence(evidence: dict[str, Any]) -> tuple[int, str]:
    """Say what was measured, with the level to log it at."""
    start, result = evidence["start"], evidence["result"]
    if start is None:
        return logging.WARNING, (
            "NeverWorse: no held-out task has an expert to agree with, so that the result is kept without proof; "
            "callbacks=collapse_guard sees whether it collapses."
        )
    samples = f"samples held out in {evidence['folds']} folds" if "folds" in evidence else "held-out samples"
    figures = (
        f"The result agrees with the experts in {100 * result['agreement']:.1f} % of {result['rows']} predictions for "
        f"{samples} (start: {100 * start['agreement']:.1f} %), at {result['kl']:.4f} nats (start: {start['kl']:.4f}; "
        f"error of the difference: {evidence['kl_error']:.4f})"
    )
    tasks = shorten(evidence.get("tasks_without_expert", ()))
    unproved = f" Nothing is proved for what has no expert: {tasks}." if tasks else ""
    far = ", as far as so few can tell" if is_in_doubt(evidence) else ""
    if evidence["exported"] == "result":
        return logging.WARNING if tasks else logging.INFO, f"{figures}: it is better{far}, and kept.{unproved}"
    return logging.WARNING, f"{figures}: it is not better{far}, so the start is exported.{unproved}"


@torch.no_grad()
def measure(trainer: Trainer, method: MergingMethod) -> Tally:
    """Measure the present coefficients on the held-out samples of tasks that have an expert; devices share the work."""
    data: UnlabeledTasks = trainer.datamodule  # type: ignore[attr-defined]
    tasks = _judged(method.model, data)
    tally = Tally(tasks)

    def observe(step: TaskStep) -> None:
        tally.add(step.task, step.outputs.rows(), step.teacher())

    values = method.model.coefficients()
    with trainer.precision_plugin.forward_context():
        for batch in data.holdout_batches(tasks):
            if batch or method.model.is_sharded:
                moved = {task: part.to(method.device) for task, part in batch.items()}
                method.run(moved, values, needs_gradient=False, observers=[observe])
    return tally
