"""Exact order statistics of whole task vectors, by streaming.

Legend: E experts, d values of each, k of them in a tile.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from adamerge.errors import InputError
from adamerge.transforms.protocol import Source

_PIECE = 1 << 17  # entries of a tile that stays in a second-level cache
_DIGIT = 11  # bits of a float's pattern that one pass decides


def kth_smallest(tiles: Callable[[], Iterable[Tensor]], rank: int | Sequence[int]) -> Tensor:
    """Return the ``rank``-th smallest of each expert's d values, exactly: a radix selection over float bit patterns.

    Memory: a histogram of 2,048 counts per expert, and a tile, whatever d is. Three passes for float32, six for
    float64; work O(E d) in each.

    Args:
        tiles: Called once for each pass; gives all values as tiles (E, k), float32 or float64, without NaN. A tile may
            be overwritten once the next is asked for.
        rank: From 1 (the minimum) to d; one for all experts, or one for each.

    Returns:
        Shape (E,), dtype and device of the tiles.

    Raises:
        InputError: If there is nothing to select from, or a rank lies outside.

    >>> kth_smallest(lambda: [torch.tensor([[3.0, -1.0]]), torch.tensor([[2.0]])], rank=2)
    tensor([2.])
    """
    first = next(iter(tiles()), None)
    if first is None:
        raise InputError("kth_smallest: expected at least one tile, found none.")
    ranks = [rank] * len(first) if isinstance(rank, int) else list(rank)
    kind = torch.int64 if first.dtype == torch.float64 else torch.int32
    bits = above = torch.iinfo(kind).bits
    prefix = torch.zeros(len(first), dtype=torch.int64)
    remaining = torch.tensor(ranks, dtype=torch.int64)
    while above:
        shift = max(above - _DIGIT, 0)
        counts = torch.zeros(len(first), 1 << (above - shift), dtype=torch.int64)
        for tile in tiles():
            for row, values in enumerate(tile):
                keys = _ordered(values, kind)
                if above < bits:
                    keys = keys[(keys >> above) & ((1 << (bits - above)) - 1) == prefix[row]]
                digits = (keys >> shift) & (counts.shape[1] - 1)
                counts[row] += torch.bincount(digits, minlength=counts.shape[1]).cpu()
        if above == bits:
            _check_ranks(ranks, counts.sum(1).tolist())
        reached = counts.cumsum(1)
        digit = (reached < remaining.unsqueeze(1)).sum(1, keepdim=True)
        remaining -= (reached - counts).gather(1, digit).squeeze(1)
        prefix = (prefix << (above - shift)) | digit.squeeze(1)
        above = shift
    keys = (prefix + torch.iinfo(kind).min).to(kind)  # undo the flip of the sign bit; int64 wraps around
    return _magnitudes_reversed(keys).view(first.dtype).to(first.device)


def keep_largest(values: Tensor, count: int) -> None:
    """Zero all but the ``count`` largest magnitudes of (n,), in place; of equal ones the first stay.

    Memory: one copy of the values.
    """
    magnitudes, least = values.abs(), len(values) - count
    if magnitudes.dtype == torch.bfloat16:
        magnitudes = magnitudes.float()  # numpy has no bfloat16; the order is the same
    if least <= 0:
        return
    if magnitudes.device.type == "cpu":  # numpy selects five times faster than torch
        (sorted_there := magnitudes.numpy()).partition(least)
        threshold = float(sorted_there[least])
    else:
        threshold = float(magnitudes.kthvalue(least + 1).values)
    del magnitudes
    excess = -count
    for piece in values.split(_PIECE):
        is_small = piece.abs() < threshold
        excess += len(piece) - int(is_small.sum())
        piece.masked_fill_(is_small, 0)
    if excess and threshold:
        equal = torch.cat([(p.abs() == threshold).nonzero().view(-1) + i * _PIECE
                           for i, p in enumerate(values.split(_PIECE))])  # fmt: skip
        values[equal[-excess:]] = 0


def kth_magnitude(source: Source, rank: int) -> Tensor:
    """Return the ``rank``-th smallest magnitude of each expert's whole task vector, (E,)."""
    return kth_smallest(lambda: (tile.abs() for _, tile in source.tiles()), rank)


def _check_ranks(ranks: Sequence[int], sizes: Sequence[int]) -> None:
    if len(ranks) != len(sizes) or any(not 1 <= rank <= size for rank, size in zip(ranks, sizes, strict=True)):
        raise InputError(f"kth_smallest: expected a rank from 1 to the size of each of {sizes}, found {list(ranks)}.")


def _ordered(values: Tensor, kind: torch.dtype) -> Tensor:
    """Return integers whose unsigned order is the order of the values (-0.0 comes before 0.0)."""
    return _magnitudes_reversed(values.contiguous().view(kind)) ^ torch.iinfo(kind).min


def _magnitudes_reversed(patterns: Tensor) -> Tensor:
    """Flip the magnitude bits of negative patterns, so that they order as signed integers; its own inverse."""
    info = torch.iinfo(patterns.dtype)
    return patterns ^ ((patterns >> (info.bits - 1)) & info.max)
