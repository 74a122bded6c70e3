"""Merges that weight whole task vectors: one number per expert, or per expert and tensor.

Legend: E experts; tau_e task vectors. All parameters that merge are treated alike, none is skipped.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from adamerge.errors import InputError, check_choice, check_number, check_pattern, did_you_mean, shorten
from adamerge.merges import Merged
from adamerge.merges.tensors import average, weighted
from adamerge.model.starts import stock_ratio
from adamerge.pool.pool import ExpertPool
from adamerge.transforms.depth import block_order, blocks_of


@dataclass(frozen=True)
class WeightAverage:
    r"""The plain mean of the experts: :math:`\theta = \theta_0 + \frac1E \sum_e \tau_e`.

    No options; no tensor is skipped. Cost: one pass.

    Reference:
        Wortsman et al., Model soups, arXiv:2203.05482.
    """

    one_pass: ClassVar[bool] = True

    def __call__(self, pool: ExpertPool) -> Merged:
        """Yield names and averages."""
        for name in pool.names:
            yield name, average(pool, name)


@dataclass(frozen=True)
class TaskArithmetic:
    r"""The scaled sum of the task vectors: :math:`\theta = \theta_0 + \lambda \sum_e \tau_e`.

    No tensor is skipped. Cost: one pass. The search for the best coefficient needs labels: it is
    ``adamerge.results.baselines.search_task_arithmetic``.

    Args:
        coefficient: Lambda; 0.3 is usual for up to eight experts, 1 / E is the average.

    Reference:
        Ilharco et al., Task arithmetic, arXiv:2212.04089.
    """

    one_pass: ClassVar[bool] = True

    coefficient: float = 0.3

    def __post_init__(self) -> None:
        check_number("TaskArithmetic.coefficient", self.coefficient, -100, 100)

    def __call__(self, pool: ExpertPool) -> Merged:
        """Yield names and sums."""
        for name in pool.names:
            yield name, weighted(pool, name, [self.coefficient] * len(pool.expert_names))


@dataclass(frozen=True)
class MetricsWeighted:
    r"""The mean of the experts weighted by a score of each: :math:`w_e \propto s_e^p`, :math:`\sum_e w_e = 1`.

    No tensor is skipped. Cost: one pass. Scores that were measured on labelled data bring labels in (``uses_labels``).

    Args:
        scores: Expert name to its score, positive.
        power: p; negative where lower is better (a loss), 0 for the plain average.
        uses_labels: Whether the scores were measured on labelled data, as accuracies are; results are marked so.

    Reference:
        Metrics-weighted averaging, arXiv:2504.18580 weights checkpoints of one run by loss or step; the formula
        here is this package's own, as none is published.
    """

    one_pass: ClassVar[bool] = True

    scores: Mapping[str, float] = field(default_factory=dict)
    power: float = 1.0
    uses_labels: bool = True

    def __post_init__(self) -> None:
        check_number("MetricsWeighted.power", self.power, -1000, 1000)
        check_choice("MetricsWeighted.uses_labels", self.uses_labels, (True, False))
        if not isinstance(self.scores, Mapping):
            raise InputError(f"MetricsWeighted.scores: expected {{expert: score}}, found {self.scores!r}.")
        for name, score in self.scores.items():
            check_number(f"MetricsWeighted.scores.{name}", score, 0, above=True)

    def __call__(self, pool: ExpertPool) -> Merged:
        """Yield names and weighted means."""
        if set(self.scores) != set(pool.expert_names):
            unknown = [name for name in self.scores if name not in pool.expert_names]
            hint = did_you_mean(unknown[0], pool.expert_names) if unknown else ""
            raise InputError(
                f"MetricsWeighted.scores: expected one score for each of {shorten(pool.expert_names)}, found them for "
                f"{shorten(self.scores) or 'none'}.{hint}"
            )
        logs = self.power * torch.tensor([self.scores[name] for name in pool.expert_names], dtype=torch.float64).log()
        weights = logs.softmax(0).tolist()  # in logs, as high powers overflow
        for name in pool.names:
            yield name, weighted(pool, name, weights)


@dataclass(frozen=True)
class LayerSwapping:
    """The bottom and top blocks of one expert around the middle blocks of another.

    What lies outside the blocks (embeddings, final norm, projection) is the outer expert's. Cost: one pass.

    Args:
        outer: Expert of the bottom and the top, and of what lies outside the blocks (a language, in the paper).
        inner: Expert of the middle (a skill).
        bottom: Blocks from below that are the outer expert's.
        top: Blocks from above that are the outer expert's.
        transition: Blocks on the inner side of each border that are the mean of both; the paper averages some
            there, how many is not published.
        blocks: Regular expression; what it matches of a name says which block a parameter is in.

    Reference:
        Bandarkar et al., Layer swapping, arXiv:2410.01335.
    """

    one_pass: ClassVar[bool] = True

    outer: str
    inner: str
    bottom: int = 1
    top: int = 1
    transition: int = 0
    blocks: str = r"^.*?[._]\d+(?=\.)"

    def __post_init__(self) -> None:
        for option in ("bottom", "top", "transition"):
            check_number(f"LayerSwapping.{option}", getattr(self, option), 0, whole=True)
        check_pattern("LayerSwapping.blocks", self.blocks)

    def __call__(self, pool: ExpertPool) -> Merged:
        """Yield names and parameters: the outer expert's, the inner one's, or between them their mean."""
        check_choice("LayerSwapping.outer", self.outer, pool.expert_names)
        check_choice("LayerSwapping.inner", self.inner, pool.expert_names)
        block_of = blocks_of(pool.names, self.blocks, "LayerSwapping.blocks")
        order = {block: number for number, block in enumerate(sorted(set(block_of.values()), key=block_order))}
        if self.bottom + self.top + 2 * self.transition > len(order):
            raise InputError(
                f"LayerSwapping: bottom + top + 2 x transition: expected at most the model's {len(order)} blocks, "
                f"found {self.bottom} + {self.top} + 2 x {self.transition}."
            )
        for name in pool.names:
            share = self._inner_share(order[block_of[name]], len(order)) if name in block_of else 0.0
            weights = [
                share * (expert == self.inner) + (1 - share) * (expert == self.outer) for expert in pool.expert_names
            ]
            yield name, weighted(pool, name, weights)

    def _inner_share(self, block: int, count: int) -> float:
        """How much of a block is the inner expert's."""
        depth = min(block - self.bottom, count - 1 - self.top - block)  # blocks to the nearer border; negative: outside
        return 0.0 if depth < 0 else 0.5 if depth < self.transition else 1.0


@dataclass(frozen=True)
class ModelStock:
    r"""The mean of the experts drawn towards the base, the more the less they agree.

    Per tensor: :math:`\theta = \theta_0 + t \frac1E \sum_e \tau_e` with :math:`t = \frac{E c}{1 + (E-1) c}` and c the
    mean cosine of pairs of task vectors. A negative c counts as 0 (the base's value), our choice, as t
    has a pole at -1 / (E - 1). One expert alone has c = 1. No tensor is skipped. Cost: two passes.

    Args:
        agreement: ``cosine``: c is the mean of the cosines; ``angle``: the cosine of the mean angle.
        per_row: One t for each index of dimension 0 of tensors with two or more dimensions, instead of per tensor.

    Reference:
        Jang et al., Model Stock, arXiv:2403.19522.
    """

    one_pass: ClassVar[bool] = True

    agreement: Literal["cosine", "angle"] = "cosine"
    per_row: bool = False

    def __post_init__(self) -> None:
        check_choice("ModelStock.agreement", self.agreement, ("cosine", "angle"))

    def __call__(self, pool: ExpertPool) -> Merged:
        """Yield names and drawn-in means."""
        for name in pool.names:
            shape = pool.shapes[name]
            rows = shape[0] if self.per_row and len(shape) > 1 else 1
            ratio = stock_ratio(_grams(pool, name, rows), self.agreement).to(pool.base[name])  # (rows,)
            base = pool.base[name].reshape(rows, -1)
            mean = average(pool, name).view(rows, -1) - base
            yield name, (base + ratio[:, None] * mean).view(shape)


def _grams(pool: ExpertPool, name: str, rows: int) -> Tensor:
    """Return the inner products of the task vectors in each row, (rows, E, E) in float64."""
    experts, width = len(pool.expert_names), pool.base[name].numel() // rows
    grams = torch.zeros(rows, experts, experts, dtype=torch.float64, device=pool.device)
    for where, tile in pool.pieces(name):
        for row, part in _parts(where, width):
            piece = tile[:, part].double()
            grams[row] += piece @ piece.T
    return grams


def _parts(where: slice, width: int) -> Sequence[tuple[int, slice]]:
    """Cut a piece of a flattened matrix at its rows; return each row's number and its slice of the piece."""
    cuts = [where.start, *range((where.start // width + 1) * width, where.stop, width), where.stop]
    return [
        (start // width, slice(start - where.start, stop - where.start)) for start, stop in itertools.pairwise(cuts)
    ]
