"""The experts' outputs for a method's inputs, asked for once and cached."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lightning.pytorch import Trainer
from torch import Tensor

from adamerge.data.batch import Inputs, Outputs, TaskBatch
from adamerge.data.unlabeled_tasks import UnlabeledTasks
from adamerge.model.merged_model import MergedModel
from adamerge.model.teacher_files import TeacherFiles, ask_expert
from adamerge.system import progress, ranks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Teaching:
    """Asks the experts of a model, and keeps their answers in its cache.

    Args:
        model: The model whose experts are asked.
        hidden_layers: Modules of the encoder to capture, by path or glob.
        files: A folder that keeps the answers from run to run; None for none.
        trainer: Says with which precision.
    """

    model: MergedModel
    hidden_layers: tuple[str, ...]
    files: TeacherFiles | None
    trainer: Trainer

    def __call__(self, task: str, inputs: Inputs, indices: Tensor) -> Outputs:
        """Return the outputs of a task's expert for inputs (B, ...) at positions (B,), in the midst of a step."""
        if self.files is not None and self.model.teacher_cache.get(task, indices) is None:
            self._ask(task, [TaskBatch(inputs, indices)])  # held-out inputs
        return self.model.teacher(task, inputs, indices, self.hidden_layers)

    def ask_all(self, data: UnlabeledTasks) -> None:
        """Fill the cache in a fixed order, one expert in memory at a time."""
        trainer = self.trainer
        steps = trainer.max_steps * trainer.accumulate_grad_batches if trainer.max_steps > 0 else None
        draw = trainer.progress_bar_callback is not None
        for task in progress.track(list(data.streams), "Asking the experts", "tasks", draw=draw):
            batches = [TaskBatch(*batch) for batch in data.teacher_loader(task, steps)]
            with trainer.precision_plugin.forward_context():
                self._ask(task, batches)
        self.ask_held_out(data, data.holdout_streams)
        if self.files is not None:
            log.info("Teachers: %s", self.files.summary())

    def ask_held_out(self, data: UnlabeledTasks, tasks: Iterable[str]) -> None:
        """Ask about the held-out inputs of tasks that the cache lacks, one expert in memory at a time."""
        cache = self.model.teacher_cache
        for task in tasks:
            batches = [batch[task] for batch in data.holdout_batches([task]) if batch]
            missing = [batch for batch in batches if cache.get(task, batch.indices) is None]
            if any(ranks.everyones(bool(missing))):
                with self.trainer.precision_plugin.forward_context():
                    self._ask(task, missing)

    def ask_together(self, batch: Mapping[str, TaskBatch]) -> None:
        """Ask about all inputs that any process lacks answers for, before the encoder holds merged weights."""
        cache = self.model.teacher_cache
        missing = [task for task, part in batch.items() if cache.get(task, part.indices) is None]
        for task in dict.fromkeys(task for tasks in ranks.everyones(missing) for task in tasks):
            self._ask(task, [batch[task]] if task in missing else [])

    def _ask(self, task: str, batches: Sequence[TaskBatch]) -> None:
        computed = {"precision": str(self.trainer.precision), "device": self.model.pool.device.type}
        ask_expert(self.model, task, batches, self.hidden_layers, self.files, computed)
