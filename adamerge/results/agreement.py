"""How near a merge is to the experts, without labels.

Legend: N rows that count, C classes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from adamerge.model.answers import Outputs, best_classes, coarsen
from adamerge.system import ranks


@dataclass(frozen=True)
class Agreement:
    """Means over tasks of the means over a task's rows.

    Attributes:
        agreement: Share of rows of which merge and expert name the same class.
        kl: Divergence from the expert's to the merge's predictions, in nats.
        rows: Number of rows: samples, or positions of texts.
    """

    agreement: float
    kl: float
    rows: int

    def is_better_than(self, start: "Agreement") -> bool:
        """Whether the divergence is lower, and the agreement by no more than chance explains, if at all.

        That is the standard error of the difference, with one row of each kind added to both, so that few rows that all
        agree do not look certain: Agresti and Caffo, The American Statistician 54 (2000).
        """
        rates = [(measured.agreement * measured.rows + 1) / (measured.rows + 2) for measured in (self, start)]
        error = sum(rate * (1 - rate) / (self.rows + 2) for rate in rates) ** 0.5
        return self.kl < start.kl and start.agreement - self.agreement <= error


def mean_of(parts: Sequence[Agreement]) -> Agreement:
    """Return the mean over parts of the rows, each weighted by its number of them."""
    rows = sum(part.rows for part in parts)
    agreement, kl = (sum(getattr(part, kind) * part.rows for part in parts) / rows for kind in ("agreement", "kl"))
    return Agreement(agreement, kl, rows)


class Tally:
    """Adds up, task by task, how near a merge is to the experts.

    Args:
        tasks: Those that have an expert; the same on all devices.
    """

    def __init__(self, tasks: Iterable[str]) -> None:
        self._sums = {task: torch.zeros(3, dtype=torch.float64) for task in tasks}  # rows, hits, divergence

    def __contains__(self, task: str) -> bool:
        return task in self._sums

    def add(self, task: str, merged: Tensor, expert: Outputs) -> None:
        """Count rows of logits of a merge (N, C) and of its expert, which may be of the likeliest classes alone."""
        answers = expert.rows()
        student, teacher = coarsen(merged, expert.classes), answers.float().log_softmax(-1)
        kl = functional.kl_div(student, teacher, log_target=True, reduction="sum")
        hits = (merged.argmax(-1) == best_classes(expert)).sum()
        self._sums[task] += torch.stack([torch.tensor(float(len(merged))), hits.cpu(), kl.cpu()]).double()

    def result(self, device: torch.device | str = "cpu") -> Agreement | None:
        """Return the means over what all devices have added; None where no task has rows. All devices must call."""
        if not self._sums:
            return None
        totals = ranks.total(torch.stack(list(self._sums.values())).to(device)).cpu()
        totals = totals[totals[:, 0] > 0]
        if not len(totals):
            return None
        rows, hits, kl = totals.unbind(1)
        return Agreement(float((hits / rows).mean()), float((kl / rows).mean()), int(rows.sum()))
