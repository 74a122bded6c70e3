"""Tensors that are kept in a folder from run to run, one safetensors file per key.

A key is a hash of all that decides the tensors (:func:`~adamerge.checkpoints.hashes.digest`), so a file never has to be
updated, and every file can be deleted at any time. The metadata holds a checksum: a damaged file counts as none.
"""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from adamerge.checkpoints.checkpoint import SafetensorsCheckpoint
from adamerge.checkpoints.hashes import digest
from adamerge.checkpoints.writing import save_state_dict
from adamerge.errors import InputError

log = logging.getLogger(__name__)


class TensorCache:
    """A folder of tensors by key, which several processes may share.

    Args:
        kind: A word for them, as ``head``: log lines begin with ``head_cache``, and the checksum is the metadata's
            ``adamerge_head``.
        folder: Where the files lie.
        level: Level of the log line about a file that cannot be written.
    """

    def __init__(self, kind: str, folder: Path, level: int = logging.WARNING) -> None:
        self.folder = folder
        self._kind, self._level = kind, level

    def get(self, key: str, names: Collection[str]) -> dict[str, Tensor] | None:
        """Return the tensors under a key, on the CPU; None where no file is or, with a warning, a damaged one.

        Args:
            key: Name of the file without its ending.
            names: Tensors that the file must have.
        """
        path = self._path(key)
        if not path.exists():
            return None
        try:
            file = SafetensorsCheckpoint(path)
            tensors = {name: file.get(name).clone() for name in file.keys}  # a copy: the file may be replaced
            with safe_open(path, framework="pt") as opened:
                checksum = (opened.metadata() or {}).get(f"adamerge_{self._kind}")
            if digest(tensors) != checksum or not set(names) <= set(tensors):
                raise InputError(f"{path}: the content is not what was written.")
        except (InputError, OSError) as error:
            log.warning("%s_cache: a damaged file is made anew (%s)", self._kind, " ".join(str(error).split()))
            return None
        return tensors

    def put(self, key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None) -> bool:
        """Write tensors under a key, atomically; return whether that went well.

        Args:
            key: Name of the file without its ending.
            tensors: Name to tensor.
            facts: More metadata, for people who look into the file.
        """
        path = self._path(key)
        try:
            save_state_dict(tensors, path, {f"adamerge_{self._kind}": digest(tensors), **(facts or {})})
        except OSError as error:
            log.log(self._level, "%s_cache: %s cannot be written (%s)", self._kind, path, error.strerror or error)
            return False
        return True

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"
