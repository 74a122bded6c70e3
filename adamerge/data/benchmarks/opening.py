"""From a definition and a folder to the images and labels of a split."""

import functools
import importlib
import importlib.util
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from adamerge.data.benchmarks.definitions import DatasetLayout, Definition, definition
from adamerge.data.images import as_seen
from adamerge.data.random_states import permutation
from adamerge.errors import InputError, shorten

log = logging.getLogger(__name__)

_EXTRAS = {"datasets": "hub"}  # package to the extra that brings it, where that is not "data"


class Split(Subset[Any]):
    """One split of a data set: RGB images, and labels in the order of the task's classes.

    Args:
        dataset: Items are (image, label).
        indices: Which of them.
        order: The task's label for each of the data set's.
        first: The data set's first label.
        classes: Names by the task's label.
        where: What it is, for messages.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        indices: Sequence[int],
        order: Sequence[int],
        classes: Sequence[str],
        where: str,
        first: int = 0,
    ) -> None:
        super().__init__(dataset, indices)
        self.classes = list(classes)
        self._order, self._first = order, first
        self._where = where

    def __getitem__(self, index: Any) -> tuple[Any, int]:
        image, label = self.dataset[self.indices[index]]
        number = int(label) - self._first
        if not 0 <= number < len(self._order):
            last = self._first + len(self._order) - 1
            raise InputError(f"{self._where}: expected labels from {self._first} to {last}, found {label}.")
        return image if isinstance(image, Tensor) else as_seen(image).convert("RGB"), self._order[number]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """Return several items; torch's data loaders prefer this."""
        return [self[index] for index in indices]


@dataclass(frozen=True)
class DatasetPlace:
    """Where a data set lies, or would: layout, folder of its paths, missing files by split, number of those present."""

    layout: DatasetLayout
    folder: Path
    missing: Mapping[str, list[Path]]
    present: int


def places(facts: Definition, root: Path) -> list[DatasetPlace]:
    """Return the ways in which a data set could lie below a folder: with a whole split, with something, the others."""
    result = []
    for layout in facts.layouts:
        candidates = [_place(layout, (root / at).resolve() if at != "." else root) for at in layout.at]
        result.append(max(candidates, key=lambda place: place.present))
    return sorted(result, key=lambda place: (all(place.missing.values()), not place.present))


def _place(layout: DatasetLayout, folder: Path) -> DatasetPlace:
    missing, present = {}, 0
    for split in layout.options:
        needed = [folder / path for path in (*layout.needs.get("all", ()), *layout.needs.get(split, ()))]
        missing[split] = [path for path in needed if not path.exists()]
        present += len(needed) - len(missing[split])
    return DatasetPlace(layout, folder, missing, present)


def place_of(facts: Definition, split: str, root: Path) -> DatasetPlace:
    """Return where a split lies.

    Raises:
        InputError: If it is not all there.
    """
    if not root.is_dir():
        raise InputError(
            f"data.root: expected the folder of the data sets, found none at {root}. Name it: data.root=DIR, --root "
            "DIR or the environment variable ADAMERGE_DATA."
        )
    candidates = [place for place in places(facts, root) if split in place.layout.options]
    if not candidates:
        raise InputError(f"{facts.title} ({facts.name}): expected one of {', '.join(facts.splits)}, found {split!r}.")
    for place in candidates:
        if not place.missing[split]:
            return place
    nearest = candidates[0]
    missing = shorten((str(path) for path in nearest.missing[split]), 2)
    state = f"is not complete below {root}: {missing} missing" if nearest.present else f"is not below {root}"
    raise InputError(
        f"{facts.title} ({facts.name}), {split}, {state}. How to get it: adamerge data check {facts.name} "
        f"--root {root}; or name another folder: data.root=DIR."
    )


def open_split(name: str, split: str, root: str | Path) -> Split:
    """Open a split of a data set; where its number of images is not the known one, a warning says so.

    Args:
        name: Name of the data set.
        split: ``train``, ``val`` or ``test``.
        root: Folder of the data sets.

    Raises:
        InputError: If it is not there, a package is missing, or its classes are not the ones known.
    """
    facts = definition(name)
    place = place_of(facts, split, Path(root).expanduser().absolute())
    opened = open_at(facts, place.layout, place.folder, split)
    expected = expected_count(facts, place.layout, split)
    if expected is not None and len(opened) != expected:
        warn_once(
            f"{facts.title} ({name}), {split}: expected {expected} images, found {len(opened)} in {place.folder}."
        )
    return opened


@functools.lru_cache(maxsize=64)
def open_at(facts: Definition, layout: DatasetLayout, folder: Path, split: str) -> Split:
    """Open a split where it lies; kept, because a run is checked before it starts and some files take long.

    Raises:
        InputError: If a package is missing, or the files or classes are not the ones known.
    """
    where = f"{facts.title} ({facts.name}), {split}"
    dataset = _read(layout, folder, split, where)
    parts = divided(dataset, layout, facts) if layout.divide else {}
    indices = parts[split] if parts else range(len(dataset))  # type: ignore[arg-type]
    order = order_of(dataset, layout, facts, where)
    return Split(dataset, indices, order, facts.classes, where, layout.first_label)


def expected_count(facts: Definition, layout: DatasetLayout, split: str) -> int | None:
    """Return how many images a split has, None where that is not known."""
    return layout.counts.get(split, facts.splits[split])


@functools.cache
def warn_once(text: str) -> None:
    """Log a warning, the first time: a run is checked before it starts."""
    log.warning("%s", text)


def _read(layout: DatasetLayout, folder: Path, split: str, where: str) -> Dataset[Any]:
    for package in layout.requires:
        if importlib.util.find_spec(package) is None:
            extra = _EXTRAS.get(package, "data")
            raise InputError(f'{where}: its files need the package {package}: pip install "adamerge[{extra}]".')
    options = dict(layout.options[split])
    options["root"] = folder / str(options.get("root", "."))
    module, _, reader = layout.reader.rpartition(".")
    try:
        dataset: Dataset[Any] = getattr(importlib.import_module(module), reader)(**options)
    except InputError:
        raise
    except Exception as error:  # readers of others, on files that may be anything
        reason = " ".join(str(error).split()) or type(error).__name__
        if "corrupted" in reason:
            reason = "files are missing, or their checksums are not the published ones"
        raise InputError(
            f"{where}: {layout.reader} cannot read {folder}: {reason}. What is complete and how to get the rest: "
            f"adamerge data check."
        ) from error
    return dataset


def divided(dataset: Dataset[Any], layout: DatasetLayout, facts: Definition) -> dict[str, list[int]]:
    """Divide a data set without splits of its own: so many images of each class by a fixed draw, the rest to train.

    Raises:
        InputError: If a class has too few.
    """
    targets: Tensor = torch.as_tensor(dataset.targets)  # type: ignore[attr-defined]
    parts: dict[str, list[int]] = {"train": [], **{split: [] for split in layout.divide}}
    for label in targets.unique().tolist():
        members = (targets == label).nonzero().flatten()
        if len(members) <= sum(layout.divide.values()):
            raise InputError(
                f"{facts.title} ({facts.name}): expected more than {sum(layout.divide.values())} images of class "
                f"{facts.classes[label]!r} to divide, found {len(members)}. Is the data set complete?"
            )
        drawn, start = members[permutation(len(members), f"{facts.name}/{label}")].tolist(), 0
        for split, count in layout.divide.items():
            parts[split] += drawn[start : start + count]
            start += count
        parts["train"] += drawn[start:]
    return {split: sorted(indices) for split, indices in parts.items()}


def order_of(dataset: Dataset[Any], layout: DatasetLayout, facts: Definition, where: str) -> list[int]:
    """Return the task's label for each label of a data set, by the names of its classes.

    Raises:
        InputError: If the classes are others than the definition's.
    """
    if facts.labels == "numbers":
        return list(range(len(facts.classes)))
    classes = getattr(dataset, "classes", None) or []
    names = [_plain(re.sub(layout.strip, "", str(name))) for name in classes]
    wanted = {_plain(name): label for label, name in enumerate(facts.spelled or facts.classes)}
    missing = [name for name in wanted if name not in names]
    unexpected = [name for name in names if name not in wanted]
    if missing or unexpected or len(names) != len(wanted):
        raise InputError(
            f"{where}: expected its {len(wanted)} classes, found {len(names)}: missing {shorten(missing) or 'none'}; "
            f"unexpected {shorten(unexpected) or 'none'}. Are all its folders there, and no others?"
        )
    return [wanted[name] for name in names]


def _plain(name: str) -> str:
    """Return a name without case and punctuation, which folders, files and prompts write differently."""
    return " ".join(re.split(r"[\W_]+", name.lower())).strip()
