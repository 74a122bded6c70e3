"""How one parameter's task vectors are kept: whole, rounded, as scaled integers, in mapped files, or factored.

Legend: E experts, n entries of the flattened parameter. Every kind can write any entries of all experts,
(E, stop - start), into a tile on the compute device.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from adamerge.pool.low_rank import Factors, LowRank, matrix_shape, rectangles

Source = Tensor | LowRank  # an expert's own value of a parameter, or its task vector as a product
ALIGN = 16  # entries; 64 bytes of float32, what torch aligns tensors to
_LEVELS = 127  # of int8, to either side of zero
_SHORT = 16  # entries of a row, below which a scale per row would take too large a share


class Stack(ABC):
    """The task vectors of one parameter."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of memory held; mapped files count as none."""

    def view(self, start: int, stop: int, like: Tensor) -> Tensor | None:
        """Return entries ``start:stop`` without a copy, if they lie there in dtype and device of ``like``."""
        return None

    @abstractmethod
    def fill(self, out: Tensor, start: int, stop: int, base: Tensor) -> None:
        """Write entries ``start:stop`` into ``out`` (E, stop - start); ``base`` is the flattened parameter (n,)."""

    @abstractmethod
    def to(self, device: torch.device, *, pin: bool = False) -> "Stack":
        """Return the same on a device, or in page-locked memory of the host."""


class Dense(Stack):
    """Task vectors (E, n) in memory or in a mapped file, in any floating-point dtype."""

    def __init__(self, data: Tensor, *, is_mapped: bool = False) -> None:
        self.data = data
        self.is_mapped = is_mapped

    @classmethod
    def empty(cls, experts: int, entries: int, dtype: torch.dtype, device: torch.device) -> "Dense":
        """Return an unwritten stack whose rows all start aligned."""
        return cls(torch.empty(experts, padded(entries), dtype=dtype, device=device)[:, :entries])

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return 0 if self.is_mapped else self.data.untyped_storage().nbytes()

    def put(self, expert: int, row: Tensor) -> None:
        """Keep one expert's task vector (n,)."""
        self.data[expert].copy_(row)

    def view(self, start: int, stop: int, like: Tensor) -> Tensor | None:
        """Return the entries themselves where they need no conversion.

        Rows of a mapped file that are not aligned are copied: BLAS would round differently there.
        """
        fits = self.data.dtype == like.dtype and self.data.device == like.device
        if not fits or (self.is_mapped and not _is_aligned(self.data)):
            return None
        return self.data[:, start:stop]

    def fill(self, out: Tensor, start: int, stop: int, base: Tensor) -> None:
        """Copy and convert."""
        _copy_rows(out, self.data, start, stop)

    def to(self, device: torch.device, *, pin: bool = False) -> "Dense":
        """Move; a mapped stack that stays on the host stays mapped."""
        if self.is_mapped and device.type == "cpu":
            return self
        moved = _moved(self.data, device, pin)
        return self if moved is self.data else Dense(moved)


class Int8(Stack):
    """Task vectors as integers (E, n) with one scale per expert and index of dimension 0, (E, d)."""

    def __init__(self, codes: Tensor, scales: Tensor, *, is_mapped: bool = False) -> None:
        self.codes = codes
        self.scales = scales
        self.is_mapped = is_mapped

    @classmethod
    def empty(cls, experts: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> "Int8":
        """Return an unwritten stack; scales are kept in ``dtype``."""
        rows, width = matrix_shape(shape)
        codes = torch.empty(experts, rows * width, dtype=torch.int8, device=device)
        return cls(codes, torch.empty(experts, rows, dtype=dtype, device=device))

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        scales = self.scales.untyped_storage().nbytes()
        return 0 if self.is_mapped else self.codes.untyped_storage().nbytes() + scales

    def put(self, expert: int, row: Tensor) -> None:
        """Round and keep one expert's task vector (n,)."""
        codes, scales = encode(row.view(self.scales.shape[1], -1))
        self.codes[expert].copy_(codes.view(-1))
        self.scales[expert].copy_(scales)

    def fill(self, out: Tensor, start: int, stop: int, base: Tensor) -> None:
        """Decode."""
        _copy_rows(out, self.codes, start, stop)
        width = self.codes.shape[1] // self.scales.shape[1]
        scales = self.scales.to(out.device, non_blocking=True)
        for rows, _, piece in rectangles(start, stop, width, out):
            piece.mul_(scales[:, rows].unsqueeze(2))

    def to(self, device: torch.device, *, pin: bool = False) -> "Int8":
        """Move; a mapped stack that stays on the host stays mapped."""
        if self.is_mapped and device.type == "cpu":
            return self
        return Int8(_moved(self.codes, device, pin), _moved(self.scales, device, pin))


class Mapped(Stack):
    """The experts' own tensors (n,), wherever they lie; the base is subtracted from a tile when it is read."""

    def __init__(self, experts: Sequence[Source]) -> None:
        self.experts = experts

    @property
    def nbytes(self) -> int:
        """Bytes of the factors of low-rank experts; those of the files are the kernel's."""
        return sum(expert.nbytes for expert in self.experts if isinstance(expert, LowRank))

    def fill(self, out: Tensor, start: int, stop: int, base: Tensor) -> None:
        """Subtract the base."""
        piece = base[start:stop]
        for row, expert in zip(out, self.experts, strict=True):
            source = expert if isinstance(expert, LowRank) else _sent(expert[start:stop], out.device)
            write_task_vector(row, source, piece, start)

    def to(self, device: torch.device, *, pin: bool = False) -> "Mapped":
        """Move the factors of low-rank experts; files stay where they are."""
        return Mapped([e.to(device) if isinstance(e, LowRank) else e for e in self.experts])


class Factored(Stack):
    """Task vectors that stay products of thin matrices."""

    def __init__(self, factors: Factors) -> None:
        self.factors = factors

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return self.factors.nbytes

    def fill(self, out: Tensor, start: int, stop: int, base: Tensor) -> None:
        """Multiply."""
        self.factors.fill(out, start, stop)

    def to(self, device: torch.device, *, pin: bool = False) -> "Factored":
        """Move; factors are small enough to be on the compute device always."""
        return Factored(self.factors.to(device))


def write_task_vector(out: Tensor, expert: Source, base: Tensor, start: int = 0) -> None:
    """Write entries of one expert's task vector.

    Args:
        out: Overwritten, (entries,).
        expert: Its own values of these entries, or the product for the whole parameter.
        base: The base's values of these entries.
        start: The first entry.
    """
    if isinstance(expert, LowRank):
        expert.expand(start, start + len(out), out)
    elif expert.dtype == base.dtype and expert.device == base.device:
        torch.sub(expert, base, out=out)
    else:
        out.copy_(expert).sub_(base)


def encode(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows (..., w) to int8: codes of the same shape and scales (...), so that codes times scales is near."""
    scales = rows.abs().amax(-1) / _LEVELS
    codes = (rows / scales.where(scales > 0, 1).unsqueeze(-1)).round_().to(torch.int8)
    return codes, scales


def takes_int8(shape: Sequence[int]) -> bool:
    """Whether a parameter is kept as int8 where that is asked for: vectors and short rows are not worth it."""
    return len(shape) > 1 and matrix_shape(shape)[1] >= _SHORT


def padded(entries: int) -> int:
    """Round up, so that every row of a stack starts aligned."""
    return -(-entries // ALIGN) * ALIGN


def _is_aligned(data: Tensor) -> bool:
    """Whether all rows start where torch would have them start."""
    step = ALIGN * 4  # bytes
    return data.data_ptr() % step == 0 and (len(data) == 1 or data.stride(0) * data.element_size() % step == 0)


def _copy_rows(out: Tensor, data: Tensor, start: int, stop: int) -> None:
    """Copy entries ``start:stop`` of all rows.

    From the host to an accelerator row by row, and converted there: strided or converting copies would go
    through temporaries that are not page-locked.
    """
    if data.device == out.device:
        out.copy_(data[:, start:stop])
        return
    for row, source in zip(out, data, strict=True):
        row.copy_(source[start:stop].to(out.device, non_blocking=True))


def _sent(data: Tensor, device: torch.device) -> Tensor:
    """Return entries of a mapped file on their way to a GPU, while the next are read; for other devices as they are.

    They go by page-locked memory from torch's cache, which gives it to the next only once the GPU has read it.
    """
    if device.type != "cuda" or data.device.type != "cpu":
        return data
    return _moved(data, data.device, pin=True).to(device, non_blocking=True)


def _moved(data: Tensor, device: torch.device, pin: bool) -> Tensor:
    """Return a tensor on a device; ``pin`` locks its pages where the host lets it."""
    moved = data.to(device)
    if pin and not moved.is_pinned():
        try:
            return moved.pin_memory()
        except RuntimeError:  # more than may be locked; copies are slower then, and right
            return moved
    return moved
