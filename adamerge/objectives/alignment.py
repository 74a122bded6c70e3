"""Alignment with the experts (Expert Merging): their predictions and hidden states, near the start."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar, Literal

import torch
from torch import Tensor

from adamerge.errors import InputError, check_choice, check_number
from adamerge.model.hidden_layers import select
from adamerge.model.task_step import TaskStep
from adamerge.objectives.imitation import divergence_from


@dataclass(frozen=True)
class Alignment:
    r"""Distance to the task's own expert in logits, hidden states and features, and to the start.

    :math:`\beta_k \big(w_z t^2\, KL(\mathrm{softmax}(z^{expert}/t) \| \mathrm{softmax}(z/t)) + w_h \sum_{\ell}
    \|h_\ell - h^{expert}_\ell\|^2 + w_f \|f - f^{expert}\|^2\big) + \frac{\gamma}{K} R`, each a mean over
    the batch (of texts over the rows that count; padding has no part in hidden states), with
    :math:`R = \frac{1}{EG} \sum_{e,g} |\lambda_{eg} - \lambda^0_{eg}|` and K tasks in the step, so that the sum over
    the tasks holds :math:`\gamma R` once, as in the paper.

    Needs: unlabeled inputs (5 to 10 per task in the paper) and an expert for each task.

    Args:
        temperature: t, > 0. The released code runs with 1.
        logit_weight: w_z.
        hidden_layers: Modules whose outputs are compared, by path or glob, of whose matches the outermost count; () for
            none (the code's default).
        hidden_weight: w_h.
        feature_weight: w_f, of the encoder's output; 0 in the paper and in the code.
        distance: ``"sum"``: squared norms, summed over layers (paper). ``"mean"``: squared differences
            averaged over entries and layers (released code); the two differ by entries x layers.
        anchor: gamma: 0.8 in the paper for Qwen2-VL and Mistral (initial value 0.3), 5.0 for InternVL (0.1).
        anchor_scale: ``"paper"``: R as above. ``"code"``: E times that, as the released code divides by the
            number of coefficients per expert.
        task_weights: beta, task to factor, default 1. ``method.task_weights`` would scale the anchor too.

    The released code's soft cross-entropy has the gradient of the divergence used here.

    Example:
        >>> outputs = Outputs(torch.zeros(1, 2), features=torch.zeros(1, 3), hidden={})
        >>> expert = Outputs(torch.tensor([[99.0, 0.0]]), features=torch.ones(1, 3), hidden={})
        >>> batch = torch.zeros(1, 4), torch.arange(1)  # inputs, and where they stand in the stream
        >>> step = TaskStep("a", *batch, outputs, torch.zeros(1, 1), lambda *_: expert, None)
        >>> Alignment(feature_weight=1.0, anchor=0.0)(step)  # ln 2, and 3 entries that are 1 away
        tensor(3.6931)

    Reference:
        Expert Merging, ICLR 2026, arXiv:2509.25712, the layer-wise objective.
    """

    uses_teacher: ClassVar[bool] = True

    temperature: float = 1.0
    logit_weight: float = 1.0
    hidden_layers: Sequence[str] = ()
    hidden_weight: float = 1.0
    feature_weight: float = 0.0
    distance: Literal["sum", "mean"] = "sum"
    anchor: float = 0.8
    anchor_scale: Literal["paper", "code"] = "paper"
    task_weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        check_number("objective.temperature", self.temperature, 0, above=True)
        check_choice("objective.distance", self.distance, ("sum", "mean"))
        check_choice("objective.anchor_scale", self.anchor_scale, ("paper", "code"))
        for option in ("logit_weight", "hidden_weight", "feature_weight", "anchor"):
            check_number(f"objective.{option}", getattr(self, option), 0)
        if not (self.logit_weight or self.feature_weight or (self.hidden_weight and self.hidden_layers)):
            raise InputError(
                "objective: expected a term that compares with the expert, found none. Set logit_weight or "
                "feature_weight above 0, or name hidden_layers."
            )

    def __call__(self, step: TaskStep) -> Tensor:
        """Return the loss of one task's batch."""
        merged, expert = step.outputs.compact(), step.teacher()
        rows = len(merged.rows())
        loss = torch.zeros((), device=merged.logits.device)
        if self.logit_weight:
            loss = loss + self.logit_weight * divergence_from(expert, merged.rows(), self.temperature).mean()
        if self.hidden_weight and self.hidden_layers:
            selected = [select(merged.hidden, pattern, "objective.hidden_layers") for pattern in self.hidden_layers]
            names = dict.fromkeys(chain.from_iterable(selected))
            distances = torch.stack([self._distance(merged.hidden[name], expert.hidden[name], rows) for name in names])
            loss = loss + self.hidden_weight * (distances.sum() if self.distance == "sum" else distances.mean())
        if self.feature_weight:
            if merged.features is None or expert.features is None:
                raise InputError(
                    "objective.feature_weight: the network has no features, its own logits count. Set it to 0, or name "
                    "the module before the logits in hidden_layers."
                )
            loss = loss + self.feature_weight * self._distance(merged.features, expert.features, rows)
        loss = loss * (self.task_weights or {}).get(step.task, 1.0)
        return loss + self._penalty(step) if self.anchor else loss

    def _distance(self, merged: Tensor, expert: Tensor, rows: int) -> Tensor:
        """Squared distance of two tensors (M, ...), summed and divided by the rows, or averaged over all entries."""
        squares = (
            (merged.float() - expert.float()).square() if merged.dtype.itemsize < 4 else (merged - expert).square()
        )
        if self.distance == "mean":
            return squares.mean()
        return squares.flatten(1).sum(1).mean() if len(squares) == rows else squares.sum() / rows

    def _penalty(self, step: TaskStep) -> Tensor:
        """This task's share of the anchor."""
        if step.initial is None:
            raise InputError("objective.anchor: the step does not say where the coefficients started; set anchor=0.")
        mean = (step.coefficients - step.initial).abs().mean()
        scale = 1 if self.anchor_scale == "paper" else len(step.coefficients)
        return mean * (self.anchor * scale / step.num_tasks)
