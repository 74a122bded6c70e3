"""Imitation of the experts: match the predictions of the task's own expert."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional

from adamerge.errors import InputError, check_choice, check_number
from adamerge.model.answers import Outputs, best_classes, coarsen
from adamerge.model.task_step import TaskStep
from adamerge.objectives.entropy import log_softmax, mean_over


@dataclass(frozen=True)
class Imitation:
    r"""Divergence from the expert's to the merged model's predictions.

    ``targets="soft"``: :math:`\frac{t^2}{B} \sum_b KL(\mathrm{softmax}(z^{expert}_b / t) \,\|\,
    \mathrm{softmax}(z_b / t))`, expert first. ``targets="hard"``: cross-entropy to the expert's class,
    :math:`-\frac1B \sum_b \log p_{b, c(b)}` with :math:`c(b) = \arg\max_c z^{expert}_{bc}`. The expert is
    the task's raw one; its outputs are computed once and cached. With ``teachers.top_k`` the divergence is between the
    expert's likeliest classes and one bucket of all others, a lower bound of the whole one.

    Needs: unlabeled inputs and an expert for the task.

    Args:
        temperature: t of soft targets; above 1 the expert's ranking of the other classes counts more.
        targets: ``"soft"`` or ``"hard"``.
        drop_unsure: Leave out a row (a sample, or a position of a text) where expert and merged model name different
            classes and the expert is the less confident of the two; the mean is over the rest, 0 where none is left.

    Example:
        >>> outputs = Outputs(torch.zeros(1, 2), features=torch.zeros(1, 3), hidden={})
        >>> expert = Outputs(torch.tensor([[99.0, 0.0]]), features=torch.zeros(1, 3), hidden={})
        >>> batch = torch.zeros(1, 4), torch.arange(1)  # inputs, and where they stand in the stream
        >>> step = TaskStep("a", *batch, outputs, torch.zeros(1, 1), lambda *_: expert, None)
        >>> Imitation()(step)  # the expert is sure, the merged model undecided: ln 2
        tensor(0.6931)

    Reference:
        Hinton et al., arXiv:1503.02531 (temperature and its square); Expert Merging, arXiv:2509.25712,
        the logit term; SyMerge, arXiv:2412.19098 (hard targets; the rule of ``drop_unsure`` is its
        released code's). SyMerge also trains a head per task: here the coefficients alone learn.
    """

    uses_teacher: ClassVar[bool] = True

    temperature: float = 1.0
    hidden_layers: tuple[str, ...] = ()
    targets: Literal["soft", "hard"] = "soft"
    drop_unsure: bool = False

    def __post_init__(self) -> None:
        check_number("objective.temperature", self.temperature, 0, above=True)
        check_choice("objective.targets", self.targets, ("soft", "hard"))
        if self.targets == "hard" and self.temperature != 1:
            raise InputError(
                f"objective.temperature: expected 1 with targets=hard, found {self.temperature}: a temperature does "
                "not change the expert's class. Remove it, or set targets=soft."
            )

    def __call__(self, step: TaskStep) -> Tensor:
        """Return the divergence in nats, averaged over the batch's rows that count."""
        merged, expert = step.outputs.rows(), step.teacher()
        if self.targets == "soft":
            losses = divergence_from(expert, merged, self.temperature)
        else:
            losses = -log_softmax(merged).gather(-1, best_classes(expert).unsqueeze(-1)).squeeze(-1)
        return mean_over(losses, is_sure(merged.detach(), expert)) if self.drop_unsure else losses.mean()


def divergence_from(expert: Outputs, merged: Tensor, temperature: float) -> Tensor:
    """Return ``t^2 KL(expert || merged)`` in nats of rows (N, C), (N,); of an expert's kept classes a lower bound.

    Raises:
        InputError: If only some classes were kept, and the temperature is not 1.
    """
    if expert.classes is None:
        return divergence(merged, expert.rows(), temperature)
    if temperature != 1:
        raise InputError(
            f"objective.temperature: expected 1 with teachers.top_k, found {temperature}: what a temperature makes of "
            "the classes that are left out is not known. Set teachers.top_k=null, or the temperature to 1."
        )
    return divergence(coarsen(merged, expert.classes), expert.rows(), temperature)


def divergence(merged: Tensor, expert: Tensor, temperature: float) -> Tensor:
    """Return ``t^2 KL(expert || merged)`` in nats of logits (..., C), one value per sample (...)."""
    student, teacher = log_softmax(merged, temperature), log_softmax(expert, temperature)
    return functional.kl_div(student, teacher, log_target=True, reduction="none").sum(-1) * temperature**2


def is_sure(merged: Tensor, expert: Outputs) -> Tensor:
    """Return where the expert agrees with the merged model's rows (N, C) or is at least as confident, (N,).

    >>> is_sure(torch.tensor([[9.0, 0.0], [9.0, 0.0]]), Outputs(torch.tensor([[0.0, 1.0], [1.0, 0.0]])))
    tensor([False,  True])
    """
    ours, best = log_softmax(merged).max(-1), best_classes(expert)
    theirs = log_softmax(expert.rows()).gather(-1, (best if expert.classes is None else best * 0).unsqueeze(-1))
    return (ours.indices == best) | (theirs.squeeze(-1) >= ours.values)
