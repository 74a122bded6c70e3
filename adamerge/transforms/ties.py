"""TIES: trim, and elect a sign; what AdaMerging++ learns coefficients on.

Legend: E experts, d entries of the whole model, k of a tile.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adamerge.errors import check_choice, check_number
from adamerge.transforms.magnitude import Trim
from adamerge.transforms.protocol import Source, TransformFunction, entries, per_expert, total
from adamerge.transforms.selection import kth_smallest

_TILE = 1 << 15  # entries of each expert
Aggregate = Literal["sum", "mean", "max"]


@dataclass(frozen=True)
class Ties:
    r"""Trim each task vector to its largest entries, and keep those of the sign that wins at their position.

    :math:`\tau'_e = \hat\tau_e [\mathrm{sign}\,\hat\tau_e = \mathrm{sign} \sum_j \hat\tau_j]`, with
    :math:`\hat\tau_e = \tau_e [|\tau_e| \ge m_e]`, m_e the ``d - int(density d)``-th smallest magnitude of expert e (so
    one entry more than ``int(density d)`` stays, as in the released codes). Where the sum is 0, the majority of all
    elected signs decides; where that is 0, negative. Nothing is averaged or rescaled: this is AdaMerging++'s input.
    With ``aggregate=mean`` coefficient 1 for all gives TIES-Merging, and a transform behind, such as LiNeS, scales it.

    No tensor is skipped: biases and norms compete with the matrices for the model's threshold. d counts the merged
    parameters that an expert changed; published figures count the unchanged text tower of old checkpoints too.
    Cost: four passes over the task vectors, memory one tile.

    Args:
        density: Share of each task vector that stays, in (0, 1]; the papers' K = 20 %.
        scope: Threshold over the ``model`` (paper, AdaMerging), or per ``tensor`` as mergekit has it: exactly
            ``int(density n)`` entries, at least one, and a zero sum elects positive.
        aggregate: What the experts' entries at a position add up to: their ``sum`` (all stay), their ``mean`` (each is
            divided by how many stay), or their ``max`` (the largest stays; where the sum and the majority are 0, none,
            as in the released code).

    Reference:
        Yadav et al., TIES-Merging, arXiv:2306.01708, steps 1 and 2; AdaMerging (arXiv:2310.02575), released code.
    """

    density: float = 0.2
    scope: Literal["model", "tensor"] = "model"
    aggregate: Aggregate = "sum"

    def __post_init__(self) -> None:
        check_number("transform.density", self.density, 0, 1, above=True)
        check_choice("transform.scope", self.scope, ("model", "tensor"))
        check_choice("transform.aggregate", self.aggregate, ("sum", "mean", "max"))

    @property
    def elementwise(self) -> bool:
        """Whether thresholds are known beforehand."""
        return self.scope == "model"

    def prepare(self, source: Source) -> TransformFunction:
        """Return the rule, after finding thresholds and majority sign where they are the model's."""
        if self.scope == "tensor":
            return self._elected_per_tensor
        threshold = trim_threshold(lambda: (tile for _, tile in source.tiles()), self.density, entries(source))
        signs = sum(int(total(_trimmed(tile, threshold)).sign().sum(dtype=torch.int64)) for _, tile in source.tiles())
        majority = (signs > 0) - (signs < 0)
        return lambda name, task_vectors: self._elected(_trimmed(task_vectors, threshold), majority)

    def _elected_per_tensor(self, name: str, task_vectors: Tensor) -> Tensor:
        """Trim whole tensors, and elect in tiles."""
        flat = Trim(self.density)(name, task_vectors).reshape(len(task_vectors), -1)
        for tile in flat.split(_TILE, dim=1):
            tile.copy_(self._elected(tile, 1))
        return flat.view_as(task_vectors)

    def _elected(self, trimmed: Tensor, majority: int) -> Tensor:
        """Return what agrees with the elected signs, so that it adds up to the aggregate, (E, *S)."""
        kept = elect(trimmed, majority or -1.0)
        if self.aggregate == "mean":
            return kept / (kept != 0).sum(0).clamp(min=1)
        if self.aggregate == "max":
            largest = torch.zeros_like(kept).scatter_(0, kept.abs().argmax(0, keepdim=True), 1.0)
            kept = kept * largest
            return kept if majority else kept.masked_fill(total(trimmed) == 0, 0)
        return kept


def trim_threshold(tiles: Callable[[], Iterable[Tensor]], density: float, size: int) -> Tensor | None:
    """Return the magnitude from which each expert's entries stay, (E,); None where all do.

    Args:
        tiles: Called once for each pass over all entries; gives tiles (E, k).
        density: Share of the entries that stays: ``int(density size) + 1`` of them.
        size: Number of entries of an expert.
    """
    rank = size - int(density * size)
    return kth_smallest(lambda: (tile.abs() for tile in tiles()), rank) if rank else None


def elect(task_vectors: Tensor, majority: float) -> Tensor:
    """Zero the entries that disagree with the sign of the sum over the experts.

    Args:
        task_vectors: Shape (E, *S).
        majority: The sign, 1 or -1, where the sum is zero.
    """
    sign = total(task_vectors).sign()
    sign = torch.where(sign == 0, majority, sign)
    return task_vectors.masked_fill(task_vectors.sign() != sign, 0)


def _trimmed(task_vectors: Tensor, threshold: Tensor | None) -> Tensor:
    if threshold is None:
        return task_vectors
    return task_vectors.masked_fill(task_vectors.abs() < per_expert(threshold, task_vectors), 0)
