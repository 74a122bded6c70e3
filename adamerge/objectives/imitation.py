"""Imitation of the experts: match the output distribution of the task's own expert."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from adamerge.errors import InputError
from adamerge.model import TaskStep


@dataclass(frozen=True)
class Imitation:
    r"""Kullback-Leibler divergence from the expert's to the merged model's predictions.

    :math:`\frac{t^2}{B} \sum_b KL(\mathrm{softmax}(z^{expert}_b / t) \,\|\, \mathrm{softmax}(z_b / t))`,
    expert first. The expert is the task's raw one; its outputs are computed once and cached.

    Needs: unlabeled inputs and an expert for the task.

    Args:
        temperature: t; above 1 the expert's ranking of the other classes counts more.

    Reference:
        Hinton et al., arXiv:1503.02531 (temperature and its square); Expert Merging,
        arXiv:2509.25712, the logit term.
    """

    uses_teacher: ClassVar[bool] = True

    temperature: float = 1.0
    hidden_layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(f"objective.temperature: expected a number > 0, found {self.temperature}.")

    def __call__(self, step: TaskStep) -> Tensor:
        """Return the divergence in nats, averaged over the batch."""
        student = _log_softmax(step.outputs.logits, self.temperature)
        teacher = _log_softmax(step.teacher().logits, self.temperature)
        divergence = functional.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
        return divergence.mean() * self.temperature**2


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    return (logits / temperature).log_softmax(-1)
