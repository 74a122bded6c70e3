"""The built-in granularities: from names and shapes to groups, see :mod:`adamerge.model.groups`."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from adamerge.errors import InputError, check_choice, check_number, did_you_mean
from adamerge.model.groups import Granularity, GroupIndex, Segment, Shapes
from adamerge.pool.headers import Headers
from adamerge.pool.low_rank import Factors, matrix_shape
from adamerge.pool.pool import ExpertPool
from adamerge.system.patterns import search_all
from adamerge.transforms.depth import BLOCK_PATTERN, blocks_of

log = logging.getLogger(__name__)
_ROUNDING = 1e-4  # of a squared norm


@dataclass(frozen=True)
class TaskWise:
    """One coefficient per expert (AdaMerging's task-wise; task arithmetic), G = 1."""

    def __call__(self, shapes: Shapes) -> GroupIndex:
        """Return one group for all."""
        return _shared(shapes, lambda name: "all")


@dataclass(frozen=True)
class Layer:
    """One coefficient per expert and parameter tensor: what AdaMerging calls layer-wise."""

    def __call__(self, shapes: Shapes) -> GroupIndex:
        """Return one group per parameter tensor."""
        return _per_parameter(shapes, lambda shape: (1, 1, math.prod(shape)))


@dataclass(frozen=True)
class Row:
    """One coefficient per expert and index of dimension 0 of every tensor.

    Dimension 0 is the output neuron of Linear and Conv weights, and the input of open_clip's raw
    ``proj``; a 1-D tensor gets one coefficient per entry.
    """

    def __call__(self, shapes: Shapes) -> GroupIndex:
        """Return one group per index of dimension 0."""
        return _per_parameter(shapes, lambda shape: (1, shape[0], math.prod(shape[1:])) if shape else (1, 1, 1))


@dataclass(frozen=True)
class Column:
    """One coefficient per expert and index of dimension 1 (input feature) of every tensor.

    A tensor with fewer than two dimensions gets one coefficient.
    """

    def __call__(self, shapes: Shapes) -> GroupIndex:
        """Return one group per index of dimension 1."""
        return _per_parameter(
            shapes,
            lambda shape: (shape[0], shape[1], math.prod(shape[2:])) if len(shape) > 1 else (1, 1, math.prod(shape)),
        )


@dataclass(frozen=True)
class Block:
    """One coefficient per expert and transformer block (or stage), the rest in ``stem``.

    Args:
        pattern: Regular expression; parameters whose names share its first match are one block.
            The default takes everything up to the first number: ``transformer.resblocks.3``.
    """

    pattern: str = BLOCK_PATTERN

    def __call__(self, shapes: Shapes) -> GroupIndex:
        """Return one group per block."""
        blocks = blocks_of(shapes, self.pattern, "granularity.pattern")
        return _shared(shapes, lambda name: blocks.get(name, "stem"))


@dataclass(frozen=True)
class Pattern:
    """One coefficient per expert and group of the user's own.

    Args:
        groups: Group name to regular expression; the first that matches (``re.search``) a
            parameter's name decides. Parameters that match none form the group ``rest``.
    """

    groups: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, shapes: Shapes) -> GroupIndex:
        """Return one group per pattern that matches something.

        Raises:
            InputError: If a pattern matches no parameter (a misspelt one would go unnoticed).
        """
        if not isinstance(self.groups, Mapping):
            raise InputError(f"granularity.groups: expected group name to pattern, found {self.groups!r}.")
        options = {group: f"granularity.groups[{group!r}]" for group in self.groups}
        found = search_all({options[group]: pattern for group, pattern in self.groups.items()}, shapes)
        chosen = {name: next((group for group in options if name in found[options[group]]), "rest") for name in shapes}
        for group in options:
            if group not in chosen.values():
                raise InputError(
                    f"granularity.groups[{group!r}]: the pattern {self.groups[group]!r} decides for no parameter. "
                    f"Names look like {next(iter(shapes), None)!r}."
                )
        return _shared(shapes, chosen.__getitem__)


@dataclass(frozen=True)
class Chunk:
    """Several coefficients per expert and tensor: contiguous pieces of the flattened tensor.

    Args:
        pieces: Number of pieces of every tensor, or parameter name to number. A tensor with fewer
            entries gets one piece per entry; 0 pieces freezes the tensor at the initial value.
        default: Pieces of tensors that the mapping does not name.

    Reference:
        Expert Merging++ (arXiv:2509.25712), chunk-wise coefficients; as its released code has them, by hand. For
        numbers that follow from importance see :class:`adamerge.model.refinement.ImportanceChunks`.
    """

    pieces: int | Mapping[str, int] = 4
    default: int = 1

    def __call__(self, shapes: Shapes) -> GroupIndex:
        """Return the groups of the pieces; sizes of pieces differ by at most one entry.

        Raises:
            InputError: If a number is negative or the mapping names no such parameter.
        """
        self._check(shapes)
        segments, labels, frozen, first = {}, {}, [], 0
        for name, shape in shapes.items():
            entries = math.prod(shape)
            wanted = self.pieces if isinstance(self.pieces, int) else self.pieces.get(name, self.default)
            count = max(1, min(wanted, entries))
            size, longer = divmod(entries, count)
            segments[name] = tuple(
                Segment(start, 1, groups, length, first + offset)
                for start, groups, length, offset in (
                    (0, longer, size + 1, 0),
                    (longer * (size + 1), count - longer, size, longer),
                )
                if groups
            )
            if wanted == 0:
                frozen.append(first)
            labels[name] = (first, count)
            first += count
        return GroupIndex(segments, labels, first, tuple(frozen))

    def _check(self, shapes: Shapes) -> None:
        by_name = self.pieces if isinstance(self.pieces, Mapping) else {}
        common = {"default": self.default} if isinstance(self.pieces, Mapping) else {"all": self.pieces}
        for name, number in {**by_name, **common}.items():
            check_number(f"granularity.pieces, of {name!r}", number, 0, whole=True)
        unknown = [name for name in by_name if name not in shapes]
        if unknown:
            raise InputError(f"granularity.pieces names no parameter {unknown[0]!r}.{did_you_mean(unknown[0], shapes)}")


@dataclass(frozen=True)
class Rank:
    r"""One coefficient per expert and singular direction of its change of every tensor.

    :math:`\tau_e = \sum_r u_{e,r} v_{e,r}^T`, the strongest first, of a tensor seen as a matrix of ``shape[0]`` rows; a
    vector or a scalar gets one coefficient, as in :class:`Layer`. LoRA experts have as many directions as their ranks,
    whatever the product was factored into; others have min(rows, columns), and take time and memory to decompose. An
    expert that has fewer directions than another has coefficients without effect: they keep their initial value.

    Args:
        ranks: Most directions of a tensor; None for all, which is exact. What is left out is not merged, and warned of.

    Reference:
        AdaRank (arXiv:2503.22178), which learns which directions to keep; here their coefficients are continuous.
    """

    ranks: int | None = None

    def __post_init__(self) -> None:
        if self.ranks is not None:
            check_number("granularity.ranks", self.ranks, 1, whole=True)

    def __call__(self, shapes: Shapes) -> GroupIndex:
        """Return the groups of experts that are no products, as whole checkpoints are."""
        return self._index(shapes, {})

    def of(self, pool: ExpertPool) -> GroupIndex:
        """Return the groups of a pool's experts; their directions are found here, and kept in the pool."""
        index = self.groups(pool)
        kept = {name: pool.factors(name, count) for name, count in index.directions.items()}
        if self.ranks is not None:
            _tell_kept({name: f for name, f in kept.items() if f is not None}, pool)
        return index

    def groups(self, pool: ExpertPool) -> GroupIndex:
        """Return the groups alone; no direction is looked for."""
        factors = {name: pool.factors(name) for name in pool.names}
        return self._index(pool.shapes, {name: max(f.ranks) for name, f in factors.items() if f is not None})

    def _index(self, shapes: Shapes, ranks: Mapping[str, int]) -> GroupIndex:
        segments, labels, first = {}, {}, 0
        for name, shape in shapes.items():
            most = min(matrix_shape(shape))
            count = max(1, min(most, ranks.get(name, most), self.ranks or most))
            segments[name] = (Segment(0, 1, 1, math.prod(shape), first, count if most > 1 else 0),)
            labels[name] = (first, count)
            first += count
        return GroupIndex(segments, labels, first)


def _tell_kept(kept: Mapping[str, Factors], pool: ExpertPool) -> None:
    """Warn of what leading directions leave out of task vectors."""
    squares = {name: sum(expert.squared_norm for expert in factors.experts) for name, factors in kept.items()}
    whole = {name: float(pool.norms[name].double().square().sum()) for name in kept}
    if kept and sum(squares.values()) < (1 - _ROUNDING) * sum(whole.values()):
        least = min(kept, key=lambda name: squares[name] / whole[name])
        shares = (sum(squares.values()) / sum(whole.values()), squares[least] / whole[least])
        log.warning(
            "granularity.ranks: the directions keep %.1f %% of the norm of the task vectors, and of %r, the least, "
            "%.1f %%; what they leave out is not merged. Raise granularity.ranks, or leave it out for all of them.",
            100 * shares[0] ** 0.5, least, 100 * shares[1] ** 0.5,
        )  # fmt: skip


BY_NAME: dict[str, Callable[[], Granularity]] = {
    "task": TaskWise,
    "block": Block,
    "layer": Layer,
    "chunk": Chunk,
    "row": Row,
    "column": Column,
    "rank": Rank,
}


def index_of(granularity: Granularity, pool: ExpertPool | Headers) -> GroupIndex:
    """Return the groups of a pool, or as much of them as its headers tell."""
    if isinstance(granularity, Rank) and isinstance(pool, ExpertPool):
        return granularity.of(pool)
    return granularity(pool.shapes)


def by_name(name: str) -> Granularity:
    """Return a built-in granularity with its defaults.

    >>> by_name("layer")({"w": (2, 3)}).size
    1
    """
    check_choice("granularity", name, list(BY_NAME))
    return BY_NAME[name]()


def _shared(shapes: Shapes, group_of: Callable[[str], str]) -> GroupIndex:
    """One group per distinct value of ``group_of(name)``, numbered in order of appearance."""
    numbers: dict[str, int] = {}
    segments = {}
    for name, shape in shapes.items():
        group = numbers.setdefault(group_of(name), len(numbers))
        segments[name] = (Segment(0, 1, 1, math.prod(shape), group),)
    return GroupIndex(segments, {label: (number, 1) for label, number in numbers.items()}, len(numbers))


def _per_parameter(shapes: Shapes, block: Callable[[tuple[int, ...]], tuple[int, int, int]]) -> GroupIndex:
    """One segment per parameter, of the block shape (outer, groups, inner) that ``block`` returns."""
    segments, labels, first = {}, {}, 0
    for name, shape in shapes.items():
        outer, groups, inner = block(tuple(shape))
        segments[name] = (Segment(0, outer, groups, inner, first),)
        labels[name] = (first, groups)
        first += groups
    return GroupIndex(segments, labels, first)
