"""WUDI: one merged vector per matrix that interferes least with each expert's inputs, found without data.

Legend: E experts; D_i task vector of one matrix (m, n) in expert i; M the merged one.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adamerge.errors import check_choice, check_globs, check_number
from adamerge.merges import Merged
from adamerge.merges.tensors import average, is_matrix, task_vector
from adamerge.pool.pool import ExpertPool

_STEP = 0.04  # of the task vectors' root mean square, per step of Adam
_EPSILON = 1e-8  # of the same


@dataclass(frozen=True)
class WUDI:
    r"""Minimize the interference of the merge with every expert, matrix by matrix, and stop early.

    :math:`\min_M \sum_i \|(M - D_i) D_i^T\|_F^2 / \|D_i\|_F^2` from :math:`M = \sum_i D_i` with Adam; the rows of a
    task vector stand in for the inputs it was trained on. :math:`\theta = \theta_0 + M`, without a scale. The minimum
    itself is not wanted: published accuracies fall again after about 500 steps, so ``lr`` times ``steps``, the
    distance that an entry can move, is what regularises. Deterministic.

    Tensors that are no matrices, and matrices that ``skip`` names, are ``rest``: embeddings and projections are not
    applied as Linear layers are.

    Cost per matrix: E products m n^2 at the start, then one per step, whatever the number of experts.

    Args:
        steps: Steps of Adam; 300 in the authors' script.
        lr: Learning rate of Adam; 1e-5 in the authors' script, for CLIP. None takes 0.04 times the root mean
            square of the matrix's task vectors, this package's own choice, so that the merge scales with them.
        rest: ``base``: all else keeps the base's values, as in the authors' script; ``average``: it is averaged.
        skip: Matrices that are not optimized: kinds (see :mod:`adamerge.transforms.kinds`), or globs of names.

    Reference:
        Cheng et al., WUDI-Merging, arXiv:2503.08099.
    """

    steps: int = 300
    lr: float | None = None
    rest: Literal["base", "average"] = "base"
    skip: Sequence[str] = ("embedding", "position", "head", "projection")

    def __post_init__(self) -> None:
        check_number("WUDI.steps", self.steps, 0, whole=True)
        if self.lr is not None:
            check_number("WUDI.lr", self.lr, 0, 1, above=True)
        check_choice("WUDI.rest", self.rest, ("base", "average"))
        check_globs("WUDI.skip", self.skip)

    def __call__(self, pool: ExpertPool) -> Merged:
        """Yield names and merged parameters."""
        for name in pool.names:
            if is_matrix(pool, name, self.skip):
                yield name, pool.base[name] + self._minimize(pool, name)
            else:
                yield name, average(pool, name) if self.rest == "average" else pool.base[name]

    def _minimize(self, pool: ExpertPool, name: str) -> Tensor:
        experts = range(len(pool.expert_names))
        start, curvature, pull = quadratic(task_vector(pool, name, row) for row in experts)
        if len(experts) == 1:
            return start  # the minimum; Adam would only magnify rounding errors
        lr, epsilon = self.lr, 1e-8
        if lr is None:
            squares = sum(tile.double().square().sum().item() for _, tile in pool.pieces(name))
            typical = math.sqrt(squares / (start.numel() * len(experts)))
            lr, epsilon = _STEP * typical, _EPSILON * typical
        merged = start.requires_grad_()
        optimizer = torch.optim.Adam([merged], lr=lr, eps=epsilon)
        for _ in range(self.steps):
            merged.grad = 2 * torch.addmm(pull, merged.detach(), curvature, beta=-1)
            optimizer.step()
        return merged.detach()


def quadratic(task_vectors: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Write the objective as a quadratic form of M: its gradient is 2 (M C - D).

    Args:
        task_vectors: E matrices (m, n), read one at a time.

    Returns:
        Their sum (m, n), C = sum_i D_i^T D_i / |D_i|^2 (n, n) and D = sum_i D_i D_i^T D_i / |D_i|^2 (m, n).
    """
    total = curvature = pull = torch.zeros(())
    for matrix in task_vectors:
        squares = matrix.square().sum()
        gram = matrix.T @ matrix / squares if squares > 0 else matrix.new_zeros(matrix.shape[1], matrix.shape[1])
        total, curvature, pull = total + matrix, curvature + gram, pull + matrix @ gram
    return total, curvature, pull
