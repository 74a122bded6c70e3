"""Which data sets are there, and whether they are complete."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from adamerge.data.benchmarks.definitions import Definition, definition
from adamerge.data.benchmarks.opening import DatasetPlace, Split, expected_count, open_at, place_of, places
from adamerge.data.unreadable import listed_files
from adamerge.errors import InputError, shorten


@dataclass(frozen=True)
class SplitReport:
    """One split: number of images expected (None: not known) and found (None: not there), and what is wrong."""

    expected: int | None
    found: int | None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class DatasetReport:
    """One data set.

    Attributes:
        name: Name of the data set.
        state: ``complete``, ``incomplete`` (a split or some images are missing), ``wrong`` or ``missing``.
        layout: How it lies on disk.
        folder: Where.
        splits: By name.
    """

    name: str
    state: str
    layout: str | None = None
    folder: Path | None = None
    splits: Mapping[str, SplitReport] = field(default_factory=dict)

    @property
    def problems(self) -> list[str]:
        """All that is wrong, split by split, each once."""
        return list(dict.fromkeys(problem for split in self.splits.values() for problem in split.problems))

    def as_json(self) -> dict[str, Any]:
        """Return the report, ready for JSON."""
        return {**asdict(self), "folder": None if self.folder is None else str(self.folder)}


def check(name: str, root: Path, sample: int | None = 20) -> DatasetReport:
    """Look whether a data set is there, has all its images, and can be read.

    Args:
        name: Name of the data set.
        root: Folder of the data sets.
        sample: Images of each split to decode, spread over it; None for all.
    """
    facts = definition(name)
    candidates = places(facts, root)
    if not root.is_dir() or not candidates[0].present:
        return DatasetReport(name, "missing")
    place_by_split: dict[str, DatasetPlace] = {}
    for split in facts.splits:
        try:
            place_by_split[split] = place_of(facts, split, root)
        except InputError:
            continue
    place = next(iter(place_by_split.values()), candidates[0])
    splits = {split: _split(facts, place_by_split.get(split), place, split, sample) for split in facts.splits}
    wrong = [report for report in splits.values() if report.problems and report.found is not None]
    absent = [report for report in splits.values() if report.found is None]
    state = "wrong" if wrong else "incomplete" if absent else "complete"
    return DatasetReport(name, state, place.layout.title, place.folder, splits)


def _split(
    facts: Definition, place: DatasetPlace | None, nearest: DatasetPlace, split: str, sample: int | None
) -> SplitReport:
    if place is None:
        missing = nearest.missing.get(split)
        listed = shorten((str(path) for path in missing), 3) if missing else "not part of this copy"
        return SplitReport(facts.splits[split], None, (f"{split}: {listed}{' missing' if missing else ''}",))
    expected = expected_count(facts, place.layout, split)
    try:
        images = open_at(facts, place.layout, place.folder, split)
    except InputError as error:
        return SplitReport(expected, 0, (str(error),))
    problems = []
    if expected is not None and len(images) != expected:
        problems.append(f"{split}: expected {expected} images, found {len(images)}")
    problems += _absent_files(images, split)
    problems += _unreadable(images, split, sample)
    return SplitReport(expected, len(images), tuple(problems))


def _absent_files(images: Split, split: str) -> list[str]:
    """Say how many of the files that a data set lists are not there."""
    paths = listed_files(images.dataset)
    absent = [path for path in paths if not path.is_file()]
    return [f"{split}: {len(absent)} of {len(paths)} files missing, the first {absent[0]}"] if absent else []


def _unreadable(images: Split, split: str, sample: int | None) -> list[str]:
    """Say how many images of a sample cannot be decoded, or have a label out of range."""
    count = len(images) if sample is None else min(sample, len(images))
    chosen = sorted({position * len(images) // count for position in range(count)})
    bad: list[str] = []
    for index in chosen:
        try:
            image, _ = images[index]
            image.load()
        except Exception as error:  # decoders raise what they like
            bad.append(f"number {index} ({' '.join(str(error).split()) or type(error).__name__})")
    return [f"{split}: {len(bad)} of {len(chosen)} images looked at cannot be read, first {bad[0]}"] if bad else []


def how_to_get(facts: Definition, root: Path) -> Sequence[str]:
    """Return what a person has to do to have a data set, one step a line."""
    lines = []
    if facts.torchvision or facts.get:
        size = ", all but the images" if facts.get and facts.hub and not _has_images(facts) else f", {facts.size}"
        lines.append(f"adamerge data get {facts.name} --root {root}   (from its authors{size})")
    if facts.hub:
        lines.append(f"adamerge data get {facts.name} --hub --root {root}   (the copy {facts.hub} at the Hub)")
    if facts.manual:
        lines.append(f"by hand, below {root}: {facts.manual}")
    lines.append(f"homepage: {facts.homepage}   licence: {facts.licence}")
    return lines


def _has_images(facts: Definition) -> bool:
    """Whether the files to fetch are more than lists."""
    return any(not download.url.endswith(".txt") for download in facts.get)
