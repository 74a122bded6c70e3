"""Which entries of which parameter share one merging coefficient.

Legend: n entries in a parameter, G groups in all. Every granularity is written as segments: a
contiguous run of ``outer * groups * inner`` entries, read as a 3-D block of that shape, whose
entries ``[:, k, :]`` share group ``first + k``. One group is (1, 1, n); rows are (1, rows, n / rows);
columns are (rows, columns, n / (rows * columns)). The engine knows nothing else.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from adamerge.errors import InputError, check_choice, check_number, did_you_mean
from adamerge.system.patterns import search_all
from adamerge.transforms.depth import BLOCK_PATTERN, blocks_of

Shapes = Mapping[str, tuple[int, ...]]


class Segment(NamedTuple):
    """Entries ``start : start + outer * groups * inner`` of a flattened parameter."""

    start: int
    outer: int
    groups: int
    inner: int
    first: int

    @property
    def stop(self) -> int:
        """End of the segment, exclusive."""
        return self.start + self.outer * self.groups * self.inner


@dataclass(frozen=True)
class GroupIndex:
    """The groups of a set of parameters.

    Args:
        segments: Parameter name to its segments, which cover it without overlap.
        labels: Name of a run of groups in files (a parameter's name, or a shared group's) to
            ``(first group, number of groups)``.
        size: G, the number of groups.
        frozen: Groups that keep their initial value.
    """

    segments: Mapping[str, tuple[Segment, ...]]
    labels: Mapping[str, tuple[int, int]]
    size: int
    frozen: tuple[int, ...] = ()

    @property
    def groups(self) -> dict[str, list[int]]:
        """Parameter name to the groups it uses, ascending."""
        return {
            name: [segment.first + at for segment in segments for at in range(segment.groups)]
            for name, segments in self.segments.items()
        }

    def part(self, ranges: Mapping[str, range]) -> "GroupIndex":
        """Return the same groups for a part of every parameter.

        Args:
            ranges: Parameter name to the entries of the flattened parameter that the part has, which are its entries
                0, 1, ... there.
        """
        segments = {
            name: tuple(piece for segment in self.segments[name] for piece in _within(segment, entries))
            for name, entries in ranges.items()
        }
        return GroupIndex(segments, self.labels, self.size, self.frozen)


class Granularity(Protocol):
    """Anything that turns names and shapes into groups: see "How to add a granularity"."""

    def __call__(self, shapes: Shapes) -> GroupIndex:
        """Return the groups of the parameters with these names and shapes."""
        ...


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


BY_NAME: dict[str, Callable[[], Granularity]] = {
    "task": TaskWise,
    "block": Block,
    "layer": Layer,
    "chunk": Chunk,
    "row": Row,
    "column": Column,
}


def by_name(name: str) -> Granularity:
    """Return a built-in granularity with its defaults.

    >>> by_name("layer")({"w": (2, 3)}).size
    1
    """
    check_choice("granularity", name, list(BY_NAME))
    return BY_NAME[name]()


def _within(segment: Segment, entries: range) -> Iterator[Segment]:
    """Yield the parts of a segment within a range of entries, at most five, counted from the range's start."""
    at, end = max(segment.start, entries.start), min(segment.stop, entries.stop)
    row = segment.groups * segment.inner
    while at < end:
        inside = (at - segment.start) % row
        group, offset = divmod(inside, segment.inner)
        left = end - at
        if inside == 0 and left >= row:  # whole rows
            count, groups, inner = left // row, segment.groups, segment.inner
        elif offset == 0 and left >= segment.inner:  # whole groups of one row
            count, groups, inner = 1, min(left // segment.inner, segment.groups - group), segment.inner
        else:
            count, groups, inner = 1, 1, min(left, segment.inner - offset)
        yield Segment(at - entries.start, count, groups, inner, segment.first + group)
        at += count * groups * inner


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


def names_of(index: GroupIndex) -> Iterable[str]:
    """Yield one name per group: the label, or ``label[i]`` where a label has several groups."""
    for label, (_, count) in index.labels.items():
        yield from ([label] if count == 1 else (f"{label}[{i}]" for i in range(count)))
