"""A pool's task vectors in one safetensors file, read through a memory map.

The tensor ``<parameter>`` is the stack (E, *S) in float32, bfloat16, float16, float64 or int8; an int8 stack has its
scales (E, S[0]) under ``<parameter>#scales``. Vectors and short rows are never int8. The metadata key
``adamerge_task_vectors`` holds JSON: see :class:`PackedFile`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from adamerge.checkpoints.checkpoint import SafetensorsCheckpoint, open_checkpoint, stored_facts
from adamerge.errors import InputError, shorten
from adamerge.pool.stacks import Dense, Int8
from adamerge.pool.task_vectors import DTYPES

FORMAT = 1
METADATA = "adamerge_task_vectors"
SCALES = "#scales"
_REMEDY = "Pack the pool again, or open the one that was packed."


class PackedFile:
    """A packed file, opened and checked.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it is not a packed file, or of a newer format.

    Attributes:
        experts: Their names, in the order of the stacks.
        hashes: SHA-256 of the base (key ``base``) and of each expert.
        transform: Description of what was done to the task vectors, or None.
        dtype: Dtype of the stacks.
        unchanged: Parameters that no expert changed, and that the file therefore lacks.
    """

    def __init__(self, path: Path | str) -> None:
        opened = open_checkpoint(path)
        content = _metadata(opened.path) if isinstance(opened, SafetensorsCheckpoint) else None
        if content is None or not isinstance(opened, SafetensorsCheckpoint):
            raise InputError(
                f"pool.task_vectors: {path}: not a file of packed task vectors: its metadata lacks {METADATA!r}. "
                "Name a file that adamerge transform wrote."
            )
        if content.get("format") != FORMAT:
            raise InputError(
                f"pool.task_vectors: {path}: format {content.get('format')!r} is not {FORMAT}; update adamerge."
            )
        self.name = opened.name
        self.path = opened.path
        self.experts: tuple[str, ...] = tuple(content["experts"])
        self.hashes: Mapping[str, str] = content["hashes"]
        self.transform: Any = content["transform"]
        if content["dtype"] not in DTYPES:
            raise InputError(
                f"pool.task_vectors: {path}: expected one of {', '.join(DTYPES)} as dtype, found {content['dtype']!r}."
            )
        self.dtype: torch.dtype = DTYPES[content["dtype"]]
        self.unchanged = frozenset(content["unchanged"])
        self._file = opened
        self._keys = set(opened.keys)
        self._keys_digest = content.get("keys")

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size

    def problems(self, experts: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
        """Yield how experts and parameters differ from a pool's; costs no tensor read.

        Args:
            experts: The pool's.
            shapes: Parameter name to shape, of all that the pool would merge.
        """
        where = f"pool.task_vectors: {self.name}"
        if self.experts != experts:
            yield f"{where}: made for the experts {shorten(self.experts)}, the pool has {shorten(experts)}. {_REMEDY}"
            return
        missing = [name for name in shapes if name not in self._keys and name not in self.unchanged]
        if missing:
            yield f"{where}: lacks {len(missing)} parameters that the pool merges: {shorten(missing)}. {_REMEDY}"
        for name, shape in shapes.items():
            expected = (len(experts), *shape)
            if name in self._keys and self._file.spec(name)[0] != expected:
                yield f"{where}: {name!r}: expected {expected}, found {self._file.spec(name)[0]}. {_REMEDY}"
                return

    def check_source(self, hashes: Mapping[str, str], keys: str) -> None:
        """Refuse a pool whose files have changed since, or that reads other keys of them.

        Raises:
            InputError: If a hash differs.
        """
        if self._keys_digest != keys:
            raise InputError(
                f"pool.task_vectors: {self.name}: made from other keys of the same files (key prefix, include, "
                f"exclude or tied weights differ). {_REMEDY}"
            )
        changed = [name for name, value in hashes.items() if self.hashes.get(name) != value]
        if changed:
            raise InputError(
                f"pool.task_vectors: {self.name}: made from other files: the content of {shorten(changed)} differs. "
                f"{_REMEDY}"
            )

    def stack(self, name: str) -> Dense | Int8 | None:
        """Return one parameter's task vectors, backed by the memory map; None where no expert changed it."""
        if name not in self._keys:
            return None
        data = self._file.get(name).flatten(1) if len(self._file.spec(name)[0]) > 1 else self._file.get(name)[:, None]
        if data.dtype == torch.int8:
            return Int8(data, self._file.get(name + SCALES), is_mapped=True)
        return Dense(data, is_mapped=True)


def _metadata(path: Path) -> dict[str, Any] | None:
    content = stored_facts(path, METADATA)
    required = {"format", "experts", "hashes", "transform", "dtype", "unchanged"}
    return content if content is not None and required <= set(content) else None
