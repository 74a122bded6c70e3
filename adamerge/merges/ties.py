"""TIES: trim, elect signs, and merge what agrees.

Legend: E experts, k entries of a tile, d entries of all parameters.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from adamerge.merges import Merged
from adamerge.merges.tensors import check_choice, check_range, tiles
from adamerge.pool import ExpertPool
from adamerge.selection import kth_largest_magnitude

Aggregate = Literal["mean", "sum", "max"]


@dataclass(frozen=True)
class Ties:
    r"""Keep each expert's largest entries, elect a sign per entry, merge those that have it.

    :math:`\theta = \theta_0 + \alpha\, m`. Per expert, entries below the threshold are zeroed. The elected sign is
    that of the sum over experts; where the sum is 0 it is the sign that most entries of the model elect (negative
    if those cancel out too). m is the mean, sum or largest of the kept entries of the elected sign. No tensor is
    skipped.

    Cost: a selection (two passes in float32, four in float64) and two more passes, in constant memory.

    Args:
        density: Share of the entries that stays, in (0, 1].
        scale: Alpha: 1 in the paper, with ``mean``; AdaMerging's baseline has 0.3 with ``sum``.
        aggregate: ``mean``, ``sum`` or ``max``. A good scale for one is wrong for the others.
        scope: ``global``: one threshold over all parameters of an expert, which keeps int(density d) + 1 entries;
            ``tensor``: one per tensor, which keeps int(density n), at least one, and takes a sum of 0 as positive,
            as mergekit does. Entries that tie with the threshold stay too.

    Reference:
        Yadav et al., TIES-Merging, arXiv:2306.01708.
    """

    density: float = 0.2
    scale: float = 1.0
    aggregate: Aggregate = "mean"
    scope: Literal["global", "tensor"] = "global"
    needs_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_range(self, "density", 0, 1, open_low=True)
        check_range(self, "scale", -100, 100)
        check_choice(self, "aggregate", ("mean", "sum", "max"))
        check_choice(self, "scope", ("global", "tensor"))

    def __call__(self, pool: ExpertPool) -> Merged:
        """Yield names and merged parameters."""
        limits, tie = torch.empty(0), 1.0
        if self.scope == "global":
            limits = thresholds(lambda: _all_tiles(pool), self.density, len(pool.expert_names))
            tie = majority(lambda: _all_tiles(pool), limits)
        for name in pool.names:
            if self.scope == "tensor":
                rank = max(1, int(self.density * pool.base[name].numel()))
                ranks = [rank] * len(pool.expert_names)
                limits = kth_largest_magnitude(lambda name=name: (t for _, t in tiles(pool, name)), ranks)  # type: ignore[misc]
            merged = pool.base[name].clone()
            flat = merged.view(-1)
            for where, tile in tiles(pool, name):
                flat[where] += self.scale * elect_and_merge(tile, limits, tie, self.aggregate)
            yield name, merged


def thresholds(tiles: Callable[[], Iterator[Tensor]], density: float, experts: int) -> Tensor:
    """Return the magnitude from which each expert's entries stay, (E,): the (int(density d) + 1)-th largest."""
    size = sum(tile.shape[1] for tile in tiles())
    return kth_largest_magnitude(tiles, [min(int(density * size) + 1, size)] * experts)


def majority(tiles: Callable[[], Iterator[Tensor]], limits: Tensor) -> float:
    """Return the sign that most entries elect, which stands in where an entry's sum is 0; 0 if they cancel out."""
    balance = sum(int(_trimmed(tile, limits).sum(0).sign().sum()) for tile in tiles())
    return float((balance > 0) - (balance < 0))


def elect_and_merge(task_vectors: Tensor, limits: Tensor, tie: float, aggregate: Aggregate) -> Tensor:
    """Return the merged entries of one piece.

    Args:
        task_vectors: (E, k).
        limits: Magnitude from which an expert's entries stay, (E,).
        tie: Sign where the sum is 0; 0 counts as negative.
        aggregate: ``mean``, ``sum`` or ``max``.

    Returns:
        (k,).
    """
    kept = _trimmed(task_vectors, limits)
    total = kept.sum(0)
    sign = torch.where(total == 0, torch.full_like(total, tie), total.sign())
    agreeing = torch.where(torch.where(sign > 0, kept > 0, kept < 0), kept, 0)
    if aggregate == "max":
        return agreeing.abs().amax(0) * sign
    if aggregate == "mean":
        return agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)
    return agreeing.sum(0)


def _trimmed(task_vectors: Tensor, limits: Tensor) -> Tensor:
    return torch.where(task_vectors.abs() >= limits[:, None], task_vectors, 0)


def _all_tiles(pool: ExpertPool) -> Iterator[Tensor]:
    for name in pool.names:
        for _, tile in tiles(pool, name):
            yield tile
