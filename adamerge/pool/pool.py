"""The expert pool: one base, E experts, validated, and their task vectors.

Legend: E experts, n entries of one parameter, ``*S`` its shape. Task vectors are tau = expert - base,
stacked on axis 0; names are the encoder's own (``key_map`` relates them to the files').
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NoReturn

import torch
from torch import Tensor

from adamerge.checkpoints.checkpoint import Checkpoint, MemoryCheckpoint
from adamerge.checkpoints.hashes import check_hash
from adamerge.checkpoints.hub import HubReference, located_all
from adamerge.checkpoints.model_folder import open_model
from adamerge.errors import InputError
from adamerge.pool.headers import KeyMap, Layout, check_layout, check_names, shared_names
from adamerge.pool.lazy import LazyTensors
from adamerge.pool.lora import change_of, open_expert
from adamerge.pool.low_rank import Factors
from adamerge.pool.packed import PackedFile
from adamerge.pool.report import PoolReport
from adamerge.pool.task_vectors import DTYPES, Storage, TaskVectors, check_storage, choose_storage
from adamerge.system.memory import return_freed_memory
from adamerge.transforms import Prepared, Transform

log = logging.getLogger(__name__)

_BASE = "base"  # the name of the base among the experts', which none of them may have
_TILE = 1 << 18  # entries, of all experts together, of the tiles that checks, reports and statistics read


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
        compute_dtype: float32, or float64 where the base is float64.
        skipped: Base tensor name to why it is not merged.
        transform: Applied to the task vectors, or None.
        packed: The file that the task vectors come from, or None.
        mapped: Whether nothing is in memory, neither base nor task vectors.
        wanted_storage: As given, for the parts of a mapped pool.
    """

    UNCHANGED = "no expert changed it"

    def __init__(
        self,
        base: Checkpoint,
        experts: Mapping[str, Checkpoint],
        *,
        storage: Storage = "device",
        dtype: torch.dtype | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        key_map: str | Mapping[str, str] | None = None,
        tied: Mapping[str, str] | None = None,
        transform: Transform | None = None,
        task_vectors: Path | str | None = None,
        duplicates: Literal["refuse", "allow"] = "refuse",
        mapped: bool = False,
    ) -> None:
        if duplicates not in ("refuse", "allow"):
            raise InputError(f"pool.duplicates: expected refuse or allow, found {duplicates!r}.")
        keys = KeyMap(base.keys, key_map)
        layout = check_layout(base, experts, keys, include, exclude, tied or {})
        if layout.problems:
            _refuse(layout.problems)
        self.source = base
        self.expert_names = tuple(experts)
        self.tied = dict(tied or {})
        self.keys = keys
        self.skipped = dict(layout.skipped)
        self._experts = dict(experts)
        dtypes = {base.spec(keys.file_key(name))[1] for name in layout.merged}
        self.compute_dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        self.device = torch.device("cpu")
        self.mapped, self.wanted_storage = mapped, storage
        self.fixed = self._tensors()
        for name in layout.fixed:
            self.fixed[name] = self._read(base, name) if mapped else self._read(base, name).clone()
        self._every_name = sorted((*layout.merged, *layout.fixed))
        self.transform = transform
        self._prepared: Prepared | None = None
        self.packed = None if task_vectors is None else PackedFile(task_vectors)
        self._dtype = self._check_options(storage, dtype, layout)
        if mapped:
            storage = "stream"
        if transform is not None:
            # Statistics come from the raw experts as they are in their files, before any rounding to ``dtype``.
            raw = partial(
                ExpertPool, include=include, exclude=exclude, key_map=key_map, tied=tied, duplicates=duplicates
            )
            self._prepared = Prepared(transform, raw(base, experts, storage="stream"))
        self.base = self._tensors()
        entries = sum(math.prod(base.spec(keys.file_key(name))[0]) for name in layout.merged)
        size = entries * len(experts) * self._dtype.itemsize if self.packed is None else self.packed.nbytes
        start = choose_storage(storage, size) if transform is None else "ram"
        self._task_vectors = TaskVectors(len(experts), storage, start, size, self._dtype, self.compute_dtype)
        self._norms: dict[str, Tensor] = {}
        self._load(layout.merged)
        return_freed_memory()  # the more experts, the more of it
        self.names = tuple(self.base)
        self.shapes = {name: base.spec(keys.file_key(name))[0] for name in self.names}
        self._check_content(duplicates == "allow")
        if storage == "auto":
            self._log_storage()

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
        storage: Storage = "auto",
        dtype: torch.dtype | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        key_map: str | Mapping[str, str] | None = None,
        tied: Mapping[str, str] | None = None,
        transform: Transform | None = None,
        task_vectors: Path | str | None = None,
        duplicates: Literal["refuse", "allow"] = "refuse",
        mapped: bool = False,
        hashes: Mapping[str, str] | None = None,
    ) -> "ExpertPool":
        """Open a base and its experts from checkpoint files.

        Args:
            base: The pretrained checkpoint, a model's folder, or a reference to the Hub (``hf://org/name``). Hugging
                Face's CLIPs are known by their keys, and seen under open_clip's names; so are the experts.
            experts: Expert name to its checkpoint, a model's folder, or the folder of a LoRA adapter in peft's format;
                the order becomes axis 0.
            storage: Where task vectors live: ``device``, ``ram`` (of the host), ``stream`` (formed tile by tile from
                the mapped files), or ``auto``: the first of these where they fit into half of the free memory.
            dtype: Of task vectors in memory: bfloat16 halves it, int8 quarters it. Default: as computed. Streamed
                ones are never rounded, and products of LoRA stay as computed.
            include: Globs of parameter names to merge (default all).
            exclude: Globs of parameter names to leave at the base's values.
            key_map: Prefix to strip from the files' keys (``"visual."``: other keys are not merged), or
                a mapping from the files' keys to the encoder's names.
            tied: Alias to canonical parameter name, for weights that the encoder shares.
            transform: Changes each parameter's task vectors, see :mod:`adamerge.transforms`; not with ``stream``.
            task_vectors: A file of packed task vectors, see :mod:`adamerge.pool.pack`; ``experts`` stay the teachers.
            duplicates: Whether two files with the same weights are an error; one file twice always is.
            mapped: Keep nothing in memory, and read from the mapped files whatever is asked for: for pools of which
                each process holds a part (:class:`~adamerge.pool.part.PoolPart`); ``storage`` is that of the part.
            hashes: SHA-256 that the files of ``base`` and of experts by name must have, as far as known.

        Raises:
            FileNotFoundError: If a file does not exist.
            InputError: If anything does not fit; the message names file and tensor.
        """
        check_names(experts)
        places = located_all({_BASE: base, **experts})
        source, prefix = open_model(places.pop(_BASE)), key_map if isinstance(key_map, str) else ""
        check_names(places)
        opened = {name: open_expert(path, source, prefix) for name, path in places.items()}
        for name, checkpoint in {_BASE: source, **opened}.items():
            check_hash(checkpoint.name, name, (hashes or {}).get(name), checkpoint.sha256)
        return cls(
            source, opened, storage=storage, dtype=dtype, include=include, exclude=exclude, key_map=key_map,
            tied=tied, transform=transform, task_vectors=task_vectors, duplicates=duplicates, mapped=mapped,
        )  # fmt: skip

    @classmethod
    def from_state_dicts(
        cls,
        base: Mapping[str, Tensor],
        experts: Mapping[str, Mapping[str, Tensor]],
        *,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        transform: Transform | None = None,
        duplicates: Literal["refuse", "allow"] = "refuse",
    ) -> "ExpertPool":
        """Make a pool of state dicts in memory; names that share memory in ``base`` are tied.

        Args:
            base: Parameter name to tensor.
            experts: Expert name to state dict.
            include: Globs of parameter names to merge (default all).
            exclude: Globs of parameter names to leave at the base's values.
            transform: Changes each parameter's task vectors, see :mod:`adamerge.transforms`.
            duplicates: Whether two experts with the same weights are an error.

        Raises:
            InputError: If anything does not fit.
        """
        check_names(experts)
        return cls(
            MemoryCheckpoint("base", base),
            {name: MemoryCheckpoint(name, tensors) for name, tensors in experts.items()},
            include=include,
            exclude=exclude,
            tied=shared_names(base),
            transform=transform,
            duplicates=duplicates,
        )

    def task_vectors(self, name: str) -> Tensor:
        """Return the task vectors of one parameter, (E, *S) in ``compute_dtype``."""
        return self.tile(name, 0, self.base[name].numel()).view(-1, *self.shapes[name])

    def tile(self, name: str, start: int, stop: int, *, reuse: bool = False) -> Tensor:
        """Return entries ``start:stop`` of a flattened parameter's task vectors, (E, stop - start).

        Args:
            name: The parameter.
            start: First entry.
            stop: End, exclusive.
            reuse: Whether the result may be overwritten by the next call (no memory is allocated then).
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

    def factors(self, name: str) -> Factors | None:
        """Return a parameter's task vectors as products of thin matrices, where all experts came so; else None."""
        return self._task_vectors.factors(name)

    def pieces(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """Yield a parameter's task vectors in tiles that stay small whatever its size: where, and (E, entries).

        A tile is valid until the next.
        """
        size, step = self.base[name].numel(), max(1024, _TILE // len(self.expert_names) // 1024 * 1024)
        for start in range(0, size, step):
            stop = min(start + step, size)
            yield slice(start, stop), self.tile(name, start, stop, reuse=True)

    def tiles(self) -> Iterator[tuple[str, Tensor]]:
        """Pass over all task vectors once, in small tiles: name and (E, k), each valid until the next."""
        for name in self.names:
            for _, tile in self.pieces(name):
                yield name, tile

    def checkpoint(self, expert: str) -> Checkpoint:
        """Return an expert's own file, for what is not merged, such as its classifier."""
        return self._experts[expert]

    def expert_parameters(self, expert: str) -> MutableMapping[str, Tensor]:
        """Return an expert's own parameters (never transformed), name to (*S) in ``compute_dtype``.

        Excluded parameters are its own too; the base's stand in for those that it lacks.
        Memory: one model, for as long as the caller keeps it; of a mapped pool one parameter.
        """
        checkpoint = self._experts[expert]
        present = set(checkpoint.keys)

        def read(name: str) -> Tensor:
            key = self.keys.file_key(name)
            if key in present and checkpoint.spec(key)[0] == self.source.spec(key)[0]:
                return self._read(checkpoint, name)
            return self.base[name] if name in self.base else self.fixed[name]

        own = LazyTensors(read, (*self.base, *self.fixed))
        return own if self.mapped else dict(own)

    def buffers(self, like: Mapping[str, Tensor], expert: str | None = None) -> dict[str, Tensor]:
        """Return the base's, or an expert's, values of an encoder's buffers, such as BatchNorm statistics.

        Args:
            like: Buffer name to the encoder's own: its dtype and device are kept, and it stands in where
                the file has no such tensor.
            expert: Whose; default the base's.

        Raises:
            InputError: If a buffer has another shape in the file.
        """
        checkpoint = self.source if expert is None else self._experts[expert]
        present, values = set(checkpoint.keys), {}
        for name, own in like.items():
            key = self.keys.file_key(name) if name in self.keys else None
            if key not in present:
                values[name] = own
                continue
            shape = checkpoint.spec(key)[0]
            if shape != tuple(own.shape):
                raise InputError(
                    f"{checkpoint.name}: buffer {key!r}: expected the encoder's shape {tuple(own.shape)}, "
                    f"found {shape}. Were both made from the same architecture?"
                )
            values[name] = checkpoint.get(key).to(own, copy=True)
        return values

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
        gram = torch.zeros(len(self.expert_names), len(self.expert_names), dtype=torch.float64)
        for name in self.names:
            for _, tile in self.pieces(name):
                gram += (tile @ tile.T).cpu().double()
        norms = gram.diagonal().sqrt()
        base = {name: torch.linalg.vector_norm(w, dtype=torch.float64).item() for name, w in self.base.items()}
        scale = math.hypot(*base.values())
        hashes = self.hashes()
        return PoolReport(
            experts={
                name: {
                    "source": self._experts[name].name,
                    "sha256": hashes[name],
                    "norm": norm,
                    "relative_norm": norm / scale,
                }
                for name, norm in zip(self.expert_names, norms.tolist(), strict=True)
            },
            parameters=len(self.names),
            entries=sum(tensor.numel() for tensor in self.base.values()),
            skipped=self.skipped,
            cosines=gram / torch.outer(norms, norms),
            norms=self._norms,
            base_norms=base,
            storage=self.storage,
            bytes=self.nbytes,
            dtype=self.dtype_name,
            transform=self.transform if self.packed is None else self.packed.transform,
        )

    def _read(self, checkpoint: Checkpoint, name: str) -> Tensor:
        tensor = checkpoint.get(self.keys.file_key(name)).to(self.device)
        return tensor.to(self.compute_dtype).contiguous() if tensor.is_floating_point() else tensor

    def _tensors(self) -> MutableMapping[str, Tensor]:
        """Return an empty mapping for tensors of the base: they stay in it, or are read again each time."""
        return LazyTensors(lambda name: self._read(self.source, name)) if self.mapped else {}

    def _load(self, names: Sequence[str]) -> None:
        """Read the base, form or map the task vectors, and set unchanged parameters aside."""
        for name in names:
            base = self._read(self.source, name)
            if isinstance(self.source, MemoryCheckpoint):
                base = base.clone()  # the caller may go on changing its own tensors
            _check_finite(base, self.source.name, self.keys.file_key(name))
            self.base[name] = base
            if not self._add(name, base):
                self._set_aside(name)
                continue
            # Without a float64 copy of each tile: between small tensors that stay, such copies fragment the heap.
            tiles = (tile for _, tile in self.pieces(name))
            squares = sum(torch.linalg.vector_norm(tile, dim=1, dtype=torch.float64).square() for tile in tiles)
            norms = torch.as_tensor(squares).sqrt().to(self.compute_dtype)
            if not torch.isfinite(norms).all():
                expert = self.expert_names[int((~torch.isfinite(norms)).nonzero()[0])]
                key, checkpoint = self.keys.file_key(name), self._experts[expert]
                _check_finite(checkpoint.get(key), checkpoint.name, key)
                raise InputError(
                    f"pool.dtype: {self.dtype_name} overflows in the task vector of expert {expert!r}, tensor {key!r}. "
                    "Use bfloat16 or float32, and check the file if that fails too."
                )
            if not norms.any():
                self._set_aside(name)
                continue
            self._norms[name] = norms
            if base.numel() > _TILE:
                return_freed_memory()  # of the tiles: what is kept of each parameter lies between them

    def _add(self, name: str, base: Tensor) -> bool:
        """Form, or map, one parameter's task vectors; returns whether a packed file has any."""
        if self.packed is None:
            key = self.keys.file_key(name)
            changes = (change_of(checkpoint, key) for checkpoint in self._experts.values())
            self._task_vectors.add(name, changes, base, self._prepared)
            return True
        stack = self.packed.stack(name)
        if stack is not None:
            self._task_vectors.add_packed(name, stack)
        return stack is not None

    def _set_aside(self, name: str) -> None:
        """Keep a parameter at the base's values, as no expert changed it."""
        self.fixed[name] = self.base.pop(name)
        self._task_vectors.drop(name)
        self.skipped[self.keys.file_key(name)] = self.UNCHANGED + self._after()

    def _check_options(self, storage: str, dtype: torch.dtype | None, layout: Layout) -> torch.dtype:
        """Hold the options about task vectors against each other, and return the dtype of stored ones."""
        check_storage(storage)
        if dtype is not None and dtype not in DTYPES.values():
            raise InputError(f"pool.dtype: expected float32, bfloat16, float16 or int8, found {dtype}.")
        if self.transform is not None and storage == "stream":
            raise InputError(
                "pool.storage: transformed task vectors are kept in memory; use ram, no transform, or pack them and "
                "name the file as pool.task_vectors."
            )
        if self.mapped:
            self._check_mapped(storage, dtype)
        if self.packed is None:
            return dtype or self.compute_dtype
        where = f"pool.task_vectors: {self.packed.name}"
        if self.transform is not None:
            raise InputError(
                f"{where}: holds {self.packed.transform or 'plain'} task vectors; expected no transform, found "
                f"{type(self.transform).__name__}. Leave the transform out, or pack the pool with it."
            )
        if dtype not in (None, self.packed.dtype):
            raise InputError(f"pool.dtype: {self.packed.name} holds {self.packed.dtype}, found {dtype}; leave it out.")
        shapes = {name: self.source.spec(self.keys.file_key(name))[0] for name in layout.merged}
        for problem in self.packed.problems(self.expert_names, shapes):
            raise InputError(problem)
        self.packed.check_source(self.hashes(), self.keys_digest)
        return self.packed.dtype

    def _check_mapped(self, storage: str, dtype: torch.dtype | None) -> None:
        """Refuse what needs task vectors in memory."""
        found = "pool.storage: 'stream'" if storage == "stream" else ""
        if self.packed is None and dtype not in (None, self.compute_dtype):
            found = f"pool.dtype: {str(dtype).removeprefix('torch.')}"
        if self.transform is not None:
            found = f"transform: {type(self.transform).__name__}"
        if found:
            raise InputError(
                f"{found}: not with a pool of which each device keeps its part in memory, as computed (trainer=fsdp). "
                "Leave it out; or write task vectors so with adamerge transform, and name the file as "
                "pool.task_vectors."
            )

    def _log_storage(self) -> None:
        held, level = self.nbytes / 1e6, logging.INFO if self.storage == "stream" else logging.DEBUG
        log.log(level, "Task vectors of %d experts: %s, %.0f MB.", len(self.expert_names), self.storage, held)

    def _check_content(self, allows_duplicates: bool) -> None:
        """Refuse experts that are the base, or (a coefficient would count twice) each other."""
        if not self.names:
            raise InputError(
                f"Every expert is identical to the base {self.source.name}{self._after()}: all task vectors are zero. "
                "Are the experts the fine-tuned files?"
            )
        norms = torch.stack(list(self._norms.values()))
        for row, expert in enumerate(self.expert_names):
            if not norms[:, row].any():
                raise InputError(
                    f"Expert {expert!r} ({self._experts[expert].name}) is identical to the base {self.source.name}"
                    f"{self._after()}: its task vector is zero. Remove it or name its fine-tuned file."
                )
            for other in range(0 if allows_duplicates else row):
                if torch.equal(norms[:, row], norms[:, other]) and self._equal(row, other):
                    raise InputError(
                        f"Experts {self.expert_names[other]!r} and {expert!r} have identical weights{self._after()} "
                        f"({self._experts[expert].name}). Remove one or name its own file; "
                        "if both are wanted, set pool.duplicates=allow."
                    )

    def _after(self) -> str:
        return f" after the transform {type(self.transform).__name__}" if self.transform is not None else ""

    def _equal(self, first: int, second: int) -> bool:
        return all(torch.equal(tile[first], tile[second]) for _, tile in self.tiles())


def _check_finite(tensor: Tensor, where: str, key: str) -> None:
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise InputError(
            f"{where}: tensor {key!r} holds {bad} NaN or infinite values of {tensor.numel()}. "
            "The checkpoint is damaged or diverged in training; use another one."
        )


def _refuse(problems: Sequence[str]) -> NoReturn:
    more = f" (and {len(problems) - 1} more problems; `adamerge check` lists all)" if len(problems) > 1 else ""
    raise InputError(problems[0] + more)
