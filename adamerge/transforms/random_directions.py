"""Random directions in the place of the task vectors: a control, which knows nothing of the experts but their norms."""

import hashlib
import json
from dataclasses import dataclass

import torch
from torch import Tensor

from adamerge.errors import check_number
from adamerge.transforms.protocol import Source, TransformFunction


@dataclass(frozen=True)
class RandomDirections:
    r"""Replace each tensor of each task vector by a random one of the same norm.

    :math:`\tau'_e = \lVert\tau_e\rVert_2\, u_e` per tensor, with :math:`u_e` uniform on the unit sphere. What
    coefficients reach on these owes nothing to the experts' weights: a random subspace of that size is enough for it.
    Directions are a function of seed, expert's name and parameter's name: not of order, other experts, storage or
    device. A tensor that an expert did not change stays so. Cost: one random number per entry.

    Args:
        seed: Seed of the directions; recorded with the result.

    Reference:
        Li et al., Measuring the intrinsic dimension of objective landscapes, ICLR 2018, arXiv:1804.08838 (learning in a
        random subspace).
    """

    seed: int = 0

    def __post_init__(self) -> None:
        check_number("transform.seed", self.seed, whole=True)

    def prepare(self, source: Source) -> TransformFunction:
        """Return the rule for these experts."""
        experts = source.expert_names

        def rule(name: str, task_vectors: Tensor) -> Tensor:
            for row, expert in zip(task_vectors, experts, strict=True):
                direction = _direction(self.seed, expert, name, row.shape)
                row.copy_(direction * (row.cpu().double().norm() / direction.norm()))
            return task_vectors

        return rule


def _direction(seed: int, expert: str, name: str, shape: torch.Size) -> Tensor:
    """Return normal random numbers (*S), float64 on the CPU."""
    key = hashlib.sha256(json.dumps([seed, expert, name]).encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
    return torch.randn(shape, generator=generator, dtype=torch.float64)
