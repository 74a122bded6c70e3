"""TIES: trim, elect signs, and merge what agrees.

Legend: E experts, k entries of a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adamerge.errors import check_choice, check_number
from adamerge.merges import Merged
from adamerge.pool.pack import own_task_vectors
from adamerge.pool.pool import ExpertPool
from adamerge.pool.tiles import READ, tiles
from adamerge.transforms.protocol import Prepared, total
from adamerge.transforms.ties import Aggregate, Ties


@dataclass(frozen=True)
class TiesMerge:
    r"""Keep each expert's largest entries, elect a sign per entry, merge those that have it.

    :math:`\theta = \theta_0 + \alpha\, m`, m the sum of the task vectors that the transform
    :class:`adamerge.transforms.Ties` leaves: the mean, sum or largest of a position's elected entries. No tensor is
    skipped.

    Cost: five passes in float32, eight in float64, in constant memory; with ``tensor`` one, and one parameter's stack.

    Args:
        density: Share of the entries that stays, in (0, 1].
        scale: Alpha: 1 in the paper, with ``mean``; AdaMerging's baseline has 0.3 with ``sum``.
        aggregate: ``mean``, ``sum`` or ``max``. A good scale for one is wrong for the others.
        scope: Threshold and majority sign of the ``model``, or per ``tensor`` as mergekit has it: see the transform.

    Reference:
        Yadav et al., TIES-Merging, arXiv:2306.01708.
    """

    density: float = 0.2
    scale: float = 1.0
    aggregate: Aggregate = "mean"
    scope: Literal["model", "tensor"] = "model"

    def __post_init__(self) -> None:
        check_number("TiesMerge.density", self.density, 0, 1, above=True)
        check_number("TiesMerge.scale", self.scale, -100, 100)
        check_choice("TiesMerge.aggregate", self.aggregate, ("mean", "sum", "max"))
        check_choice("TiesMerge.scope", self.scope, ("model", "tensor"))

    @property
    def one_pass(self) -> bool:
        """Whether no threshold is the model's."""
        return self.scope == "tensor"

    def __call__(self, pool: ExpertPool) -> Merged:
        """Yield names and merged parameters."""
        elected = Prepared(Ties(self.density, self.scope, self.aggregate), pool)
        for name in pool.names:
            base = pool.base[name]
            merged = torch.empty_like(base)
            for where, tile in _pieces(pool, name, elected):
                merged.view(-1)[where] = base.view(-1)[where] + self.scale * total(tile)
            yield name, merged


def _pieces(pool: ExpertPool, name: str, elected: Prepared) -> Iterator[tuple[slice, Tensor]]:
    """Yield a parameter's transformed task vectors: a slice of its entries, and their values (E, k)."""
    if elected.elementwise:
        for where, tile in pool.pieces(name):
            yield where, elected(name, tile.clone())  # what is stored stays as it is
    else:
        stack = elected(name, own_task_vectors(pool, name)).reshape(len(pool.expert_names), -1)
        for start, stop in tiles(range(stack.shape[1]), READ // len(stack)):
            yield slice(start, stop), stack[:, start:stop]
