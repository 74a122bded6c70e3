"""Task vectors as products of two thin matrices, which is how LoRA experts come.

Legend: E experts; a parameter (*S) is seen as a matrix (d, w) of d = S[0] rows; r is an expert's rank, R the
sum of all.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from adamerge.pool.tiles import CACHED, tiles

_BY_BACKEND = "by backend"


@dataclass(frozen=True)
class LowRank:
    """One expert's task vector of one parameter: ``up`` (d, r) times ``down`` (r, w). Rank 0 is no change."""

    up: Tensor
    down: Tensor

    @classmethod
    def zero(cls, shape: Sequence[int], dtype: torch.dtype) -> "LowRank":
        """Return the task vector of an expert that left a parameter of this shape alone."""
        rows, width = matrix_shape(shape)
        return cls(torch.zeros(rows, 0, dtype=dtype), torch.zeros(0, width, dtype=dtype))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.up.nbytes + self.down.nbytes

    @property
    def squared_norm(self) -> float:
        """Squared Frobenius norm of the product, by the Gram matrices of the factors."""
        return float(((self.up.t() @ self.up) * (self.down @ self.down.t())).sum())

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> "LowRank":
        """Return the same on a device, or in a dtype."""
        return LowRank(self.up.to(device=device, dtype=dtype), self.down.to(device=device, dtype=dtype))

    def expand(self, start: int, stop: int, out: Tensor) -> Tensor:
        """Write entries ``start:stop`` of the flattened product into ``out`` (stop - start,).

        Elementwise, one rank after the other: an entry has the same bits in whatever tile it is computed.
        """
        for first, last in tiles(range(start, stop), CACHED):
            for rows, columns, piece in rectangles(first, last, self.down.shape[1], out[first - start : last - start]):
                piece.zero_()
                product = torch.empty_like(piece)
                for i in range(self.up.shape[1]):
                    torch.mul(self.up[rows, i].unsqueeze(1), self.down[i, columns], out=product)
                    piece.add_(product)
        return out


class Factors:
    """The task vectors of one parameter of E low-rank experts, their factors side by side.

    Args:
        experts: One product per expert, of one shape, dtype and device.

    Attributes:
        up: (d, R).
        down: (R, w).
        owner: The expert of each rank, (R,).
        position: The place of each rank among its expert's, (R,).
        members: One-hot rows of ``owner``, (R, E).
    """

    def __init__(self, experts: Sequence[LowRank]) -> None:
        self.ranks = [expert.up.shape[1] for expert in experts]
        self.up = torch.cat([expert.up for expert in experts], dim=1)
        self.down = torch.cat([expert.down for expert in experts])
        owners = [e for e, rank in enumerate(self.ranks) for _ in range(rank)]
        self.owner = torch.tensor(owners, dtype=torch.long, device=self.up.device)
        self.position = torch.cat([torch.arange(rank) for rank in self.ranks]).to(self.up.device)
        self.members = torch.zeros(len(owners), len(experts), dtype=self.up.dtype, device=self.up.device)
        self.members[torch.arange(len(owners)), self.owner] = 1

    @property
    def experts(self) -> list[LowRank]:
        """The products again, one per expert; views."""
        ups, downs = self.up.split(self.ranks, dim=1), self.down.split(self.ranks)
        return [LowRank(up, down) for up, down in zip(ups, downs, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in (self.up, self.down, self.owner, self.position, self.members))

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Factors":
        """Return the same on a device, or in a dtype."""
        return Factors([expert.to(device, dtype) for expert in self.experts])

    def rows(self, start: int, stop: int) -> "Factors":
        """Return the same for some rows of the parameter."""
        return Factors([LowRank(expert.up[start:stop], expert.down) for expert in self.experts])

    def fill(self, out: Tensor, start: int, stop: int) -> None:
        """Write entries ``start:stop`` of every task vector into ``out`` (E, stop - start), by matrix products."""
        with exact_products():
            for row, expert in zip(out, self.experts, strict=True):
                for rows, columns, piece in rectangles(start, stop, self.down.shape[1], row):
                    torch.mm(expert.up[rows], expert.down[:, columns], out=piece)


def directions(change: Tensor | LowRank, count: int) -> LowRank:
    """Return the leading directions of a change's singular value decomposition, the strongest first, in float64.

    A product is decomposed by QR of its factors, so that the result does not depend on how it was factored. A matrix
    is projected onto the eigenvectors of its smaller Gram matrix, so that all directions together give it to rounding.
    Both run on one thread: the number of threads would show in the last bits.

    Args:
        change: A matrix (d, w), or a product.
        count: Most directions.
    """
    with use_threads(1), exact_products():
        if isinstance(change, LowRank):
            (left, small), (right, other) = (torch.linalg.qr(f.cpu().double()) for f in (change.up, change.down.t()))
            u, sizes, v = torch.linalg.svd(small @ other.t(), full_matrices=False)
            root = sizes[:count].sqrt()
            return LowRank(left @ (u[:, :count] * root), (root.unsqueeze(1) * v[:count]) @ right.t())
        matrix = change.cpu().double()
        is_tall = matrix.shape[0] > matrix.shape[1]
        gram = matrix.t() @ matrix if is_tall else matrix @ matrix.t()
        vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :count]  # eigenvalues ascend
        return LowRank(matrix @ vectors, vectors.t()) if is_tall else LowRank(vectors, vectors.t() @ matrix)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return (d, w), the rows and row length of a parameter (*S) seen as a matrix."""
    return (shape[0] if shape else 1), math.prod(shape[1:])


def rectangles(start: int, stop: int, width: int, run: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Cut a run of a flattened matrix, at most into a part of a row, whole rows, and a part of a row.

    Args:
        start: First entry.
        stop: End, exclusive.
        width: Length of the matrix' rows.
        run: The run's values, (..., stop - start).

    Yields:
        Rows, columns, and the view (..., rows, columns) of ``run``.
    """
    at = start
    while at < stop:
        row, column = divmod(at, width)
        count = (stop - at) // width if column == 0 else 0
        columns = slice(0, width) if count else slice(column, min(width, column + stop - at))
        size = (count or 1) * (columns.stop - columns.start)
        piece = run[..., at - start : at - start + size]
        yield slice(row, row + (count or 1)), columns, piece.unflatten(-1, (count or 1, -1))
        at += size


def matmul_precision() -> str:
    """Return torch's precision of matrix products; it cannot say where the switches of single backends were used."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return _BY_BACKEND


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply matrices in full precision, whatever ``torch.set_float32_matmul_precision`` says."""
    before = matmul_precision()
    if before in ("highest", _BY_BACKEND):
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
