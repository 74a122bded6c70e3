"""Where merging coefficients may lie: AdaMerging's clamp, a box, the simplex and others.

Legend: E experts, G groups; all tensors are (E, G).
"""

import dataclasses
import math
from typing import Protocol

import torch
from torch import Tensor

from adamerge.errors import InputError, check_choice


class Constraint(Protocol):
    """Where coefficients may lie: a differentiable map of the raw tensor, and a projection after a step."""

    def forward(self, raw: Tensor) -> Tensor:
        """Map the raw tensor (E, G) to coefficients (E, G)."""
        ...

    def inverse(self, values: Tensor) -> Tensor:
        """Return the raw tensor whose coefficients are ``values``, as far as the constraint allows."""
        ...

    def project(self, raw: Tensor) -> Tensor:
        """Return the raw tensor moved back into the allowed set, after an optimizer step."""
        ...


@dataclasses.dataclass(frozen=True)
class Unconstrained:
    """Any real number (FusionBench's default)."""

    def forward(self, raw: Tensor) -> Tensor:
        """Return ``raw``."""
        return raw

    def inverse(self, values: Tensor) -> Tensor:
        """Return ``values``."""
        return values

    def project(self, raw: Tensor) -> Tensor:
        """Return ``raw``."""
        return raw


@dataclasses.dataclass(frozen=True)
class _Interval(Unconstrained):
    """Coefficients in an interval."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise InputError(f"constraint: expected finite bounds low < high, found low={self.low}, high={self.high}.")

    def inverse(self, values: Tensor) -> Tensor:
        """Clamp ``values``, so that none starts where the gradient is zero."""
        return values.clamp(self.low, self.high)


@dataclasses.dataclass(frozen=True)
class Clamp(_Interval):
    """AdaMerging's constraint: clamp in the forward pass, gradient zero strictly outside the bounds.

    A raw value that leaves the interval never comes back (10-31 % of the published layer-wise
    coefficients are exactly 0): ``Box`` has no such dead zone. At the bounds the gradient is 1, on every torch version.

    Reference:
        AdaMerging (arXiv:2310.02575), released code.
    """

    def forward(self, raw: Tensor) -> Tensor:
        """Clamp, inclusive at both bounds."""
        inside = (raw >= self.low) & (raw <= self.high)
        return torch.where(inside, raw, raw.detach().clamp(self.low, self.high))


@dataclasses.dataclass(frozen=True)
class Box(_Interval):
    """Projection onto an interval after each step: gradients always act."""

    def project(self, raw: Tensor) -> Tensor:
        """Clamp ``raw``."""
        return raw.clamp(self.low, self.high)


@dataclasses.dataclass(frozen=True)
class Sigmoid(Unconstrained):
    """Coefficients in (0, 1) as the sigmoid of the raw tensor (Expert Merging, arXiv:2509.25712)."""

    def forward(self, raw: Tensor) -> Tensor:
        """Return ``sigmoid(raw)``."""
        return raw.sigmoid()

    def inverse(self, values: Tensor) -> Tensor:
        """Return the logit; 0 and 1 are moved inside by 1e-6."""
        return values.logit(eps=1e-6)


@dataclasses.dataclass(frozen=True)
class Simplex(Unconstrained):
    """Non-negative coefficients that sum over the experts to 1, or to at most 1.

    Args:
        total: ``"equal"`` (sum = 1) or ``"at_most"`` (sum <= 1: the base keeps the rest).
    """

    total: str = "equal"

    def __post_init__(self) -> None:
        check_choice("constraint.total", self.total, ("equal", "at_most"))

    def inverse(self, values: Tensor) -> Tensor:
        """Project ``values``."""
        return self.project(values)

    def project(self, raw: Tensor) -> Tensor:
        """Return the nearest point (Euclidean) of the simplex, group by group."""
        onto = project_onto_simplex(raw)
        if self.total == "equal":
            return onto
        positive = raw.clamp(min=0)
        return torch.where(positive.sum(0) <= 1, positive, onto)


def project_onto_simplex(points: Tensor) -> Tensor:
    """Project each column of ``points`` (E, G) onto the probability simplex.

    Reference:
        Duchi et al., ICML 2008, "Efficient projections onto the l1-ball", Fig. 1.

    >>> project_onto_simplex(torch.tensor([[0.9], [0.3]]))
    tensor([[0.8000],
            [0.2000]])
    """
    points = points - points.amax(0)  # changes nothing but rounding: 1 would vanish beside large values
    ordered = points.sort(0, descending=True).values
    excess = ordered.cumsum(0) - 1
    ranks = torch.arange(1, len(points) + 1, device=points.device, dtype=points.dtype).unsqueeze(1)
    support = (ordered * ranks > excess).sum(0, keepdim=True).clamp(min=1)  # 0 for NaN, which stays NaN
    return (points - excess.gather(0, support - 1) / support).clamp(min=0)


_CONSTRAINTS: dict[str, type[Unconstrained]] = {
    "none": Unconstrained,
    "clamp": Clamp,
    "box": Box,
    "sigmoid": Sigmoid,
    "simplex": Simplex,
}


def by_name(constraint: str) -> Constraint:
    """Return a built-in constraint with its defaults."""
    check_choice("constraint", constraint, list(_CONSTRAINTS))
    return _CONSTRAINTS[constraint]()
