"""Where task vectors live: on the device, in the host's memory, or formed tile by tile from mapped experts.

Legend: E experts, n entries of a flattened parameter.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from adamerge.errors import InputError, did_you_mean
from adamerge.pool.low_rank import Factors, LowRank, directions, matrix_shape
from adamerge.pool.stacks import (
    ALIGN,
    Dense,
    Factored,
    Int8,
    Mapped,
    Source,
    Stack,
    padded,
    takes_int8,
    write_task_vector,
)
from adamerge.system.finite import is_finite
from adamerge.system.memory import free_memory
from adamerge.transforms import Prepared

Storage = Literal["auto", "device", "ram", "stream"]
_SHARE = 0.5  # of the free memory of host or device that task vectors may take before `auto` looks further
_CPU = torch.device("cpu")
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
    "int8": torch.int8,
}


class TaskVectors:
    """Task vectors of E experts by parameter, read as tiles (E, entries).

    A parameter that all experts changed by low-rank products stays factored, whatever the storage.

    Args:
        experts: E.
        storage: ``ram`` forms stacks (E, n) in the host's memory; ``stream`` keeps the experts' own (mapped) tensors,
            and subtracts the base from a tile when it is read. In float32 both give the same bits. ``device`` and
            ``auto`` begin as one of these, and choose again in :meth:`to`.
        start: ``ram`` or ``stream``, what they begin as: see :func:`choose_storage`.
        size: Bytes that all stacks take.
        dtype: Dtype of stacks; int8 has one scale per expert and index of dimension 0.
        compute_dtype: Dtype of tiles.

    Attributes:
        stacks: Parameter to its task vectors.
        storage: Where they are now: ``device`` (an accelerator), ``ram``, ``stream`` or ``packed``.
    """

    def __init__(
        self, experts: int, storage: Storage, start: str, size: int, dtype: torch.dtype, compute_dtype: torch.dtype
    ) -> None:
        self._experts = experts
        self._wanted = storage
        self._size = size
        self._dtype = dtype
        self._compute_dtype = compute_dtype
        self._device = _CPU
        self.stacks: dict[str, Stack] = {}
        self._scratch: Tensor | None = None
        self._directions: dict[tuple[str, int], Factors] = {}
        self.storage = start

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the task vectors hold; mapped files count as none."""
        stacks, directions = self.stacks.values(), self._directions.values()
        return sum(stack.nbytes for stack in stacks) + sum(factors.nbytes for factors in directions)

    def add(self, name: str, experts: Iterable[Source], base: Tensor, transform: Prepared | None = None) -> None:
        """Form, or map, one parameter's task vectors.

        Args:
            name: The parameter.
            experts: Its value in each expert (*S), or its task vector as a product.
            base: Its value in the base, (*S) in ``compute_dtype``.
            transform: Applied to the stack, unless it is zero; NaN and infinity are left for the caller to find.
        """
        dtype = self._compute_dtype
        sources = [s.to(dtype=dtype) if isinstance(s, LowRank) else s.reshape(-1) for s in experts]
        products = [source for source in sources if isinstance(source, LowRank)]
        if len(products) == len(sources) and transform is None:
            self.stacks[name] = Factored(Factors(products))
        elif self.storage == "stream":
            self.stacks[name] = Mapped(sources)
        else:
            self.stacks[name] = self._formed(name, sources, base, transform)

    def add_packed(self, name: str, stack: Dense | Int8) -> None:
        """Take one parameter's task vectors from a packed file; they stay mapped unless ``ram`` was asked for."""
        if self._wanted == "ram":
            self.stacks[name] = _in_memory(stack)
        else:
            self.stacks[name], self.storage = stack, "packed"

    def factors(self, name: str) -> Factors | None:
        """Return the factors of a parameter that is kept as such, else None."""
        stack = self.stacks[name]
        return stack.factors if isinstance(stack, Factored) else None

    def directions(self, name: str, count: int, base: Tensor) -> Factors:
        """Return so many leading singular directions of each expert's, found once; ``base`` is the parameter (*S)."""
        if (name, count) not in self._directions:
            factors, matrix = self.factors(name), matrix_shape(base.shape)
            changes: Iterable[Tensor | LowRank] = (
                self.tile(name, 0, base.numel(), base.view(-1), True).view(-1, *matrix)
                if factors is None
                else factors.experts
            )
            products = [directions(change, count).to(base.device, base.dtype) for change in changes]
            self._directions[name, count] = Factors(products)
        return self._directions[name, count]

    def tile(self, name: str, start: int, stop: int, base: Tensor, reuse: bool) -> Tensor:
        """Return entries ``start:stop``, (E, stop - start) in ``compute_dtype`` on the device of ``base``.

        Args:
            name: The parameter.
            start: First entry.
            stop: End, exclusive.
            base: The parameter in the base, flattened (n,), for streamed experts.
            reuse: Whether the result may be overwritten by the next call.
        """
        stack = self.stacks[name]
        tile = stack.view(start, stop, base)
        if tile is None:
            tile = self._buffer(start, stop, reuse)
            stack.fill(tile, start, stop, base)
        return tile

    def to(self, device: torch.device, base: Mapping[str, Tensor]) -> None:
        """Follow the pool to a device, in place.

        On an accelerator ``device`` takes the task vectors along, ``ram`` leaves them in page-locked memory of the
        host and copies tiles, ``stream`` leaves the experts mapped; ``auto`` takes them along where they fit.

        Args:
            device: Where tiles are wanted.
            base: The base's parameters (*S), there already.
        """
        self._device, self._scratch = device, None
        self._directions = {key: factors.to(device) for key, factors in self._directions.items()}
        is_host = device.type == "cpu"
        along = not is_host and self._goes_along(device)
        for name in list(self.stacks):
            stack = self.stacks[name]
            if isinstance(stack, Mapped) and along:
                self.stacks[name] = self._formed(name, stack.experts, base[name])
            elif along or isinstance(stack, (Factored, Mapped)):
                self.stacks[name] = stack.to(device)
            else:
                self.stacks[name] = stack.to(_CPU, pin=device.type == "cuda")
        if along:
            self.storage = "device"
        elif self.storage == "device":
            self.storage = "ram"

    def _goes_along(self, device: torch.device) -> bool:
        if self._wanted != "auto":
            return self._wanted == "device"
        return self._size <= _SHARE * free_device_memory(device)

    def _formed(
        self, name: str, sources: Sequence[Source], base: Tensor, transform: Prepared | None = None
    ) -> Dense | Int8:
        """Form a stack, expert by expert unless a transform must see all of them."""
        flat, shape = base.reshape(-1), tuple(base.shape)
        stack = self._empty(shape, base.device)
        in_place = isinstance(stack, Dense) and stack.data.dtype == flat.dtype
        if transform is None and not in_place:
            row = torch.empty_like(flat)
            for expert, source in enumerate(sources):
                write_task_vector(row, source, flat)
                stack.put(expert, row)
            return stack
        whole = stack if in_place else Dense.empty(self._experts, len(flat), flat.dtype, flat.device)
        assert isinstance(whole, Dense)
        for row, source in zip(whole.data, sources, strict=True):
            write_task_vector(row, source, flat)
        if transform is not None and whole.data.any() and is_finite(whole.data):
            task_vectors = whole.data.view(self._experts, *shape)
            task_vectors.copy_(transform(name, task_vectors))
        if whole is not stack:
            for expert, row in enumerate(whole.data):
                stack.put(expert, row)
        return stack

    def _empty(self, shape: tuple[int, ...], device: torch.device) -> Dense | Int8:
        """Return the stack for a parameter of this shape; what int8 does not suit stays in ``compute_dtype``."""
        if self._dtype == torch.int8 and takes_int8(shape):
            return Int8.empty(self._experts, shape, self._compute_dtype, device)
        dtype = self._compute_dtype if self._dtype == torch.int8 else self._dtype
        return Dense.empty(self._experts, torch.Size(shape).numel(), dtype, device)

    def _buffer(self, start: int, stop: int, reuse: bool) -> Tensor:
        """Return memory for a tile (E, stop - start), aligned as the tile is in a stored stack.

        BLAS takes another path, with another rounding, for rows that are aligned differently.
        """
        offset = start % ALIGN
        width = padded(offset + stop - start)
        needed = self._experts * width
        scratch = self._scratch if reuse else None
        if scratch is None or scratch.numel() < needed:
            scratch = torch.empty(needed, dtype=self._compute_dtype, device=self._device)
            self._scratch = scratch if reuse else self._scratch
        return scratch[:needed].view(-1, width)[:, offset : offset + stop - start]


def choose_storage(storage: str, size: int) -> str:
    """Return ``ram`` or ``stream`` for so many bytes; ``auto`` and ``device`` go by the free memory."""
    if storage in ("ram", "stream"):
        return storage
    return "ram" if size <= _SHARE * free_memory() else "stream"


def dtype_of(name: str | None) -> torch.dtype | None:
    """Return the dtype of task vectors that ``pool.dtype`` names; None for the default.

    Raises:
        InputError: If it is no dtype that task vectors can be kept in.
    """
    if name is None:
        return None
    if name not in DTYPES:
        raise InputError(f"pool.dtype: expected {', '.join(DTYPES)}, found {name!r}.{did_you_mean(name, DTYPES)}")
    return DTYPES[name]


def compute_dtype_of(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return what a pool computes in, whose parameters have these dtypes in the base's file."""
    return torch.float64 if torch.float64 in set(dtypes) else torch.float32


def free_device_memory(device: torch.device) -> float:
    """Return the free bytes of an accelerator; infinity where only trying would tell."""
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else float("inf")


def _in_memory(stack: Dense | Int8) -> Dense | Int8:
    """Copy a mapped stack into memory."""
    if isinstance(stack, Int8):
        return Int8(stack.codes.clone(), stack.scales.clone())
    copy = Dense.empty(stack.data.shape[0], stack.data.shape[1], stack.data.dtype, _CPU)
    copy.data.copy_(stack.data)
    return copy
