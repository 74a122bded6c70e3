"""Initial coefficients from a rule: depth, or the agreement of the experts.

Legend: E experts, G groups.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from adamerge.errors import InputError
from adamerge.model.granularity import Block
from adamerge.model.groups import GroupIndex
from adamerge.transforms.depth import relative_depths
from adamerge.transforms.protocol import Source

Agreement = Literal["cosine", "angle"]

# A rule is any callable that maps a pool to initial coefficients by parameter name: a number, or one per expert.
Start = Callable[[Any], Mapping[str, float | Tensor]]


@dataclass(frozen=True)
class DepthStart:
    r"""Start from LiNeS: :math:`\lambda_e = \alpha + \beta\, l / (L - 1)` for block l of L, alpha outside the blocks.

    Args:
        alpha: Coefficient of the first block; default the paper's 1 / E.
        beta: Increase from the first block to the last; the paper searches 0.1 to 1, 0.5 is this package's choice.
        pattern: Regular expression whose match in a parameter's name identifies its block.

    Reference:
        Wang et al., LiNeS, arXiv:2410.17146.
    """

    alpha: float | None = None
    beta: float = 0.5
    pattern: str = Block.pattern

    def __call__(self, pool: Source) -> dict[str, float | Tensor]:
        """Return one number per parameter; reads names only."""
        alpha = 1 / len(pool.expert_names) if self.alpha is None else self.alpha
        return {name: alpha + self.beta * depth for name, depth in relative_depths(pool.shapes, self.pattern).items()}


@dataclass(frozen=True)
class ModelStockStart:
    r"""Start from Model Stock: the more the experts agree on a tensor, the further from the base.

    :math:`\lambda = t / E`, :math:`t = E c / (1 + (E - 1) c)`, c the mean cosine of the experts' task vectors of that
    tensor, clipped to [0, 1] (our choice: the formula has a pole at negative cosines). One pass over the task vectors.

    Reference:
        Jang et al., Model Stock, arXiv:2403.19522; cosines are averaged, as mergekit does.
    """

    def __call__(self, pool: Source) -> dict[str, float | Tensor]:
        """Return one number per parameter."""
        experts = len(pool.expert_names)
        grams = {name: torch.zeros(experts, experts, dtype=torch.float64) for name in pool.shapes}
        for name, tile in pool.tiles():
            values = tile.double()
            grams[name] += (values @ values.T).cpu()
        return {name: stock_ratio(gram[None]).item() / experts for name, gram in grams.items()}


STARTS: dict[str, Start] = {"lines": DepthStart(), "model_stock": ModelStockStart()}


def start_of(init: object) -> Start | None:
    """Return the rule that ``init`` names or is; None where it is something else."""
    if isinstance(init, str):
        return STARTS.get(init)
    return init if callable(init) and not isinstance(init, Tensor) else None


def by_group(values: Mapping[str, float | Tensor], index: GroupIndex, experts: int) -> Tensor:
    """Average values by parameter over each group, weighted by the entries that it has there.

    Args:
        values: Parameter name to a number, or to one per expert, (E,).
        index: The groups.
        experts: E.

    Returns:
        Shape (E, G), float64.

    Raises:
        InputError: If a parameter has no value, or not one per expert.
    """
    for name in index.segments:
        count = torch.as_tensor(values.get(name, ())).numel()
        if count not in (1, experts):
            raise InputError(
                f"init: parameter {name!r}: expected a number, or {experts}, from the rule, found {count}."
            )
    sums, weights = torch.zeros(experts, index.size, dtype=torch.float64), torch.zeros(index.size, dtype=torch.float64)
    for name, segments in index.segments.items():
        value = torch.as_tensor(values[name], dtype=torch.float64).reshape(-1, 1)
        for segment in segments:
            groups = slice(segment.first, segment.first + segment.span)
            sums[:, groups] += value * segment.outer * segment.inner
            weights[groups] += segment.outer * segment.inner
    return sums / weights


def stock_ratio(grams: Tensor, agreement: Agreement = "cosine") -> Tensor:
    r"""Return how far from the base the mean of the experts belongs, :math:`t = E c / (1 + (E - 1) c)`.

    c is the mean cosine of pairs of task vectors, or the cosine of their mean angle. A negative c counts as 0 (this
    package's choice), as t has a pole at -1 / (E - 1); a task vector of zeros agrees with none; one expert alone has
    t = 1.

    Args:
        grams: Inner products of the task vectors, (rows, E, E), float64.
        agreement: ``"cosine"`` or ``"angle"``, which is averaged.

    Returns:
        (rows,), in [0, 1].

    Reference:
        Jang et al., Model Stock, arXiv:2403.19522; cosines are averaged, as mergekit does.
    """
    experts = grams.shape[-1]
    if experts == 1:
        return torch.ones_like(grams[:, 0, 0])
    norms = grams.diagonal(dim1=1, dim2=2).sqrt()
    cosines = (grams / (norms[:, :, None] * norms[:, None, :])).nan_to_num(0.0, 0.0, 0.0).clamp(-1, 1)
    first, second = torch.triu_indices(experts, experts, 1).to(grams.device)
    pairs = cosines[:, first, second]
    mean = (pairs.mean(1) if agreement == "cosine" else pairs.acos().mean(1).cos()).clamp(0, 1)
    return experts * mean / (1 + (experts - 1) * mean)
