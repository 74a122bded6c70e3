"""Entropy minimization (AdaMerging)."""

from dataclasses import dataclass

from torch import Tensor

from adamerge.model import TaskStep


@dataclass(frozen=True)
class Entropy:
    r"""Mean Shannon entropy of the merged model's predictions.

    :math:`-\frac1B \sum_b \sum_c p_{bc} \log p_{bc}`, with :math:`\log p` from a log-softmax in
    float32, so that saturated predictions stay finite under half precision.

    Needs: unlabeled inputs only. Known failure: a task on which the base is confidently wrong loses
    accuracy while its entropy falls; watch the per-task rows.

    Reference:
        Yang et al., AdaMerging, ICLR 2024, arXiv:2310.02575, the entropy objective.
    """

    hidden_layers: tuple[str, ...] = ()

    def __call__(self, step: TaskStep) -> Tensor:
        """Return the mean entropy of the batch in nats."""
        return softmax_entropy(step.outputs.logits).mean()


def softmax_entropy(logits: Tensor) -> Tensor:
    """Return the entropy of ``softmax(logits)`` in nats, (..., C) to (...).

    >>> softmax_entropy(torch.zeros(1, 2))
    tensor([0.6931])
    """
    log_probabilities = logits.float().log_softmax(-1) if logits.dtype.itemsize < 4 else logits.log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)
