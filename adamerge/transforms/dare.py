"""DARE: drop entries at random, and rescale."""

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adamerge.errors import check_number
from adamerge.transforms.protocol import Source, TransformFunction


@dataclass(frozen=True)
class Dare:
    r"""Drop each entry with probability p and divide the rest by 1 - p: the expected task vector is unchanged.

    :math:`\tau'_e = m_e \tau_e / (1 - p)`, :math:`m_e \sim \mathrm{Bernoulli}(1 - p)`. The mask is a function of seed,
    expert's name and parameter's name: not of the order, the other experts, device or torch version. It is drawn
    once, before coefficients are learned. No tensor is skipped. Cost: one random number per entry.

    Args:
        drop: p, in [0, 1). The papers use 0.5 to 0.9.
        seed: Seed of the masks; recorded with the result.
        rescale: Whether to divide by 1 - p. (mergekit rescales to the old L1 norm instead; not offered.)

    Reference:
        Yu et al., DARE, arXiv:2311.03099.
    """

    drop: float = 0.5
    seed: int = 0
    rescale: bool = True

    def __post_init__(self) -> None:
        check_number("transform.drop", self.drop, 0, 1, below=True)
        check_number("transform.seed", self.seed, whole=True)

    def prepare(self, source: Source) -> TransformFunction:
        """Return the rule for these experts."""
        experts = source.expert_names

        def rule(name: str, task_vectors: Tensor) -> Tensor:
            for row, expert in zip(task_vectors, experts, strict=True):
                mask = dare_mask(self.drop, self.seed, expert, name, tuple(row.shape))
                row.copy_(drop_entries(row, mask.to(row.device), self.drop if self.rescale else 0.0))
            return task_vectors

        return rule


def drop_entries(task_vector: Tensor, mask: Tensor, drop: float) -> Tensor:
    """Zero what the mask (*S) leaves out and divide the rest by ``1 - drop``."""
    return task_vector.masked_fill(~mask, 0) / (1 - drop)


def dare_mask(drop: float, seed: int, expert: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return which entries of one expert's parameter stay, bool (*S); the same on every machine.

    Philox is counter-based, and numpy keeps the streams of its bit generators stable across versions.
    """
    key = hashlib.sha256(json.dumps([seed, expert, name]).encode()).digest()[:16]
    count = torch.Size(shape).numel()
    words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(-(-count // 2))
    numbers = words.astype("<u8").view("<u4")[:count]
    return torch.from_numpy(numbers >= int(drop * 2**32)).view(shape)
