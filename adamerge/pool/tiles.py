"""How a flattened parameter is walked through: in tiles, with one budget per purpose."""

from collections.abc import Iterator

CACHED = 1 << 17  # entries of a tensor that is written: it stays in a second-level cache
READ = 1 << 18  # entries, of all experts together, of tiles that are read for checks, statistics and copies


def tiles(entries: range, size: int) -> Iterator[tuple[int, int]]:
    """Yield the first entry and the end, exclusive, of one tile after the other; the last may be smaller."""
    return ((start, min(start + size, entries.stop)) for start in range(entries.start, entries.stop, size))
