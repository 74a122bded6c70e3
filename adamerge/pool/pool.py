"""The expert pool: one base, E experts, validated, and their task vectors.

Legend: E experts, n entries of one parameter, ``*S`` its shape. Task vectors are tau = expert - base,
stacked on axis 0; names are the encoder's own (``key_map`` relates them to the files').
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamerge.checkpoints.checkpoint import Checkpoint, MemoryCheckpoint, drop_mapped_pages
from adamerge.checkpoints.composed import tell_once
from adamerge.checkpoints.configurations import check_configurations
from adamerge.checkpoints.hashes import check_hash
from adamerge.checkpoints.hub import HubReference
from adamerge.errors import InputError
from adamerge.pool.headers import KeyMap, check_layout, shared_names
from adamerge.pool.lazy import LazyTensors
from adamerge.pool.lora import change_of
from adamerge.pool.low_rank import Factors
from adamerge.pool.opening import check_names, open_files
from adamerge.pool.options import PoolOptions, stored_dtype
from adamerge.pool.packed import PackedFile
from adamerge.pool.report import PoolReport, check_differ, check_finite, check_norms, norms_of, pool_report
from adamerge.pool.task_vectors import TaskVectors, choose_storage, compute_dtype_of
from adamerge.pool.tiles import READ, tiles
from adamerge.system.memory import return_freed_memory
from adamerge.transforms import Prepared

log = logging.getLogger(__name__)


class ExpertPool:
    """A base and its experts, checked, with their task vectors at hand.

    Build it with :meth:`from_files` or :meth:`from_state_dicts`.

    Example:
        >>> base = {"w": torch.zeros(2), "b": torch.zeros(1)}
        >>> experts = {"cars": {**base, "w": torch.ones(2)}, "dtd": {**base, "w": torch.tensor([0.0, 3.0])}}
        >>> pool = ExpertPool.from_state_dicts(base, experts)
        >>> pool.names, pool.expert_names, pool.skipped
        (('w',), ('cars', 'dtd'), {'b': 'no expert changed it'})
        >>> pool.task_vectors("w")
        tensor([[1., 1.],
                [0., 3.]])

    Attributes:
        names: The merged parameters, in the base's order.
        expert_names: The experts, in order; axis 0 of every stacked tensor.
        base: Name to tensor (*S) in ``compute_dtype``.
        fixed: Parameters of the encoder that are not merged (excluded, or no expert changed them).
        shapes: Name to shape, of the merged parameters.
        norms: Name to the norms of the task vectors, (E,).
        compute_dtype: float32, or float64 where the base is float64.
        skipped: Base tensor name to why it is not merged.
        transform: Applied to the task vectors, or None.
        packed: The file that the task vectors come from, or None.
        mapped: Whether nothing is in memory, neither base nor task vectors.
        options: As given.
    """

    UNCHANGED = "no expert changed it"

    def __init__(self, base: Checkpoint, experts: Mapping[str, Checkpoint], options: PoolOptions) -> None:
        self.options, self.device = options, torch.device("cpu")
        self.source, self._experts, self.expert_names = base, dict(experts), tuple(experts)
        self.transform, self.mapped, self.tied = options.transform, options.mapped, dict(options.tied or {})
        self.keys = KeyMap(base.keys, options.key_map)
        layout = check_layout(base, experts, self.keys, options)
        layout.refuse()
        for remark in layout.remarks:
            tell_once(remark, logging.WARNING)
        self.skipped, self._every_name = dict(layout.skipped), sorted((*layout.merged, *layout.fixed))
        specs = {name: base.spec(self.keys.file_key(name)) for name in layout.merged}
        shapes = {name: shape for name, (shape, _) in specs.items()}
        self.compute_dtype = compute_dtype_of(dtype for _, dtype in specs.values())
        self.packed = None if options.task_vectors is None else PackedFile(options.task_vectors)
        self._dtype = stored_dtype(options, self.packed, self.compute_dtype)
        if self.packed is not None:
            for problem in self.packed.problems(self.expert_names, shapes):
                raise InputError(problem)
            self.packed.check_source(self.hashes(), self.keys_digest)
        self.base, self.fixed = self._tensors(), self._tensors()
        for name in layout.fixed:
            self.fixed[name] = self._read(base, name) if self.mapped else self._read(base, name).clone()
        self._prepared = None if options.transform is None else Prepared(options.transform, self._untransformed())
        size = sum(map(math.prod, shapes.values())) * len(experts) * self._dtype.itemsize
        self._task_vectors = self._empty_task_vectors(size if self.packed is None else self.packed.nbytes)
        self.norms: dict[str, Tensor] = {}
        self._load(layout.merged)
        return_freed_memory()  # the more experts, the more of it
        self.names = tuple(self.base)
        self.shapes = {name: shapes[name] for name in self.names}
        check_differ(
            self.norms, self._experts, base.name, options,
            lambda one, two: all(torch.equal(tile[one], tile[two]) for _, tile in self.tiles()),
        )  # fmt: skip
        if options.storage == "auto" and not self.mapped:
            self._log_storage()

    def _untransformed(self) -> "ExpertPool":
        """Return the pool that statistics come from: experts as in their files, before any rounding to ``dtype``."""
        raw = replace(self.options, transform=None, storage="stream", dtype=None)
        return ExpertPool(self.source, self._experts, raw)

    def _empty_task_vectors(self, size: int) -> TaskVectors:
        storage = "stream" if self.mapped else self.options.storage
        start = choose_storage(storage, size) if self.transform is None else "ram"
        return TaskVectors(len(self._experts), storage, start, size, self._dtype, self.compute_dtype)

    @property
    def storage(self) -> str:
        """Where the task vectors are now: ``device`` (an accelerator), ``ram``, ``stream`` or ``packed``."""
        return self._task_vectors.storage

    @classmethod
    def from_files(
        cls,
        base: Path | str | HubReference,
        experts: Mapping[str, Path | str | HubReference],
        *,
        hashes: Mapping[str, str] | None = None,
        **options: Any,
    ) -> "ExpertPool":
        """Open a base and its experts from checkpoint files.

        Args:
            base: The pretrained checkpoint, a model's folder, or a reference to the Hub (``hf://org/name``). Hugging
                Face's CLIPs are known by their keys, and seen under open_clip's names; so are the experts.
            experts: Expert name to its checkpoint, a model's folder, or the folder of a LoRA adapter in peft's format;
                the order becomes axis 0.
            hashes: SHA-256 that the files of ``base`` and of experts by name must have, as far as known.
            **options: See :class:`~adamerge.pool.options.PoolOptions`: ``storage``, ``exclude``, ``transform``, ...

        Raises:
            FileNotFoundError: If a file does not exist.
            InputError: If anything does not fit; the message names file and tensor.
        """
        checked = PoolOptions(**options)
        source, opened, errors = open_files(base, experts, checked)
        if errors or source is None:
            raise errors[0]
        for name, checkpoint in {"base": source, **opened}.items():
            check_hash(checkpoint.name, name, (hashes or {}).get(name), checkpoint.sha256)
        check_configurations(source, opened)
        return cls(source, opened, checked)

    @classmethod
    def from_state_dicts(
        cls,
        base: Mapping[str, Tensor],
        experts: Mapping[str, Mapping[str, Tensor]],
        **options: Any,
    ) -> "ExpertPool":
        """Make a pool of state dicts in memory; names that share memory in ``base`` are tied.

        Args:
            base: Parameter name to tensor.
            experts: Expert name to state dict.
            **options: See :class:`~adamerge.pool.options.PoolOptions`: ``include``, ``exclude``, ``transform``, ...

        Raises:
            InputError: If anything does not fit.
        """
        check_names(experts)
        opened = {name: MemoryCheckpoint(name, tensors) for name, tensors in experts.items()}
        checked = PoolOptions(**{"storage": "device", "tied": shared_names(base), **options})
        return cls(MemoryCheckpoint("base", base), opened, checked)

    def task_vectors(self, name: str) -> Tensor:
        """Return the task vectors of one parameter, (E, *S) in ``compute_dtype``."""
        return self.tile(name, 0, self.base[name].numel()).view(-1, *self.shapes[name])

    def tile(self, name: str, start: int, stop: int, *, reuse: bool = False) -> Tensor:
        """Return entries ``start:stop`` of a flattened parameter's task vectors, (E, stop - start).

        With ``reuse`` no memory is allocated, and the next call may overwrite the result.
        """
        return self._task_vectors.tile(name, start, stop, self.base[name].view(-1), reuse)

    def exact_tile(self, name: str, start: int, stop: int) -> Tensor:
        """Return the same as :meth:`tile` on the CPU in float64, with the same bits wherever task vectors live."""
        factors = self.factors(name)
        if factors is None:
            return self.tile(name, start, stop).cpu().double()
        tile = torch.empty(len(self.expert_names), stop - start, dtype=torch.float64)
        for row, expert in zip(tile, factors.experts, strict=True):
            expert.to(tile.device, tile.dtype).expand(start, stop, row)
        return tile

    def factors(self, name: str, directions: int = 0) -> Factors | None:
        """Return a parameter's task vectors as products of thin matrices, where all experts came so; else None.

        With ``directions`` so many of each expert's singular ones, the strongest first; they are kept.
        """
        vectors = self._task_vectors
        return vectors.directions(name, directions, self.base[name]) if directions else vectors.factors(name)

    def pieces(self, name: str, entries: range | None = None, multiple: int = 1024) -> Iterator[tuple[slice, Tensor]]:
        """Yield all or some entries of task vectors in small tiles (multiples), valid until the next: where, (E, k)."""
        size = max(multiple, READ // len(self.expert_names) // multiple * multiple)
        for start, stop in tiles(range(self.base[name].numel()) if entries is None else entries, size):
            yield slice(start, stop), self.tile(name, start, stop, reuse=True)

    def tiles(self) -> Iterator[tuple[str, Tensor]]:
        """Pass over all task vectors once, in small tiles: name and (E, k), each valid until the next."""
        for name in self.names:
            for _, tile in self.pieces(name):
                yield name, tile

    def checkpoint(self, expert: str) -> Checkpoint:
        """Return an expert's own file, for what is not merged, such as its classifier."""
        return self._experts[expert]

    def expert_parameters(self, expert: str, dtype: torch.dtype | None = None) -> MutableMapping[str, Tensor]:
        """Return an expert's own parameters (never transformed), name to (*S) in ``compute_dtype``.

        Excluded parameters are its own too; the base's stand in for those that it lacks.
        With a ``dtype`` those of two or more dimensions are in that; where the file's is the same, they stay mapped.
        Memory: one model, for as long as the caller keeps it; of a mapped pool one parameter.
        """
        parameters = self.tensors_of(expert, (*self.base, *self.fixed), dtype)
        return parameters if self.mapped else dict(parameters)

    def tensors_of(self, expert: str | None, names: Sequence[str], dtype: torch.dtype | None = None) -> LazyTensors:
        """Return some of an expert's own parameters (None: the base's) as above, each read when asked for."""
        present = set((checkpoint := self.source if expert is None else self._experts[expert]).keys)

        def read(name: str) -> Tensor:
            key = self.keys.file_key(name)
            if key in present and checkpoint.spec(key)[0] == self.source.spec(key)[0]:
                return self._read(checkpoint, name, dtype)
            return self.base[name] if name in self.base else self.fixed[name]

        return LazyTensors(read, tuple(names))

    def buffers(self, like: Mapping[str, Tensor], expert: str | None = None) -> dict[str, Tensor]:
        """Return the base's, or an expert's, values of an encoder's buffers, such as BatchNorm statistics.

        Raises:
            InputError: See :meth:`~adamerge.pool.headers.KeyMap.buffers`.
        """
        return self.keys.buffers(self.source if expert is None else self._experts[expert], like)

    def to(self, device: torch.device | str) -> "ExpertPool":
        """Move to a device, in place; which task vectors come along is a matter of the storage."""
        self.device = torch.device(device)
        for tensors in (self.base, self.fixed):
            if isinstance(tensors, LazyTensors):
                tensors.forget()
            else:
                tensors.update({name: tensor.to(self.device) for name, tensor in tensors.items()})
        before = self.storage
        self._task_vectors.to(self.device, self.base)
        if self.storage != before:
            self._log_storage()
        return self

    @property
    def dtype_name(self) -> str:
        """Dtype of the stored task vectors, such as ``float32``; streamed ones are never rounded."""
        dtype = self.compute_dtype if self.storage == "stream" else self._dtype
        return str(dtype).removeprefix("torch.")

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the task vectors hold; mapped files count as none."""
        return self._task_vectors.nbytes

    @property
    def keys_digest(self) -> str:
        """What tells pools apart that read other keys of the same files: a hash of names and keys."""
        keys = {name: self.keys.file_key(name) for name in self._every_name}
        return hashlib.sha256(json.dumps([keys, sorted(self.tied.items())]).encode()).hexdigest()[:16]

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of the base (key ``base``) and of each expert; reads every file once."""
        if not hasattr(self, "_hashes"):
            self._hashes = {"base": self.source.sha256()}
            self._hashes |= {name: checkpoint.sha256() for name, checkpoint in self._experts.items()}
        return dict(self._hashes)

    def report(self) -> PoolReport:
        """Return sizes, hashes, norms, cosines and what is skipped; one pass over the task vectors."""
        return pool_report(
            self._experts, self.base, self.tiles(), self.hashes(),
            skipped=self.skipped, norms=self.norms, storage=self.storage, bytes=self.nbytes, dtype=self.dtype_name,
            transform=self.transform if self.packed is None else self.packed.transform,
        )  # fmt: skip

    def _read(self, checkpoint: Checkpoint, name: str, of_matrices: torch.dtype | None = None) -> Tensor:
        tensor = checkpoint.get(self.keys.file_key(name)).to(self.device)
        dtype = of_matrices if of_matrices is not None and tensor.ndim > 1 else self.compute_dtype
        return tensor.to(dtype).contiguous() if tensor.is_floating_point() else tensor

    def _tensors(self) -> MutableMapping[str, Tensor]:
        """Return an empty mapping for tensors of the base: they stay in it, or are read again each time."""
        return LazyTensors(lambda name: self._read(self.source, name)) if self.mapped else {}

    def _load(self, names: Sequence[str]) -> None:
        """Read the base, form or map the task vectors, and set unchanged parameters aside."""
        for name in names:
            base = self._read(self.source, name)
            if isinstance(self.source, MemoryCheckpoint):
                base = base.clone()  # the caller may go on changing its own tensors
            check_finite(base, self.source.name, self.keys.file_key(name))
            self.base[name] = base
            if self._add(name, base):
                norms = norms_of((tile for _, tile in self.pieces(name)), self.compute_dtype)
                check_norms(norms, self.keys.file_key(name), self._experts, self.dtype_name)
            else:
                norms = torch.zeros(len(self._experts))
            if not norms.any():
                self._set_aside(name)
                continue
            self.norms[name] = norms
            if base.numel() > READ:
                drop_mapped_pages()
                if not self.mapped:
                    return_freed_memory()  # of the tiles: what is kept of each parameter lies between them

    def _add(self, name: str, base: Tensor) -> bool:
        """Form, or map, one parameter's task vectors; returns whether a packed file has any."""
        if self.packed is None:
            key = self.keys.file_key(name)
            changes = (change_of(checkpoint, key) for checkpoint in self._experts.values())
            self._task_vectors.add(name, changes, base, self._prepared)
            return True
        if (stack := self.packed.stack(name)) is not None:
            self._task_vectors.add_packed(name, stack)
        return stack is not None

    def _set_aside(self, name: str) -> None:
        """Keep a parameter at the base's values, as no expert changed it."""
        self.fixed[name] = self.base.pop(name)
        self._task_vectors.stacks.pop(name, None)
        self.skipped[self.keys.file_key(name)] = self.UNCHANGED + self.options.after

    def _log_storage(self) -> None:
        held, level = self.nbytes / 1e6, logging.INFO if self.storage == "stream" else logging.DEBUG
        log.log(level, "Task vectors of %d experts: %s, %.0f MB.", len(self.expert_names), self.storage, held)
