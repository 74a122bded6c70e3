"""Stop at the end of a step when asked to, with everything saved."""

import logging
import signal
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from lightning.pytorch import Callback, LightningModule, Trainer

from adamerge.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, Interrupted
from adamerge.system import ranks

log = logging.getLogger(__name__)


class GracefulStop(Callback):
    """On Ctrl-C or SIGTERM finish the running step, save a checkpoint, and leave with a telling exit code.

    A second Ctrl-C stops at once, unsaved.

    Args:
        checkpoint: Where to save.
    """

    def __init__(self, checkpoint: Path | str) -> None:
        self.checkpoint = Path(checkpoint)
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals, after Lightning has."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and leave, if a signal has come and the optimizer's step is complete."""
        complete = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if not complete:
            return
        signals = ranks.largest(self._signal or 0, pl_module.device)  # a signal may reach one process first
        if signals:  # gradients that are still accumulating are not saved
            trainer.save_checkpoint(self.checkpoint)
            log.info("Stopped after step %d, saved to %s", trainer.global_step, self.checkpoint)
            _leave(signals)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the handlers back, and leave if a signal came after the last step."""
        self.on_exception()
        if signals := ranks.largest(self._signal or 0, pl_module.device):
            _leave(signals)

    def on_exception(self, *_: Any) -> None:
        """Put the handlers back when the fit is stopped too; Lightning's own would outlive it."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal is not None:
            raise SystemExit(EXIT_INTERRUPTED)  # not KeyboardInterrupt, which Lightning turns into exit code 1
        self._signal = number


def _leave(number: int) -> NoReturn:
    raise Interrupted(EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED)
