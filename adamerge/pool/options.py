"""How a pool is read, and which of these options go together."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from adamerge.errors import InputError, check_choice, check_globs
from adamerge.pool.packed import PackedFile
from adamerge.pool.task_vectors import DTYPES, Storage
from adamerge.transforms import Transform


@dataclass(frozen=True, kw_only=True)
class PoolOptions:
    """How a pool is read: the keyword options of :meth:`adamerge.ExpertPool.from_files`.

    Attributes:
        storage: Where task vectors live: ``device``, ``ram`` (of the host), ``stream`` (formed tile by tile from
            the mapped files), or ``auto``: the first of these where they fit into half of the free memory.
        dtype: Dtype of task vectors in memory: bfloat16 halves it, int8 quarters it. Default: as computed. Streamed
            ones are never rounded, and products of LoRA stay as computed.
        include: Globs of parameter names to merge (default all).
        exclude: Globs of parameter names to leave at the base's values.
        key_map: Prefix to strip from the files' keys (``"visual."``: other keys are not merged), or
            a mapping from the files' keys to the encoder's names.
        tied: Alias to canonical parameter name, for weights that the encoder shares.
        extended: Parameters of which one expert may have further rows, as of tokens that it alone has: the rows that
            all have merge, and the further ones are that expert's.
        transform: Changes each parameter's task vectors, see :mod:`adamerge.transforms`; not with ``stream``.
        task_vectors: A file of packed task vectors, see :mod:`adamerge.pool.pack`; the experts stay the teachers.
        duplicates: Whether two files with the same weights are an error; one file twice always is.
        unplaced: What becomes of an expert whose tensors have no place in the encoder: ``refuse`` it, ``list`` them in
            the log, or ``auto``: refuse adapters, which say what they change, and list those of whole checkpoints.
        mapped: Keep nothing in memory, and read from the mapped files whatever is asked for: for pools of which
            each process holds a part (:class:`~adamerge.pool.part.PoolPart`); ``storage`` is that of the part.

    Raises:
        InputError: If an option does not take its value, or two options do not go together.
    """

    storage: Storage = "auto"
    dtype: torch.dtype | None = None
    include: Sequence[str] | None = None
    exclude: Sequence[str] | None = None
    key_map: str | Mapping[str, str] | None = None
    tied: Mapping[str, str] | None = None
    extended: Sequence[str] | None = None
    transform: Transform | None = None
    task_vectors: Path | str | None = None
    duplicates: Literal["refuse", "allow"] = "refuse"
    unplaced: Literal["auto", "refuse", "list"] = "auto"
    mapped: bool = False

    def __post_init__(self) -> None:
        check_choice("pool.duplicates", self.duplicates, ("refuse", "allow"))
        check_choice("pool.unplaced", self.unplaced, ("auto", "refuse", "list"))
        check_choice("pool.storage", self.storage, get_args(Storage))
        check_globs("pool.include", self.include or ())
        check_globs("pool.exclude", self.exclude or ())
        check_globs("pool.extended", self.extended or ())
        if self.dtype is not None and self.dtype not in DTYPES.values():
            raise InputError(f"pool.dtype: expected float32, bfloat16, float16 or int8, found {self.dtype}.")
        if self.transform is not None and self.storage == "stream":
            raise InputError(
                "pool.storage: transformed task vectors are kept in memory; use ram, no transform, or pack them and "
                "name the file as pool.task_vectors."
            )

    def leaves_out(self, name: str) -> bool:
        """Return whether a parameter is not to be merged, by ``include`` and ``exclude``."""

        def matches(globs: Sequence[str] | None) -> bool:
            return any(fnmatch.fnmatchcase(name, glob) for glob in globs or ())

        return matches(self.exclude) or (self.include is not None and not matches(self.include))

    @property
    def after(self) -> str:
        """The words that messages about task vectors add where these are transformed."""
        return "" if self.transform is None else f" after the transform {type(self.transform).__name__}"


def stored_dtype(options: PoolOptions, packed: PackedFile | None, computed: torch.dtype) -> torch.dtype:
    """Return the dtype that task vectors are kept in.

    Args:
        options: The options of the pool.
        packed: The file that ``task_vectors`` names.
        computed: The dtype that task vectors are formed in.

    Raises:
        InputError: If options do not fit the packed file, or a pool that keeps nothing in memory.
    """
    if options.mapped:
        _check_mapped(options, computed)
    if packed is None:
        return options.dtype or computed
    if options.transform is not None:
        raise InputError(
            f"pool.task_vectors: {packed.name}: holds {packed.transform or 'plain'} task vectors; expected no "
            f"transform, found {type(options.transform).__name__}. Leave the transform out, or pack the pool with it."
        )
    if options.dtype not in (None, packed.dtype):
        raise InputError(f"pool.dtype: {packed.name} holds {packed.dtype}, found {options.dtype}; leave it out.")
    return packed.dtype


def _check_mapped(options: PoolOptions, computed: torch.dtype) -> None:
    """Refuse what needs task vectors in memory."""
    refused = "pool.storage: 'stream'" if options.storage == "stream" else ""
    if options.task_vectors is None and options.dtype not in (None, computed):
        refused = f"pool.dtype: {str(options.dtype).removeprefix('torch.')}"
    if options.transform is not None:
        refused = f"transform: {type(options.transform).__name__}"
    if refused:
        raise InputError(
            f"{refused}: not with a pool of which each device keeps its part in memory, as computed (trainer=fsdp). "
            "Leave it out; or write task vectors so with adamerge transform, and name the file as pool.task_vectors."
        )
