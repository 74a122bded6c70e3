"""DOGE: one change shared by all task vectors that lowers their conflicts, kept off their common subspace.

Legend: E experts; D_i task vector of one matrix (m, n) in expert i; Delta the shared change (m, n).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adamerge.errors import check_choice, check_globs, check_number
from adamerge.merges import Merged
from adamerge.merges.tensors import average, is_matrix
from adamerge.pool.pool import ExpertPool
from adamerge.transforms.ties import trim_threshold
from adamerge.transforms.tsv import singular_vectors


@dataclass(frozen=True)
class DOGE:
    r"""Task arithmetic with scales from norms, a learned shared change, and a mask of the largest entries.

    Per matrix, with :math:`\lambda_i = \eta / \|D_i\|_F`: minimize over :math:`\Delta`, from 0 with Adam,
    :math:`\sum_j \sum_{rows} \langle D_j, D_j - \sum_i \lambda_i D_i - (\sum_i \lambda_i) \Delta \rangle^2`, with the
    gradient projected off the leading directions that the experts share: the top r / E left singular vectors of every
    :math:`D_i`, side by side, of which the first r / ``subspace`` left singular vectors. Then
    :math:`\theta = \theta_0 + \sum_i \lambda_i (D_i + \Delta) \odot M_i`, :math:`M_i` the largest entries of expert i
    over all these matrices (int(density d) + 1 of them). Deterministic. (Adam's scaling by element leaves the
    orthogonal complement a little, although the gradient lies in it; that is the published algorithm.)

    Tensors that are no matrices, and matrices that ``skip`` names, are ``rest``. Cost per matrix: E + 1 singular
    value decompositions, then 2 E m n + 2 m^2 n / ``subspace`` per step; the task vectors of one matrix in memory.

    Args:
        scale: Eta.
        density: Share of each expert's entries that stays, in (0, 1].
        subspace: The shared directions are r / ``subspace``.
        steps: Steps of Adam.
        lr: Learning rate of Adam.
        rest: ``base``: all else keeps the base's values, as in the released code; ``average``: it is averaged.
        skip: Matrices that are not merged so: kinds (see :mod:`adamerge.transforms.kinds`), or globs of names.

    Reference:
        Wei et al., Adaptive projective gradient descent, arXiv:2501.01230.
    """

    scale: float = 0.07
    density: float = 0.3
    subspace: int = 6
    steps: int = 400
    lr: float = 1e-4
    rest: Literal["base", "average"] = "base"
    skip: Sequence[str] = ("embedding", "position", "head", "projection")

    def __post_init__(self) -> None:
        check_number("DOGE.scale", self.scale, 0, 100)
        check_number("DOGE.density", self.density, 0, 1, above=True)
        check_number("DOGE.subspace", self.subspace, 1, whole=True)
        check_number("DOGE.steps", self.steps, 0, whole=True)
        check_number("DOGE.lr", self.lr, 0, 1, above=True)
        check_choice("DOGE.rest", self.rest, ("base", "average"))
        check_globs("DOGE.skip", self.skip)

    def __call__(self, pool: ExpertPool) -> Merged:
        """Yield names and merged parameters."""
        matrices = [name for name in pool.names if is_matrix(pool, name, self.skip)]

        def pieces() -> Iterator[Tensor]:
            return (tile for name in matrices for _, tile in pool.pieces(name))

        size = sum(pool.base[name].numel() for name in matrices)
        limits = trim_threshold(pieces, self.density, size) if matrices else None
        for name in pool.names:
            if name in matrices:
                yield name, pool.base[name] + self._merge(pool.task_vectors(name), limits)
            else:
                yield name, average(pool, name) if self.rest == "average" else pool.base[name]

    def _merge(self, stack: Tensor, limits: Tensor | None) -> Tensor:
        """Return the merged task vector (m, n) of task vectors (E, m, n)."""
        norms = stack.flatten(1).norm(dim=1)
        scales = torch.where(norms > 0, self.scale / norms, 0)  # (E,)
        change = self._learn(stack, scales)
        kept = stack.abs() >= (0 if limits is None else limits[:, None, None])
        return torch.einsum("e,emn->mn", scales, (stack + change) * kept)

    def _learn(self, stack: Tensor, scales: Tensor) -> Tensor:
        """Return Delta (m, n)."""
        shared = shared_directions(stack, self.subspace)
        total = scales.sum()
        gap = stack - torch.einsum("e,emn->mn", scales, stack)
        conflict = (stack * gap).sum(2).T.unsqueeze(2)  # (m, E, 1): each row's inner products at Delta = 0
        rows = stack.transpose(0, 1).contiguous()  # (m, E, n)
        change = torch.zeros_like(stack[0]).requires_grad_()
        optimizer = torch.optim.Adam([change], lr=self.lr)
        for _ in range(self.steps):
            products = conflict - total * torch.bmm(rows, change.detach().unsqueeze(2))
            gradient = -2 * total * torch.bmm(products.transpose(1, 2), rows).squeeze(1)
            change.grad = gradient - shared @ (shared.T @ gradient)
            optimizer.step()
        return change.detach()


def shared_directions(stack: Tensor, subspace: int) -> Tensor:
    """Return the leading left directions that task vectors (E, m, n) share, orthonormal (m, int(r / subspace))."""
    rank = min(stack.shape[1:])
    tops = [singular_vectors(matrix)[0][:, : rank // len(stack)] for matrix in stack]
    return singular_vectors(torch.cat(tops, 1))[0][:, : rank // subspace]
