"""Lightning's checkpoints, written as every other file: under a temporary name, synced, renamed."""

import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import TorchCheckpointIO

from adamerge.checkpoints.pickles import check_archive
from adamerge.errors import InputError
from adamerge.system.files import atomic_path

_PARTS = {  # of a checkpoint of Lightning's, and their kinds
    **{"state_dict": dict, "callbacks": dict, "loops": dict, "epoch": int, "global_step": int},
    **{"optimizer_states": list, "lr_schedulers": list, "pytorch-lightning_version": str},
}


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
            check_archive(Path(path))
            content: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only=True)
        except OSError:
            raise
        except Exception as error:  # a damaged file can raise nearly anything in torch's reader
            reason = str(error).removeprefix(f"{path}: ").strip(" .").split("\n", 1)[0]
            raise InputError(
                f"{path}: damaged checkpoint ({reason or type(error).__name__}). Put a copy back, or remove the file "
                "and start the run again in another folder."
            ) from error
        _check_structure(content, path)
        return content


def _check_structure(content: Any, path: Path | str) -> None:
    """Check that a checkpoint has the parts that Lightning writes.

    Raises:
        InputError: If one is missing, or of another kind.
    """
    parts = content if isinstance(content, dict) else {}
    for key, kind in _PARTS.items():
        if not isinstance(parts.get(key), kind) or isinstance(parts.get(key), bool):
            found = type(parts[key]).__name__ if key in parts else "none"
            raise InputError(
                f"{path}: not a checkpoint of a run: expected {key} as {kind.__name__}, found {found}. Put a copy "
                "back, or start the run again in another folder."
            )


def write_atomically(trainer: Trainer) -> None:
    """Let a trainer write its checkpoints atomically, unless a plugin or strategy has brought a way of its own."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
