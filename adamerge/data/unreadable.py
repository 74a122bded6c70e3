"""Inputs that cannot be read: their names, the limit of their number, and the inputs that stand in for them."""

import logging
import struct
import zlib
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from PIL import Image
from torch.utils.data import Dataset, Subset

from adamerge.errors import InputError
from adamerge.system import ranks

log = logging.getLogger(__name__)

T = TypeVar("T")


class UnreadableError(ValueError):
    """An input that is there and has no usable values."""


# What PIL, and the codecs below it, raise for damaged files; also a file that is gone, or that may not be read.
DAMAGE = (UnreadableError, OSError, EOFError, SyntaxError, struct.error, zlib.error, Image.DecompressionBombError)


class Readable:
    """Account of the items of a data set that cannot be read.

    Args:
        dataset: The data set.
        where: Its name in messages, such as ``data.tasks.cars``.
        limit: Largest share of unreadable items, in [0, 1]; one more ends the run.
        shared: Whether several processes read, which then share the account.
    """

    def __init__(self, dataset: Dataset[Any], where: str = "data", limit: float = 0.0, *, shared: bool = False) -> None:
        self._dataset, self.where, self._limit = dataset, where, limit
        self._bad = torch.zeros(len(cast(Sized, dataset)), dtype=torch.bool)
        if shared:
            self._bad.share_memory_()

    def get(self, index: int, read: Callable[[int], T]) -> T | None:
        """Return ``read(index)``, or None where that cannot be read.

        Raises:
            InputError: If that makes more than the limit.
        """
        if self._bad[index]:
            return None
        try:
            return read(index)
        except DAMAGE as error:
            self._note(index, error)
            return None

    def first(self, index: int, read: Callable[[int], T]) -> tuple[int, T]:
        """Return the first item from ``index`` on, round the end, that can be read, and its index.

        Raises:
            InputError: If there are more unreadable ones than the limit.
        """
        count = len(self._bad)
        for position in (number % count for number in range(index, index + count)):
            item = self.get(position, read)
            if item is not None:
                return position, item
        raise InputError(f"{self.where}: not one of {count} inputs can be read.")

    @property
    def unreadable(self) -> list[int]:
        """Indices of the items that could not be read so far."""
        return cast(list[int], self._bad.nonzero().flatten().tolist())

    @unreadable.setter
    def unreadable(self, indices: list[int]) -> None:
        self._bad[indices] = True

    @property
    def names(self) -> list[str]:
        """Files, or numbers, of the items that could not be read so far."""
        return [item_name(self._dataset, index) for index in self.unreadable]

    def gather(self) -> None:
        """Let all devices know of the items that any of them could not read; all must call."""
        self.unreadable = sorted({index for part in ranks.everyones(self.unreadable) for index in part})

    def _note(self, index: int, error: BaseException) -> None:
        self._bad[index] = True
        count, length, name = len(self.unreadable), len(self._bad), item_name(self._dataset, index)
        reason = " ".join(str(error).split()) or type(error).__name__
        if count > self._limit * length:
            raise InputError(
                f"{self.where}: {count} of {length} inputs cannot be read, the latest {name} ({reason}); "
                f"data.max_unreadable allows a share of {self._limit:g}. Mend or remove them, or raise it."
            ) from error
        log.warning("%s: %s cannot be read (%s) and is left out, %d so far", self.where, name, reason, count)


def in_whole(dataset: Dataset[Any], index: int) -> tuple[Dataset[Any], int]:
    """Return the data set that a chain of subsets is of, and an item's number in it."""
    while isinstance(dataset, Subset):
        index, dataset = int(dataset.indices[index]), dataset.dataset
    return dataset, index


def listed_files(dataset: Dataset[Any]) -> list[Path]:
    """Return the files that a data set lists, item by item, as torchvision's folders do; [] where it lists none."""
    for attribute in ("samples", "_samples", "imgs", "_image_files", "_images"):
        entries = getattr(dataset, attribute, None)
        if isinstance(entries, (list, tuple)):
            files = [entry[0] if isinstance(entry, tuple) else entry for entry in entries]
            return [Path(file) for file in files] if all(isinstance(file, (str, Path)) for file in files) else []
    return []


def item_name(dataset: Dataset[Any], index: int) -> str:
    """Return the file of an item where the data set tells, else its number."""
    dataset, index = in_whole(dataset, index)
    name = getattr(dataset, "item_name", None)  # of texts, many of which are in one file
    if callable(name):
        return str(name(index))
    files = listed_files(dataset)
    return str(files[index]) if index < len(files) else f"input {index}"
