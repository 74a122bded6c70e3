"""TALL masks: where each expert's information lies in the sum of all; Consensus: where several agree.

Legend: E experts, k entries of a tile.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from adamerge.errors import InputError, check_number
from adamerge.transforms.protocol import Source, TransformFunction, total


def tall_masks(task_vectors: Tensor, threshold: float) -> Tensor:
    """Return TALL masks, bool (E, *S): where ``|tau_e| > threshold * |sum_j tau_j - tau_e|``.

    Args:
        task_vectors: Shape (E, *S).
        threshold: The paper's lambda_t.
    """
    return task_vectors.abs() > threshold * (total(task_vectors) - task_vectors).abs()


@dataclass(frozen=True)
class Consensus:
    r"""Keep the positions that matter to at least ``agree`` experts; zero selfish and useless ones for all.

    :math:`\tau'_e = \tau_e [\#\{j : |\tau_j| > \lambda |\tau_{MT} - \tau_j|\} \ge k]`, with
    :math:`\tau_{MT} = \sum_j \tau_j`. Elementwise, no tensor is skipped. Cost: O(E) per entry.

    Args:
        threshold: lambda >= 0; the paper searches 0.2 to 0.6 per task on validation data, 0.4 is this package's choice.
        agree: k, how many experts must need a position; at most E.

    Reference:
        Wang et al., TALL masks and Consensus Merging, arXiv:2405.07813.
    """

    threshold: float = 0.4
    agree: int = 2
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("transform.threshold", self.threshold, 0)
        check_number("transform.agree", self.agree, 1, whole=True)

    def prepare(self, source: Source) -> TransformFunction:
        """Return the rule.

        Raises:
            InputError: If ``agree`` exceeds the number of experts: nothing would be left.
        """
        if self.agree > len(source.expert_names):
            raise InputError(
                f"transform.agree: expected at most {len(source.expert_names)}, the number of experts, "
                f"found {self.agree}: nothing would be left."
            )

        def rule(name: str, task_vectors: Tensor) -> Tensor:
            count = tall_masks(task_vectors, self.threshold).sum(0)
            return task_vectors.masked_fill(count < self.agree, 0)

        return rule


@dataclass(frozen=True)
class Tall:
    r"""Replace each task vector by its own part of the sum of all.

    :math:`\tau'_e = m_e \sum_j \tau_j`, with the TALL mask m_e. Coefficient 1 for one expert and 0 for the others gives
    the paper's model of that task. Elementwise, no tensor is skipped. Cost: O(E) per entry.

    Args:
        threshold: lambda >= 0, see :class:`Consensus`.

    Reference:
        Wang et al., TALL masks and Consensus Merging, arXiv:2405.07813.
    """

    threshold: float = 0.4
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("transform.threshold", self.threshold, 0)

    def __call__(self, name: str, task_vectors: Tensor) -> Tensor:
        """Return the masked sums."""
        return tall_masks(task_vectors, self.threshold) * total(task_vectors)
