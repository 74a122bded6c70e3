"""Lightning's checkpoints, written as every other file: under a temporary name, synced, renamed."""

import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import TorchCheckpointIO

from adamerge.errors import InputError
from adamerge.system.archives import ZIP_MAGIC, stored_members
from adamerge.system.files import atomic_path


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints so that a kill, a crash or a full disk during a save leaves the previous one as it was.

    Lightning's own moves a file out of the folder for temporary files, unsynced; where that lies on another file
    system the move is a copy, and a kill leaves half a checkpoint under the final name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path | str, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: If it cannot be written; the previous one is then still there.
        """
        content = io.BytesIO()  # kilobytes; torch's own writer does not say why it could not write
        torch.save(checkpoint, content)
        with atomic_path(Path(path)) as temporary:
            temporary.write_bytes(content.getbuffer())

    def load_checkpoint(
        self, path: Path | str, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            InputError: If it is damaged, or a zip archive that torch does not write.
        """
        try:
            with Path(path).open("rb") as file:
                if file.read(2) == ZIP_MAGIC:
                    stored_members(file)
            return super().load_checkpoint(path, map_location, weights_only)
        except OSError:
            raise
        except Exception as error:  # a damaged file can raise nearly anything in torch's reader
            reason = str(error).strip().split("\n", 1)[0]
            raise InputError(
                f"{path}: damaged checkpoint ({reason or type(error).__name__}). Put a copy back, or remove the file "
                "and start the run again in another folder."
            ) from error


def write_atomically(trainer: Trainer) -> None:
    """Let a trainer write its checkpoints atomically, unless a plugin or strategy has brought a way of its own."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
