"""Entropy minimization (AdaMerging), with the reliable-sample filter of EATA as an option."""

import math
from dataclasses import dataclass

from torch import Tensor

from adamerge.errors import check_number
from adamerge.model.task_step import TaskStep


@dataclass(frozen=True)
class Entropy:
    r"""Mean Shannon entropy of the merged model's predictions.

    :math:`-\frac1N \sum_n \sum_c p_{nc} \log p_{nc}` over the N rows that count (samples, or
    positions of texts), with :math:`\log p` from a log-softmax in float32, so that saturated predictions stay finite
    under half precision.

    Needs: unlabeled inputs only. Known failure: a task on which the base is confidently wrong loses
    accuracy while its entropy falls; watch the per-task rows.

    Args:
        reliable: Leave out rows whose entropy is ``reliable * ln C`` nats or more, and average over the
            rest (a batch without any costs 0). EATA's value is 0.4; None keeps all. EATA's redundancy
            filter, sample weights and Fisher penalty are not part of this.

    Example:
        >>> outputs = Outputs(torch.zeros(1, 2), features=torch.zeros(1, 3), hidden={})
        >>> step = TaskStep("a", torch.zeros(1, 4), torch.arange(1), outputs, torch.zeros(1, 1), None, None)
        >>> Entropy()(step)  # ln 2: two classes, as likely as each other
        tensor(0.6931)

    Reference:
        Yang et al., AdaMerging, ICLR 2024, arXiv:2310.02575, the entropy objective. Niu et al., EATA,
        ICML 2022, arXiv:2204.02610, the reliable-sample filter.
    """

    reliable: float | None = None
    hidden_layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.reliable is not None:
            check_number("objective.reliable", self.reliable, 0, 1, above=True)

    def __call__(self, step: TaskStep) -> Tensor:
        """Return the mean entropy of the batch's (reliable) rows in nats."""
        entropy = softmax_entropy(step.outputs.rows())
        if self.reliable is None:
            return entropy.mean()
        limit = self.reliable * math.log(step.outputs.logits.shape[-1])
        return mean_over(entropy, entropy.detach() < limit)


def softmax_entropy(logits: Tensor) -> Tensor:
    """Return the entropy of ``softmax(logits)`` in nats, (..., C) to (...).

    >>> softmax_entropy(torch.zeros(1, 2))
    tensor([0.6931])
    """
    log_probabilities = log_softmax(logits)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return ``log softmax(logits / temperature)`` over the last dimension, in float32 at least."""
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    return (logits / temperature).log_softmax(-1)


def mean_over(losses: Tensor, kept: Tensor) -> Tensor:
    """Return the mean of the ``losses`` that are ``kept`` (booleans of the same shape); 0 where none is.

    >>> mean_over(torch.tensor([1.0, 5.0]), torch.tensor([False, False]))
    tensor(0.)
    """
    return losses.where(kept, 0).sum() / kept.sum().clamp(min=1)
