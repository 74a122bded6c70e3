"""AWD: take the redundant part, common to all experts, out of their task vectors.

Legend: E experts; a vector in the span of the task vectors is written by its E coordinates.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adamerge.errors import check_number
from adamerge.transforms.protocol import Source, TransformFunction, per_expert, total


@dataclass(frozen=True)
class Awd:
    r"""Subtract one vector from all task vectors, chosen to make them as orthogonal as possible while it stays small.

    :math:`\tau'_e = \tau_e - \delta`, where delta minimizes :math:`\frac{1}{E(E-1)} \sum_{i \ne j}
    |\cos(\tau_i - \delta, \tau_j - \delta)| + a \lVert\delta\rVert_2` by plain gradient descent from 0. It then stays
    in the span of the task vectors, so only their E x E Gram matrix is needed: exact, one pass over the task vectors,
    memory one tile. Global, no tensor is skipped. Step size and penalty are not scale-free.

    Args:
        penalty: a >= 0.
        step_size: Step size of gradient descent.
        steps: Steps of gradient descent.

    Reference:
        Xiong et al., Adaptive Weight Disentanglement, arXiv:2411.18729. The three constants are second-hand: the
        authors' repository holds no code.
    """

    penalty: float = 0.1
    step_size: float = 0.01
    steps: int = 300
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("transform.penalty", self.penalty, 0)
        check_number("transform.step_size", self.step_size, 0)
        check_number("transform.steps", self.steps, 0, whole=True)

    def prepare(self, source: Source) -> TransformFunction:
        """Return the rule, after one pass for the Gram matrix."""
        experts = len(source.expert_names)
        gram = torch.zeros(experts, experts, dtype=torch.float64)
        for _, tile in source.tiles():
            values = tile.double()
            gram += (values @ values.T).cpu()
        redundant = redundant_vector(gram, self.penalty, self.step_size, self.steps)

        def rule(name: str, task_vectors: Tensor) -> Tensor:
            return task_vectors - total(task_vectors * per_expert(redundant, task_vectors))

        return rule


def redundant_vector(gram: Tensor, penalty: float, step_size: float, steps: int) -> Tensor:
    """Return delta's coordinates in the task vectors, (E,), float64.

    With v_i = tau_i - delta, the gradient of |cos(v_i, v_j)| is
    ``sign(cos) (-(v_i + v_j) / (|v_i| |v_j|) + cos (v_i / |v_i|^2 + v_j / |v_j|^2))``: a combination of task vectors.

    Args:
        gram: Inner products of the task vectors, (E, E), float64.
        penalty: Weight of the norm.
        step_size: Step size of gradient descent.
        steps: Steps of gradient descent.
    """
    experts = len(gram)
    redundant = torch.zeros(experts, dtype=torch.float64)
    if experts == 1:
        return redundant
    identity = torch.eye(experts, dtype=torch.float64)
    for _ in range(steps):
        vectors = identity - redundant  # row i: coordinates of v_i
        products = vectors @ gram @ vectors.T
        norms = products.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
        scale = torch.outer(norms, norms)
        cosines = products / scale * (1 - identity)
        weights = (cosines.abs().sum(1) / norms.square() - (cosines.sign() / scale).sum(1)) * 2
        gradient = weights @ vectors / (experts * (experts - 1))
        size = (redundant @ gram @ redundant).clamp(min=0).sqrt()
        if size > 0:
            gradient = gradient + penalty * redundant / size
        redundant = redundant - step_size * gradient
    return redundant
