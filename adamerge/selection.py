"""The k-th largest magnitude of vectors that are only seen tile by tile: exact, in constant memory.

Legend: E vectors (experts), k entries of a tile.

A magnitude's bit pattern, read as an integer, orders as the magnitude itself does. So the pattern is found
digit by digit, 16 bits at a time, from a histogram over the entries that agree in the digits before: two
passes for float32, four for float64, 65,536 counters per vector whatever its length.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from adamerge.errors import InputError

_DIGIT = 16  # bits per pass
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def kth_largest_magnitude(tiles: Callable[[], Iterable[Tensor]], k: Sequence[int]) -> Tensor:
    """Return, of each of E vectors, the magnitude of rank ``k`` from the top, counted with repetitions.

    Args:
        tiles: Gives the vectors anew on each call: pieces (E, entries) that together hold each vector once;
            float32 or float64 without NaN (narrower floats are widened, which is exact). A piece may be
            overwritten once the next is asked for.
        k: Rank for each vector, from 1 (the largest) to the vector's length.

    Returns:
        The magnitudes, (E,), in the dtype and on the device of the tiles.

    Raises:
        InputError: If a rank is outside the vector, or there are not as many ranks as vectors.

    Example:
        >>> kth_largest_magnitude(lambda: [torch.tensor([[1.0, -4.0]]), torch.tensor([[3.0, -2.0]])], [2])
        tensor([3.])
    """
    found: Tensor | None = None  # the digits so far, (E,)
    left: Tensor | None = None  # rank among the entries that agree in them, (E,)
    dtype, bits = torch.float32, 32
    done = 0
    while done < bits:
        counts: Tensor | None = None
        for tile in tiles():
            if counts is None:
                dtype = torch.float64 if tile.dtype == torch.float64 else torch.float32
                bits = 8 * dtype.itemsize
                counts = torch.zeros(len(tile), 1 << _DIGIT, dtype=torch.int64, device=tile.device)
            _count(counts, tile.to(dtype), found, bits - done)
        left, counts = _checked(k, counts, left)
        digit, left = _locate(counts, left)
        found = digit if found is None else (found << _DIGIT) | digit
        done += _DIGIT
    assert found is not None
    return found.to(_INTEGERS[dtype]).view(dtype)


def _count(counts: Tensor, tile: Tensor, found: Tensor | None, unread: int) -> None:
    """Add a tile's next digits to the histograms (E, 65536), of entries that agree with what was ``found``."""
    patterns = tile.abs().view(_INTEGERS[tile.dtype])
    digits = (patterns >> (unread - _DIGIT)) & ((1 << _DIGIT) - 1)
    for row, histogram in enumerate(counts):
        entries = digits[row]
        if found is not None:
            entries = entries[(patterns[row] >> unread) == found[row]]
        histogram += torch.bincount(entries, minlength=1 << _DIGIT)


def _checked(k: Sequence[int], counts: Tensor | None, left: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the ranks left and the histograms, once the ranks are known to lie inside the vectors."""
    if counts is None:
        raise InputError("kth_largest_magnitude: expected at least one tile, found none.")
    if left is not None:
        return left, counts
    sizes = counts.sum(1).tolist()
    if len(k) != len(sizes) or any(not 1 <= rank <= size for rank, size in zip(k, sizes, strict=False)):
        raise InputError(f"kth_largest_magnitude: expected a rank from 1 to the size of each of {sizes}, found {k}.")
    return torch.as_tensor(k, device=counts.device), counts


def _locate(counts: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's digit at rank ``left`` from the top, (E,), and the rank among the entries that share it."""
    above = counts.flip(1).cumsum(1)  # entries with this digit or a larger one
    at = (above < left[:, None]).sum(1)  # digits that are passed over
    passed = torch.where(at > 0, above.gather(1, (at - 1).clamp(min=0)[:, None]).squeeze(1), 0)
    return (1 << _DIGIT) - 1 - at, left - passed
