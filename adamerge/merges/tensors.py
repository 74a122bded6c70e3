"""Sums and single task vectors of a pool, which several rules take.

Legend: E experts, ``*S`` the shape of one parameter.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from adamerge.pool.pool import ExpertPool
from adamerge.transforms.kinds import is_skipped


def task_vector(pool: ExpertPool, name: str, row: int) -> Tensor:
    """Return one expert's task vector of a parameter, (*S), without holding those of the others."""
    result = torch.empty_like(pool.base[name])
    flat = result.view(-1)
    for where, tile in pool.pieces(name):
        flat[where] = tile[row]
    return result


def weighted(pool: ExpertPool, name: str, weights: Sequence[float]) -> Tensor:
    """Return base + sum_e weights[e] tau[e] of a parameter, (*S).

    Summed elementwise in float64, so that the bytes do not depend on storage or threads.
    """
    result = torch.empty_like(pool.base[name])
    flat, base = result.view(-1), pool.base[name].view(-1)
    for where, tile in pool.pieces(name):
        total = base[where].to(torch.float64, copy=True)
        product = torch.empty(tile.shape[1], dtype=torch.float64, device=tile.device)
        for vector, weight in zip(tile, weights, strict=True):
            total += product.copy_(vector).mul_(weight)
        flat[where] = total
    return result


def average(pool: ExpertPool, name: str, scale: float = 1.0) -> Tensor:
    """Return base + scale / E * sum_e tau[e] of a parameter, (*S)."""
    experts = len(pool.expert_names)
    return weighted(pool, name, [scale / experts] * experts)


def is_matrix(pool: ExpertPool, name: str, skip: Sequence[str]) -> bool:
    """Whether a parameter has two dimensions and ``skip`` has neither its kind nor a glob of its name."""
    return len(pool.shapes[name]) == 2 and not is_skipped(name, pool.shapes[name], skip)
