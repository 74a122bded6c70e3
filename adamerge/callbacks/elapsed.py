"""How long a run has adapted, all its sessions together."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from adamerge.callbacks.checkpoint_io import AtomicCheckpointIO
from adamerge.system.progress import Stopwatch

_KEY = "adamerge.elapsed"


class Elapsed(Callback):
    """Counts the seconds of training, and keeps them in checkpoints.

    Lightning's ``Timer`` does so too, but beside one a trainer ignores its own ``max_time``.
    """

    def __init__(self) -> None:
        self.has_started = False  # training, so that nothing is restored any more
        self._before = 0.0
        self._watch: Stopwatch | None = None

    @property
    def seconds(self) -> float:
        """Seconds of training, in this session and those before."""
        return self._before + (0.0 if self._watch is None else self._watch.seconds())

    @property
    def state_key(self) -> str:
        """The key of the callback's state in checkpoints."""
        return _KEY

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting."""
        self._watch, self.has_started = Stopwatch(), True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop counting."""
        self._before, self._watch = self.seconds, None

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._before = float(state_dict["seconds"])


def seconds_of(checkpoint: Path) -> float:
    """Return how long a run had adapted when it wrote a checkpoint; 0 without one, or where it does not say.

    Raises:
        InputError: If the checkpoint is damaged.
    """
    if not checkpoint.is_file():
        return 0.0
    state = AtomicCheckpointIO().load_checkpoint(checkpoint)["callbacks"].get(_KEY)
    seconds = state.get("seconds") if isinstance(state, dict) else None
    return float(seconds) if isinstance(seconds, (int, float)) else 0.0
