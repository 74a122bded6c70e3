"""How long a run has adapted, all its sessions together."""

from pathlib import Path

from lightning.pytorch.callbacks import Timer

from adamerge.checkpoint_io import AtomicCheckpointIO

_KEY = "adamerge.elapsed"


class Elapsed(Timer):
    """Lightning's timer, which checkpoints keep, under a key of its own: ``trainer.max_time`` brings another."""

    @property
    def state_key(self) -> str:
        """What checkpoints call it."""
        return _KEY


def seconds_of(checkpoint: Path) -> float:
    """Return how long a run had adapted when it wrote a checkpoint; 0 where there is none, or it does not say.

    Raises:
        InputError: If the checkpoint is damaged.
    """
    if not checkpoint.is_file():
        return 0.0
    callbacks = AtomicCheckpointIO().load_checkpoint(checkpoint, weights_only=True).get("callbacks") or {}
    return float(callbacks.get(_KEY, {}).get("time_elapsed", {}).get("train", 0.0))
