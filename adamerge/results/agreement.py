"""How near a merge is to the experts, without labels.

Legend: N rows that count, C classes, T tasks.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

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


def is_in_doubt(evidence: Mapping[str, Any]) -> bool:
    """Return whether the divergences of start and result differ by no more than their standard error.

    Args:
        evidence: As ``merge.json`` has it, with both measured.
    """
    difference = evidence["result"]["kl"] - evidence["start"]["kl"]
    return bool(abs(difference) <= evidence.get("kl_error", 0.0))  # which files of older versions lack


class Tally:
    """Collects, task by task, how near a merge is to the experts on each row.

    Args:
        tasks: Those that have an expert; the same on all devices.
    """

    def __init__(self, tasks: Iterable[str]) -> None:
        self._parts: dict[str, list[Tensor]] = {task: [] for task in tasks}

    def add(self, task: str, merged: Tensor, expert: Outputs) -> None:
        """Take rows of logits of a merge (N, C) and of its expert, which may be of the likeliest classes alone."""
        answers = expert.rows()
        student, teacher = coarsen(merged, expert.classes), answers.float().log_softmax(-1)
        kl = functional.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
        hits = merged.argmax(-1) == best_classes(expert)
        self._parts[task].append(torch.stack([hits.double(), kl.double()], 1).cpu())

    @property
    def rows(self) -> list[Tensor]:
        """Of each task, 1 where merge and expert agree, and their divergence: (N, 2), those of this device."""
        return [torch.cat([torch.zeros(0, 2).double(), *parts]) for parts in self._parts.values()]

    def result(self, device: torch.device | str = "cpu") -> Agreement | None:
        """Return the means over what all devices have added; None where no task has rows. All devices must call."""
        comparison = Comparison.of(self, self, device)
        return comparison.result if comparison.rows else None


@dataclass(frozen=True)
class Comparison:
    """A start and a result on the same rows; those of several parts of the samples may be added.

    Attributes:
        sums: Over the rows of each task, float64 (T, 7): their number, where start and result agree with the expert,
            the divergences of both, the squares of the differences of these, and where one of both agrees alone.
    """

    sums: Tensor

    @classmethod
    def of(cls, start: Tally, result: Tally, device: torch.device | str = "cpu") -> "Comparison":
        """Compare what all devices have added; all must call."""
        parts = []
        for before, after in zip(start.rows, result.rows, strict=True):
            (hits, kl), (new_hits, new_kl) = before.T, after.T
            columns = [torch.ones_like(kl), hits, new_hits, kl, new_kl, (new_kl - kl).square(), (new_hits - hits).abs()]
            parts.append(torch.stack(columns).sum(1))
        sums = torch.stack(parts) if parts else torch.zeros(0, 7).double()
        return cls(ranks.total(sums.to(device)).cpu())

    def __add__(self, other: "Comparison") -> "Comparison":
        return Comparison(self.sums + other.sums)

    @property
    def rows(self) -> int:
        """Number of rows of all tasks."""
        return int(self.sums[:, 0].sum())

    @property
    def start(self) -> Agreement:
        """How near the start is."""
        return self._agreement(1, 3)

    @property
    def result(self) -> Agreement:
        """How near the result is."""
        return self._agreement(2, 4)

    @property
    def kl_error(self) -> float:
        """Standard error of the difference of the two divergences, if there were none; of paired rows.

        Rows count as independent, so that it is too small where they are the positions of few texts.
        """
        return self._error(5)

    @property
    def is_better(self) -> bool:
        """Whether the divergence is lower, and the agreement by no more than chance explains, if at all.

        That is the standard error of the difference of two shares of paired rows, if there were none: McNemar,
        Psychometrika 12 (1947).
        """
        start, result = self.start, self.result
        chance = self._error(6) + 1e-9  # to a rounding: a row that is lost alone is chance
        return bool(result.kl < start.kl and start.agreement - result.agreement <= chance)

    @property
    def _counted(self) -> Tensor:
        return self.sums[self.sums[:, 0] > 0]

    def _error(self, squares: int) -> float:
        """Return the error of a mean over tasks, of what has these sums of squares over a task's rows, and mean 0."""
        return float((self._counted[:, squares] / self._counted[:, 0].square()).sum().sqrt() / len(self._counted))

    def _agreement(self, hits: int, kl: int) -> Agreement:
        means = (self._counted[:, [hits, kl]] / self._counted[:, :1]).mean(0)
        return Agreement(float(means[0]), float(means[1]), self.rows)
