"""PCB-Merging: weigh every entry by its importance within its expert and its agreement with the others.

Legend: E experts, d entries of the whole model, k of a tile.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from adamerge.errors import check_choice, check_number
from adamerge.transforms.protocol import Source, TransformFunction, entries, per_expert, total
from adamerge.transforms.selection import kth_magnitude, kth_smallest


@dataclass(frozen=True)
class _Statistics:
    """Bounds of each expert's magnitudes and scores, all (E,)."""

    low: Tensor
    high: Tensor
    cut: Tensor
    top: Tensor


@dataclass(frozen=True)
class Pcb:
    r"""Drop the entries with the lowest score, and weigh the others against the same entries of the other experts.

    :math:`\tau'_e = c_e \beta_e / \sum_j \beta_j`, where c_e is tau_e with magnitudes clamped to their ``clip`` and
    1 - ``clip`` quantiles, N scales an expert's values to [0, 1],
    :math:`s_e = \exp(E\,N(|c_e|)^2) \tanh(\tau_e \sum_j g_j)`, and :math:`\beta_e = N(\max(s_e, q_e))` with q_e the
    1 - ``ratio`` quantile of s_e: 1 - ``ratio`` of all entries become 0.

    Global: N and quantiles run over the whole model. No tensor is skipped. tanh makes it sensitive to the scale of
    task vectors. Cost: ten passes over the task vectors in float32, memory one tile.

    Args:
        ratio: Share of each task vector that stays, in (0, 1). 0.1 (root and NLP code), 0.05 (vision code).
        clip: Quantile that magnitudes are clamped to, in [0, 0.5). 0.0001 (root code), 0.01 (NLP and vision code).
        balance: g = tau (``raw``: root and NLP code), or sign(tau) N(\|c\|) (``normalised``: vision code).

    Reference:
        Du et al., PCB-Merging, arXiv:2410.02396; the three released versions differ, the defaults are the root one's.
        None holds the softmax that the paper is quoted with.
    """

    ratio: float = 0.1
    clip: float = 1e-4
    balance: Literal["raw", "normalised"] = "raw"
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("transform.ratio", self.ratio, 0, 1, above=True, below=True)
        check_number("transform.clip", self.clip, 0, 0.5, below=True)
        check_choice("transform.balance", self.balance, ("raw", "normalised"))

    def prepare(self, source: Source) -> TransformFunction:
        """Return the rule, after finding the quantiles of magnitudes and scores."""
        size = entries(source)
        low = kth_magnitude(source, int(size * self.clip) + 1)
        high = kth_magnitude(source, max(int(size * (1 - self.clip) - 1), 0) + 1)
        cut = kth_smallest(
            lambda: (self._scores(tile, low, high) for _, tile in source.tiles()), int(size * (1 - self.ratio)) + 1
        )
        top = cut
        for _, tile in source.tiles():
            top = torch.maximum(top, self._scores(tile, low, high).amax(1))
        statistics = _Statistics(low, high, cut, top)
        return lambda name, task_vectors: self._weighed(task_vectors, statistics)

    def _scores(self, tile: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return the scores s, (E, k)."""
        normal = _scaled(_clamped(tile, low, high), low, high)
        balance = tile if self.balance == "raw" else tile.sign() * normal
        # Weights do not change with a common factor: exp(E (N^2 - 1)) in place of exp(E N^2) does not overflow.
        return torch.exp(len(tile) * (normal.square() - 1)) * torch.tanh(tile * total(balance))

    def _weighed(self, task_vectors: Tensor, statistics: _Statistics) -> Tensor:
        clamped = _clamped(task_vectors, statistics.low, statistics.high) * task_vectors.sign()
        scores = self._scores(task_vectors, statistics.low, statistics.high)
        weights = _scaled(torch.maximum(scores, per_expert(statistics.cut, scores)), statistics.cut, statistics.top)
        return clamped * weights / total(weights).clamp(min=1e-12)


def _clamped(tile: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return tile.abs().clamp(per_expert(low, tile), per_expert(high, tile))


def _scaled(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Map [low, high] of each expert to [0, 1]; an expert whose values are all equal gets 0."""
    span = (high - low).clamp(min=torch.finfo(values.dtype).tiny)
    return (values - per_expert(low, values)) / per_expert(span, values)
