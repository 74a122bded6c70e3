"""TSV: the leading singular vectors of each expert's matrices, decorrelated across experts.

Legend: E experts, (m, n) the shape of a matrix, r = min(m, n), q singular triplets per expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adamerge.errors import check_globs
from adamerge.transforms.kinds import is_skipped

AVERAGED = ("embedding", "head", "*text_projection*")  # by rules of singular vectors


@dataclass(frozen=True)
class Tsv:
    r"""Compress every matrix to its share of the rank, and whiten the experts' singular vectors against each other.

    With the top q = int(r / E) triplets of each expert, U = [U_1 .. U_E] and polar(A) = P Q^T for A = P S Q^T:
    :math:`\tau'_e = \mathrm{polar}(U)_e\, S_e\, \mathrm{polar}(V)_e^T`. With coefficient 1 for all, their sum is
    TSV-Merge. Tensors that are not matrices, matrices with r < E, and those named in ``average`` become tau_e / E:
    there the method averages, so coefficient 1 gives it too. An expert of lower rank (LoRA) gets as many triplets as
    it has.
    Cost: E + 2 SVDs per matrix, by far the slowest transform here.

    Args:
        average: Matrices that are averaged: kinds (see :mod:`adamerge.transforms.kinds`), or globs of names. Rows of an
            embedding are looked up one by one, so directions of the table mean little; the authors leave out
            ``*text_projection*``.

    Reference:
        Gargiulo et al., Task Singular Vectors, arXiv:2412.00081.
    """

    average: Sequence[str] = AVERAGED

    def __post_init__(self) -> None:
        check_globs("transform.average", self.average)

    def __call__(self, name: str, task_vectors: Tensor) -> Tensor:
        """Return the decorrelated task vectors."""
        experts = len(task_vectors)
        is_matrix = task_vectors.ndim == 3 and min(task_vectors.shape[1:]) >= experts
        if not is_matrix or is_skipped(name, task_vectors.shape[1:], self.average):
            return task_vectors / experts
        share = min(task_vectors.shape[1:]) // experts
        left, values, right = zip(*(singular_vectors(matrix, share) for matrix in task_vectors), strict=True)
        counts = [len(sizes) for sizes in values]
        if not sum(counts):
            return task_vectors
        lefts = _polar(torch.cat(left, 1)).split(counts, 1)
        rights = _polar(torch.cat(right, 1)).split(counts, 1)
        return torch.stack([u * s @ v.T for u, s, v in zip(lefts, values, rights, strict=True)])


def singular_vectors(matrix: Tensor, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m, k), S (k,), V (n, k) of a matrix: its leading singular triplets.

    Args:
        matrix: Shape (m, n).
        count: Largest k; default the rank, as triplets of singular value 0 are arbitrary.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    noise = values[:1] * max(matrix.shape) * torch.finfo(values.dtype).eps
    rank = int((values > noise).sum())
    k = rank if count is None else min(rank, count)
    return left[:, :k], values[:k], right[:k].T


def _polar(matrix: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal columns."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = u @ vh
    return nearest
