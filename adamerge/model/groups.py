"""Groups: which entries of which parameter share one merging coefficient.

Legend: n entries in a parameter, G groups in all. Every granularity is written as segments: a
contiguous run of ``outer * groups * inner`` entries, read as a 3-D block of that shape, whose
entries ``[:, k, :]`` share group ``first + k``. One group is (1, 1, n); rows are (1, rows, n / rows);
columns are (rows, columns, n / (rows * columns)). Singular directions, to each of which all entries belong, are the
groups of one segment (1, 1, n) that says how many they are. The engine knows nothing else.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

Shapes = Mapping[str, tuple[int, ...]]


class Segment(NamedTuple):
    """Entries ``start : start + outer * groups * inner`` of a flattened parameter.

    Where ``directions`` is not 0, outer and groups are 1, and group ``first + k`` is the k-th singular direction of
    each expert's task vector.
    """

    start: int
    outer: int
    groups: int
    inner: int
    first: int
    directions: int = 0

    @property
    def span(self) -> int:
        """Number of groups, of entries or of directions."""
        return self.directions or self.groups

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
            name: [segment.first + at for segment in segments for at in range(segment.span)]
            for name, segments in self.segments.items()
        }

    @property
    def directions(self) -> dict[str, int]:
        """Parameter name to its number of singular directions, where these are its groups."""
        return {name: s[0].directions for name, s in self.segments.items() if s and s[0].directions}

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


def names_of(index: GroupIndex) -> Iterable[str]:
    """Yield one name per group: the label, or ``label[i]`` where a label has several groups."""
    for label, (_, count) in index.labels.items():
        yield from ([label] if count == 1 else (f"{label}[{i}]" for i in range(count)))


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
        yield Segment(at - entries.start, count, groups, inner, segment.first + group, segment.directions)
        at += count * groups * inner
