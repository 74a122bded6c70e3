"""Progress of an adaptation run: a bar on a terminal, and lines in its log."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import Progress, TaskID

from adamerge.system import progress

_LOG_LINES = 5  # per run


class MergingProgress(ProgressBar):
    """Step, rate, time left, loss and mean coefficient of ``fit``.

    Args:
        description: What the bar says it does.
    """

    def __init__(self, description: str = "Adapting") -> None:
        super().__init__()
        self._description = description
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._start = (0, 0.0)  # step and clock at the start of this fit
        self._enabled = True

    def disable(self) -> None:
        """Called by Lightning on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Called by Lightning to undo :meth:`disable`."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the bar, from the step a resumed run stands at."""
        if not self._enabled:
            return
        self._start = (trainer.global_step, time.perf_counter())
        self._bar = progress.bar("steps")
        self._bar.start()
        self._task = self._bar.add_task(
            self._description, total=_total(trainer), completed=trainer.global_step, detail=""
        )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Advance the bar, and log a line now and then."""
        if self._bar is None:
            return
        step, total = trainer.global_step, _total(trainer)
        if not self._bar.disable:
            self._bar.update(self._task, completed=step, detail=_metrics(trainer))
        if total is not None and step % max(1, total // _LOG_LINES) == 0:
            first, clock = self._start
            rate = (step - first) / max(time.perf_counter() - clock, 1e-9)
            progress.log.info("%s: %s", self._description, progress.line(step, total, rate, "steps", _metrics(trainer)))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Take the bar away, at the end and when the run is stopped."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    on_exception = on_train_end


def _total(trainer: Trainer) -> int | None:
    return trainer.max_steps if trainer.max_steps > 0 else None


def _metrics(trainer: Trainer) -> str:
    values = trainer.callback_metrics
    shown = [
        f"{name} {values[key].item():.4f}"
        for name, key in (("loss", "adapt/loss"), ("mean coefficient", "adapt/coefficient"))
        if key in values
    ]
    return ", ".join(shown)
