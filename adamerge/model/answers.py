"""Answers in little room: the best classes of each row, and one bucket for all others.

Legend: N rows, C classes, K kept classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from adamerge.data.batch import Outputs as Outputs

_NOTHING = -6e4  # logarithm of no mass that half precision can hold, and that times no mass is 0


class Answers(NamedTuple):
    """Log-probabilities (N, K + 1) of the classes (N, K), best first, and last of all others together.

    Where no class is left out, ``classes`` is None and the log-probabilities are (N, C).
    """

    log_probabilities: Tensor
    classes: Tensor | None

    @property
    def best(self) -> Tensor:
        """The best class of each row, (N,)."""
        return self.log_probabilities.argmax(-1) if self.classes is None else self.classes[:, 0].long()


def best_classes(outputs: Outputs) -> Tensor:
    """Return the class that an expert names at each row that counts, (N,)."""
    return Answers(outputs.rows(), outputs.classes).best


def shorten_answers(logits: Tensor, count: int | None) -> Answers:
    """Keep the ``count`` best classes of logits (N, C), and the mass of the others.

    Example:
        >>> answers = shorten_answers(torch.tensor([[0.7, 0.1, 0.2]]).log(), 1)
        >>> answers.log_probabilities.exp(), answers.classes
        (tensor([[0.7000, 0.3000]]), tensor([[0]], dtype=torch.int32))
    """
    log_probabilities = logits.float().log_softmax(-1)
    if count is None or count >= logits.shape[-1] - 1:
        return Answers(log_probabilities, None)
    classes = log_probabilities.topk(count, -1).indices.int()
    return Answers(coarsen(log_probabilities, classes), classes)


def coarsen(logits: Tensor, classes: Tensor | None) -> Tensor:
    """Return log-probabilities (N, K + 1) of logits (N, C): of the classes (N, K), and of all others together.

    A divergence of two such distributions is at most that of the whole ones: what happens among the others is not seen.
    """
    log_probabilities = logits.float().log_softmax(-1)
    if classes is None:
        return log_probabilities
    at = classes.long()
    others = log_probabilities.scatter(-1, at, -torch.inf).logsumexp(-1, keepdim=True).clamp(min=_NOTHING)
    return torch.cat([log_probabilities.gather(-1, at), others], -1)
