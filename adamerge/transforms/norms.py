"""Give all experts task vectors of one length."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adamerge.errors import check_choice
from adamerge.transforms.protocol import Source, TransformFunction, per_expert


@dataclass(frozen=True)
class EqualNorms:
    r"""Scale each expert's task vector to the mean norm of all, so that none dominates by having trained longer.

    :math:`\tau'_e = \tau_e\, \bar n / n_e`, with :math:`n_e = \lVert\tau_e\rVert_2` and their mean over the experts. An
    expert that did not change a tensor keeps its zeros there (and counts in the mean). No tensor is skipped. Cost: one
    pass over the task vectors, or one norm per parameter.

    Args:
        scope: Norms over the whole ``model`` (directions are kept), or of each ``tensor``.

    Reference:
        None: plain normalisation.
    """

    scope: Literal["model", "tensor"] = "model"

    def __post_init__(self) -> None:
        check_choice("transform.scope", self.scope, ("model", "tensor"))

    @property
    def elementwise(self) -> bool:
        """Whether the norms are known beforehand."""
        return self.scope == "model"

    def prepare(self, source: Source) -> TransformFunction:
        """Return the rule, after one pass for the norms where they are the model's."""
        squares = torch.zeros(len(source.expert_names), dtype=torch.float64)
        if self.scope == "model":
            for _, tile in source.tiles():
                squares += tile.double().square().sum(1).cpu()
        model_factors = _factors(squares.sqrt())

        def rule(name: str, task_vectors: Tensor) -> Tensor:
            factors = model_factors
            if self.scope == "tensor":
                factors = _factors(task_vectors.reshape(len(task_vectors), -1).double().norm(dim=1))
            return task_vectors * per_expert(factors, task_vectors)

        return rule


def _factors(norms: Tensor) -> Tensor:
    return torch.where(norms > 0, norms.mean() / norms, 1.0)
