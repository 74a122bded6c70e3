"""Information maximization (SHOT): confident predictions that do not all name one class."""

import math
from dataclasses import dataclass

from torch import Tensor

from adamerge.errors import check_number
from adamerge.model.task_step import TaskStep
from adamerge.objectives.entropy import log_softmax, softmax_entropy


@dataclass(frozen=True)
class InfoMax:
    r"""Mean entropy of the predictions minus the entropy of their mean.

    :math:`\frac1B \sum_b H(p_b) - w\, H\big(\frac1B \sum_b p_b\big)`. The second term resists the
    collapse of entropy minimization, in which every input ends in one class.

    Needs: unlabeled inputs, in batches that hold several classes. Known failure: it pushes towards
    balanced predictions where the stream is not balanced, and says little about batches smaller than
    the number of classes.

    Args:
        diversity: w, the factor of the marginal entropy; 0 is plain entropy minimization.

    Example:
        >>> outputs = Outputs(torch.tensor([[99.0, 0.0], [0.0, 99.0]]), features=torch.zeros(2, 3), hidden={})
        >>> step = TaskStep("a", torch.zeros(2, 4), torch.arange(2), outputs, torch.zeros(1, 1), None, None)
        >>> InfoMax()(step)  # sure of each, and of different classes: - ln 2
        tensor(-0.6931)

    Reference:
        Liang et al., SHOT, ICML 2020, arXiv:2002.08546, the information maximization loss.
    """

    diversity: float = 1.0
    hidden_layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_number("objective.diversity", self.diversity, 0)

    def __call__(self, step: TaskStep) -> Tensor:
        """Return the loss of the batch in nats."""
        logits = step.outputs.rows()
        return softmax_entropy(logits).mean() - self.diversity * marginal_entropy(logits)


def marginal_entropy(logits: Tensor) -> Tensor:
    """Return the entropy of the mean prediction in nats, (..., C) to a scalar.

    >>> marginal_entropy(torch.tensor([[99.0, 0.0], [0.0, 99.0]]))
    tensor(0.6931)
    """
    log_probabilities = log_softmax(logits).flatten(0, -2)
    # of the mean, without leaving the logarithm
    log_mean = log_probabilities.logsumexp(0) - math.log(len(log_probabilities))
    return -(log_mean.exp() * log_mean).sum()
