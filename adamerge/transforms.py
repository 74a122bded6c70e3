"""Task vectors before they are merged: one parameter's stack in, the same shape out.

A transform is any callable that takes the task vectors of one parameter, (E, *S), and returns as many;
it is chosen by import path (``transform._target_=my_package.MyTransform``). Coefficients are learned on
the result; teachers stay the raw experts.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from adamerge.errors import InputError


class Transform(Protocol):
    """Changes the task vectors of one parameter."""

    def __call__(self, task_vectors: Tensor) -> Tensor:
        """Return the transformed task vectors, (E, *S) to (E, *S); the input may be overwritten."""
        ...


@dataclass(frozen=True)
class Trim:
    """Keep the largest entries of each expert's task vector, parameter by parameter, and zero the others.

    Exactly ``int(density * n)`` of n entries stay, at least one; of equal magnitudes the first ones stay.

    Args:
        density: Share of the entries that stays, in (0, 1].

    Reference:
        Yadav et al., TIES-Merging, arXiv:2306.01708, the trim step, with the threshold taken per parameter
        (the paper's is over the whole model).
    """

    density: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise InputError(f"transform.density: expected a number in (0, 1], found {self.density}.")

    def __call__(self, task_vectors: Tensor) -> Tensor:
        """Return the trimmed task vectors."""
        flat = task_vectors.flatten(1) if task_vectors.ndim > 1 else task_vectors.unsqueeze(1)
        keep = max(1, int(self.density * flat.shape[1]))
        order = flat.abs().argsort(dim=1, descending=True, stable=True)[:, :keep]
        mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, order, True)
        return (flat * mask).view_as(task_vectors)
