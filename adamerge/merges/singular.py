"""Merges of singular vectors: TSV-Merge, Iso-C, Iso-CTS.

Legend: T experts; D_i task vector of one matrix (m, n) in expert i; r = min(m, n); polar(A) = P Q^T where
A = P S Q^T, the nearest matrix with orthonormal rows or columns.

Only matrices have singular vectors: all other tensors (biases, norms, convolutions), matrices that ``skip`` names by
kind or glob, and matrices with fewer than T rows or columns (TSV-Merge) are averaged, times ``scale``. By default
``skip`` names tables of tokens, whose rows are looked up one by one, heads, and ``text_projection``, as the authors do.
All factorisations are made in ``pool.compute_dtype``; the task vectors of one tensor are in memory at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adamerge.errors import check_globs, check_number
from adamerge.merges import Merged
from adamerge.merges.tensors import average, is_matrix
from adamerge.pool.pool import ExpertPool
from adamerge.transforms.tsv import AVERAGED, singular_vectors


@dataclass(frozen=True)
class _MatrixRule:
    """Merges matrices by their singular vectors, and averages all else."""

    scale: float = 1.0
    skip: Sequence[str] = AVERAGED

    def __post_init__(self) -> None:
        check_number(f"{type(self).__name__}.scale", self.scale, -100, 100)
        check_globs(f"{type(self).__name__}.skip", self.skip)

    def __call__(self, pool: ExpertPool) -> Merged:
        """Yield names and merged parameters."""
        for name in pool.names:
            update = self.merge(pool.task_vectors(name)) if is_matrix(pool, name, self.skip) else None
            yield name, average(pool, name, self.scale) if update is None else pool.base[name] + self.scale * update

    def merge(self, stack: Tensor) -> Tensor | None:
        """Return the merge of task vectors (T, m, n), before the scale, (m, n); None to average them."""
        raise NotImplementedError


@dataclass(frozen=True)
class TSVMerge(_MatrixRule):
    r"""Keep each expert's strongest singular directions and make them orthogonal across experts.

    Per matrix: the top q = int(r / T) singular triplets of every :math:`D_i`, side by side as U, S, V;
    :math:`\theta = \theta_0 + \alpha\, \mathrm{polar}(U)\, S\, \mathrm{polar}(V)^T`. Where a task vector has a rank
    below q (LoRA), only that many are taken, as the rest are arbitrary. What is averaged: see the module.

    Cost: T + 2 singular value decompositions per matrix.

    Args:
        scale: Alpha; 1 needs no tuning, the authors search 0.1 to 3 on labelled data.
        skip: Matrices to average instead: kinds (see :mod:`adamerge.transforms.kinds`), or globs of names.

    Reference:
        Gargiulo et al., Task Singular Vectors, arXiv:2412.00081.
    """

    def merge(self, stack: Tensor) -> Tensor | None:
        """Return the sum of the decorrelated leading triplets."""
        return merge_singular_vectors(stack) if min(stack.shape[1:]) >= len(stack) else None


@dataclass(frozen=True)
class IsoC(_MatrixRule):
    r"""Give the summed task vectors one singular value: their mean.

    Per matrix: :math:`\sum_i D_i = U S V^T`, :math:`\theta = \theta_0 + \alpha\, \bar s\, U V^T`. Directions that the
    sum lacks stay out (this package's choice: they would be arbitrary), so that rows which no expert changed stay too.
    What is averaged: see the module. Cost: one singular value decomposition per matrix.

    Args:
        scale: Alpha. The authors' values, found on labelled validation data for CLIP ViT-B/32 with 8, 14, 20 tasks:
            1.3, 1.0, 0.9; for ViT-L/14 1.5, 1.3, 1.0.
        skip: Matrices to average instead: kinds (see :mod:`adamerge.transforms.kinds`), or globs of names.

    Reference:
        Marczak et al., No Task Left Behind, arXiv:2502.04959.
    """

    def merge(self, stack: Tensor) -> Tensor:
        """Return the sum with one singular value."""
        left, values, right = singular_vectors(stack.sum(0))
        flat: Tensor = values.mean() * (left @ right.T)
        return flat if len(values) else stack[0]


@dataclass(frozen=True)
class IsoCTS(_MatrixRule):
    r"""Iso-C in a common space and each expert's own directions beside it.

    Per matrix: the top c singular triplets of :math:`\sum_i D_i`; from each :math:`D_i - U_c U_c^T D_i` its top q; then
    :math:`\theta = \theta_0 + \alpha\, \bar s\, \mathrm{polar}([U_1..U_T, U_c])\, \mathrm{polar}([V_1..V_T, V_c])^T`
    with the mean of all kept singular values. c starts as int(common r), and gives or takes what makes T q = r - c
    whole. What is averaged: see the module.

    Cost: T + 3 singular value decompositions per matrix.

    Args:
        scale: Alpha. The authors' values, found on labelled validation data for CLIP ViT-B/32 with 8, 14, 20 tasks:
            1.5, 1.2, 1.1; for ViT-L/14 1.9, 1.5, 1.2.
        common: Share of the directions that is common, in [0, 1].
        skip: Matrices to average instead: kinds (see :mod:`adamerge.transforms.kinds`), or globs of names.

    Reference:
        Marczak et al., No Task Left Behind, arXiv:2502.04959.
    """

    common: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("IsoCTS.common", self.common, 0, 1)

    def merge(self, stack: Tensor) -> Tensor:
        """Return the common and the experts' own directions with one singular value."""
        return flatten_common_and_own(stack, self.common)


def merge_singular_vectors(stack: Tensor) -> Tensor:
    """Return TSV-Merge of task vectors (T, m, n), before the scale, (m, n)."""
    count = min(stack.shape[1:]) // len(stack)
    left, values, right = zip(*(singular_vectors(matrix, count) for matrix in stack), strict=True)
    return (polar(torch.cat(left, 1)) * torch.cat(values)) @ polar(torch.cat(right, 1)).T


def flatten_common_and_own(stack: Tensor, common: float) -> Tensor:
    """Return Iso-CTS of task vectors (T, m, n), before the scale, (m, n)."""
    experts, rank = len(stack), min(stack.shape[1:])
    shared = int(common * rank)
    share = min(round((rank - shared) / experts), rank // experts)  # of each expert
    shared = rank - share * experts
    left, values, right = singular_vectors(stack.sum(0), shared)
    parts = [singular_vectors(matrix - left @ (left.T @ matrix), share) for matrix in stack]
    parts.append((left, values, right))
    lefts, values_of, rights = zip(*parts, strict=True)
    return torch.cat(values_of).mean() * polar(torch.cat(lefts, 1)) @ polar(torch.cat(rights, 1)).T


def polar(matrix: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal rows or columns; directions that the matrix lacks stay out."""
    left, _, right = singular_vectors(matrix)
    return left @ right.T
