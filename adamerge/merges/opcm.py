"""OPCM: experts merged one after the other, each projected off what is merged already.

Legend: D_t task vector of one matrix (m, n) in the t-th expert; P the sum of what is merged; r = min(m, n).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adamerge.errors import check_globs, check_number
from adamerge.merges import Merged
from adamerge.merges.tensors import is_matrix, task_vector
from adamerge.pool.pool import ExpertPool
from adamerge.transforms.tsv import singular_vectors


@dataclass(frozen=True)
class OPCM:
    r"""Merge experts in sequence; each adds only what lies off the directions merged before it.

    Per matrix, starting from :math:`P_1 = D_1`: with the singular value decomposition :math:`P_{t-1} = U S V^T`,
    :math:`D'_t` is :math:`D_t` less its components on :math:`u_i v_i^T` and on the leading s x s directions, where the
    first s singular values sum to at most ``alpha`` of all; :math:`P_t = P_{t-1} + D'_t`. All other tensors add
    :math:`D'_t = D_t`. In the end :math:`\theta = \theta_0 + P_T\, \bar n / \|P_T\|` with :math:`\bar n` the mean norm
    of the experts' task vectors, both over the whole model. (The published running factor lambda_t scales P alone,
    which changes no projection, so it can be applied once.)

    The result depends on the order. Every matrix that ``skip`` does not name is projected, open_clip's
    attention input among them; the published code projects Linear layers only, and leaves raw parameters
    (positional embedding, projection) the first expert's. Cost: T - 1 singular value decompositions per matrix; memory
    of one merged model and one matrix's factors, whatever the number of experts.

    Args:
        alpha: Share of the singular values that the protected leading directions hold, in [0, 1].
        seed: Shuffles the order of the experts; None keeps the pool's.
        skip: Matrices that are added without projection: kinds (see :mod:`adamerge.transforms.kinds`), or globs of
            names.

    Reference:
        Tang et al., Merging models on the fly, arXiv:2501.09522.
    """

    alpha: float = 0.5
    seed: int | None = None
    skip: Sequence[str] = ("embedding", "position", "head")

    def __post_init__(self) -> None:
        check_number("OPCM.alpha", self.alpha, 0, 1)
        check_globs("OPCM.skip", self.skip)

    def __call__(self, pool: ExpertPool) -> Merged:
        """Yield names and merged parameters, once all tensors have been through all experts."""
        order = list(range(len(pool.expert_names)))
        if self.seed is not None:
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(self.seed)).tolist()
        sums = {}
        for name in pool.names:
            project = is_matrix(pool, name, self.skip)
            total = task_vector(pool, name, order[0])
            for row in order[1:]:
                update = task_vector(pool, name, row)
                total += project_off(total, update, self.alpha) if project else update
            sums[name] = total
        norm = math.sqrt(sum(tensor.double().square().sum().item() for tensor in sums.values()))
        scale = _mean_norm(pool) / norm if norm else 0.0
        for name in pool.names:
            yield name, pool.base[name] + scale * sums.pop(name)


def project_off(merged: Tensor, update: Tensor, alpha: float) -> Tensor:
    """Return an update (m, n) less its part on the directions of what is merged, (m, n).

    Outside the first r singular vectors on either side nothing is removed, so the thin factors suffice.
    """
    left, values, right = singular_vectors(merged)
    above = values.cumsum(0) / values.sum() > alpha
    leading = int(above.float().argmax()) if above.any() else 0
    shared = left.T @ update @ right  # (r, r)
    removed = torch.diag(shared.diagonal())
    removed[:leading, :leading] = shared[:leading, :leading]
    remainder: Tensor = update - left @ removed @ right.T
    return remainder


def _mean_norm(pool: ExpertPool) -> float:
    """Mean over the experts of the norm of the whole task vector."""
    squares = torch.zeros(len(pool.expert_names), dtype=torch.float64, device=pool.device)
    for name in pool.names:
        for _, tile in pool.pieces(name):
            squares += tile.double().square().sum(1)
    return squares.sqrt().mean().item()
