"""Progress of an adaptation run: a rich bar on a terminal, plain log lines elsewhere."""

import logging
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

log = logging.getLogger(__name__)

_LOG_LINES = 5  # per run, where there is no terminal


class MergingProgress(ProgressBar):
    """Step, rate, time left, loss and mean coefficient of ``fit``.

    Args:
        description: What the bar says it does.
        console: Where to draw; default the standard error, so that results can be piped.
    """

    def __init__(self, description: str = "Adapting", console: Console | None = None) -> None:
        super().__init__()
        self._description = description
        self._console = console or Console(stderr=True)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._enabled = True

    def disable(self) -> None:
        """Called by Lightning on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Called by Lightning to undo :meth:`disable`."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the bar, from the step a resumed run stands at."""
        if self._enabled and self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}"), console=self._console, transient=True,
            )  # fmt: skip
            self._progress.start()
            total = trainer.max_steps if trainer.max_steps > 0 else None
            self._task = self._progress.add_task(
                self._description, total=total, completed=trainer.global_step, metrics=""
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the bar, or log a line now and then."""
        if not self._enabled:
            return
        step = trainer.global_step
        if self._progress is not None:
            self._progress.update(self._task, completed=step, metrics=_metrics(trainer))
        elif trainer.max_steps > 0 and step % max(1, trainer.max_steps // _LOG_LINES) == 0:
            log.info("%s: step %d of %d, %s", self._description, step, trainer.max_steps, _metrics(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the bar away."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the bar away when the run is stopped."""
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class _Rate(TextColumn):
    """Steps per second."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Any) -> Text:
        return Text(f"{task.speed:.1f} steps/s" if task.speed else "")


def _metrics(trainer: Trainer) -> str:
    values = trainer.callback_metrics
    shown = [
        f"{name} {values[key].item():.4f}"
        for name, key in (("loss", "adapt/loss"), ("mean coefficient", "adapt/coefficient"))
        if key in values
    ]
    return ", ".join(shown)
