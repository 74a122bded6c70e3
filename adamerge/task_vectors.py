"""Where task vectors live: in memory, or formed tile by tile from mapped experts.

Legend: E experts, n entries of a flattened parameter.
"""

import os
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from adamerge.errors import InputError
from adamerge.transforms import Prepared

Storage = Literal["auto", "ram", "stream"]
_ALIGN = 16  # entries; 64 bytes of float32, what torch aligns tensors to
_RAM_SHARE = 0.5  # of the free memory that task vectors may take before `auto` streams them


class TaskVectors:
    """Task vectors of E experts by parameter, read as tiles (E, entries).

    Args:
        experts: E.
        storage: ``ram`` keeps stacks (E, n); ``stream`` keeps the experts' own (mapped) tensors, and subtracts the
            base from a tile when it is read. In float32 both give the same bits.
        dtype: Of stacks in memory.
        compute_dtype: Of tiles.
    """

    def __init__(
        self, experts: int, storage: Literal["ram", "stream"], dtype: torch.dtype, compute_dtype: torch.dtype
    ) -> None:
        self._experts = experts
        self._storage = storage
        self._dtype = dtype
        self._compute_dtype = compute_dtype
        self._device = torch.device("cpu")
        self._stacks: dict[str, Tensor] = {}
        self._mapped: dict[str, list[Tensor]] = {}
        self._scratch: Tensor | None = None

    def add(self, name: str, experts: Iterable[Tensor], base: Tensor, transform: Prepared | None = None) -> None:
        """Form, or map, one parameter's task vectors.

        Args:
            name: The parameter.
            experts: Its value in each expert, (*S), read one at a time.
            base: Its value in the base, (*S) in ``compute_dtype``.
            transform: Applied to the stack, unless it is zero; NaN and infinity are left for the caller to find.
        """
        if self._storage == "stream":
            self._mapped[name] = [expert.contiguous().view(-1) for expert in experts]
            return
        flat = base.reshape(-1)
        stack = torch.empty(self._experts, _padded(len(flat)), dtype=self._compute_dtype)[:, : len(flat)]
        for row, expert in zip(stack, experts, strict=True):
            row.copy_(expert.to(self._compute_dtype).reshape(-1)).sub_(flat)
        if transform is not None and stack.any() and torch.isfinite(stack).all():
            whole = stack.view(self._experts, *base.shape)
            whole.copy_(transform(name, whole))
        self._stacks[name] = stack.to(self._dtype)

    def drop(self, name: str) -> None:
        """Forget a parameter that no expert changed."""
        self._stacks.pop(name, None)
        self._mapped.pop(name, None)

    def tile(self, name: str, start: int, stop: int, base: Tensor, reuse: bool) -> Tensor:
        """Return entries ``start:stop``, (E, stop - start) in ``compute_dtype``.

        Args:
            name: The parameter.
            start: First entry.
            stop: End, exclusive.
            base: The parameter in the base, flattened (n,), for streamed experts.
            reuse: Whether the result may be overwritten by the next call.
        """
        if self._storage == "ram" and self._dtype == self._compute_dtype:
            return self._stacks[name][:, start:stop]
        tile = self._buffer(start, stop, reuse)
        if self._storage == "ram":
            return tile.copy_(self._stacks[name][:, start:stop])
        piece = base[start:stop]
        for row, expert in zip(tile, self._mapped[name], strict=True):
            entries = expert[start:stop]
            if entries.dtype == piece.dtype and entries.device == piece.device:
                torch.sub(entries, piece, out=row)
            else:
                row.copy_(entries).sub_(piece)
        return tile

    def to(self, device: torch.device) -> None:
        """Move stacks to a device, in place; mapped experts stay, and their tiles are copied there."""
        self._device = device
        self._scratch = None
        self._stacks = {name: stack.to(device) for name, stack in self._stacks.items()}

    def _buffer(self, start: int, stop: int, reuse: bool) -> Tensor:
        """Return memory for a tile (E, stop - start), aligned as the tile is in a stored stack.

        BLAS takes another path, with another rounding, for rows that are aligned differently.
        """
        offset = start % _ALIGN
        width = _padded(offset + stop - start)
        needed = self._experts * width
        scratch = self._scratch if reuse else None
        if scratch is None or scratch.numel() < needed:
            scratch = torch.empty(needed, dtype=self._compute_dtype, device=self._device)
            self._scratch = scratch if reuse else self._scratch
        return scratch[:needed].view(-1, width)[:, offset : offset + stop - start]


def choose_storage(storage: str, size: int) -> Literal["ram", "stream"]:
    """Return the storage for task vectors of ``size`` bytes; ``auto`` goes by the free memory."""
    check_storage(storage)
    if storage != "auto":
        return "ram" if storage == "ram" else "stream"
    return "ram" if size <= _RAM_SHARE * free_memory() else "stream"


def check_storage(storage: str) -> None:
    """Refuse an unknown storage mode."""
    if storage not in ("auto", "ram", "stream"):
        raise InputError(f"pool.storage: expected 'auto', 'ram' or 'stream', found {storage!r}.")


def free_memory() -> int:
    """Return the bytes of memory that are free or can be freed without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":") for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _padded(entries: int) -> int:
    """Round up, so that every row of a stack starts aligned."""
    return -(-entries // _ALIGN) * _ALIGN
