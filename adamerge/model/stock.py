"""Model Stock's formula, for the merge and for initial coefficients.

Legend: E experts.
"""

from typing import Literal

import torch
from torch import Tensor

Agreement = Literal["cosine", "angle"]


def stock_ratio(grams: Tensor, agreement: Agreement = "cosine") -> Tensor:
    r"""Return how far from the base the mean of the experts belongs, :math:`t = E c / (1 + (E - 1) c)`.

    c is the mean cosine of pairs of task vectors, or the cosine of their mean angle. A negative c counts as 0, as t
    has a pole at -1 / (E - 1); a task vector of zeros agrees with none; one expert alone has t = 1.

    Args:
        grams: Inner products of the task vectors, (rows, E, E), float64.
        agreement: What is averaged.

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
