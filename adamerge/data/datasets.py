"""Data sets as streams and scores see them: images without labels and their positions, or images with labels."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from adamerge.data.batch import TaskBatch
from adamerge.data.unreadable import Readable
from adamerge.data.views import Views
from adamerge.errors import InputError


class InputCache:
    """Inputs by position, decoded once by whichever process needs them first.

    Args:
        positions: Those that are kept.
        example: An input (*S); inputs of another shape or dtype are not kept.
        shared: Whether processes that load data shall see one another's inputs.
    """

    def __init__(self, positions: Sequence[int], example: Tensor, shared: bool) -> None:
        shape = torch.Size((len(positions), *example.shape))
        if shared:  # not share_memory_(), which would fill the memory by copying
            storage = torch.UntypedStorage._new_shared(max(1, shape.numel() * example.element_size()))
            strides = torch.empty(shape, device="meta").stride()
            self._rows = torch.empty(0, dtype=example.dtype).set_(storage, 0, shape, strides)
        else:
            self._rows = torch.empty(shape, dtype=example.dtype)
        self._filled = torch.zeros(len(positions), dtype=torch.bool)
        if shared:
            self._filled.share_memory_()
        self._row_of = {position: row for row, position in enumerate(positions)}

    def get(self, position: int) -> Tensor | None:
        """Return the input, or None where it is not kept."""
        row = self._row_of.get(position)
        return self._rows[row].clone() if row is not None and self._filled[row] else None

    def put(self, position: int, inputs: Tensor) -> None:
        """Keep an input, if it can be kept."""
        row = self._row_of.get(position)
        if row is not None and (inputs.shape, inputs.dtype) == (self._rows.shape[1:], self._rows.dtype):
            self._rows[row] = inputs
            self._filled[row] = True  # last: whoever sees it finds the whole input


class Unlabeled(Dataset[TaskBatch]):
    """A dataset without its labels: items are (input, position).

    Args:
        dataset: Items are inputs, or tuples that begin with the input.
        preprocess: Applied to inputs that are not tensors yet (PIL images).
        first: Position of the first item, where several data sets make up a stream.
        readable: Keeps account of items that cannot be read; by default the first such ends the run.
        views: Views of the images to give instead; item i is a view of image i modulo their number.
        key: Fixes, with the position, what is random in the views.

    Attributes:
        source: The data set itself, for the baselines that are marked as using labels.
        readable: As given. In the place of an item that cannot be read stands the next one that can, with that one's
            position, so that the order of the others, and what experts say of a position, do not depend on it.
            With views the same image stands in, and its view has the random numbers and position of the one left out.
        cache: Keeps inputs that have been loaded; None for none.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        preprocess: Callable[[Any], Tensor] | None = None,
        first: int = 0,
        readable: Readable | None = None,
        views: Views | None = None,
        key: str = "",
    ) -> None:
        if views is not None and not isinstance(views, Views):
            raise InputError(
                f"data.views: expected adamerge.data.views.Views (with _target_) or null, found {views!r}."
            )
        self.source = dataset
        self.cache: InputCache | None = None
        self.readable = readable or Readable(dataset)
        self._preprocess = preprocess
        self._first = first
        self._views = views
        self._key = key

    def __len__(self) -> int:
        return length_of(self.source) * (self._views.count if self._views else 1)

    def __getitem__(self, index: int) -> TaskBatch:
        if self._views is None:
            position, inputs = self.readable.first(index, self._image)
        else:
            position, inputs = index, self._views(self._readable_image, length_of(self.source), index, self._key)
        return TaskBatch(inputs, torch.tensor(self._first + position))

    def images(self, positions: Sequence[int]) -> Sequence[int]:
        """Return the numbers of the images in the data set that inputs at these positions are made of."""
        count = length_of(self.source)
        if self._views is None:
            return positions
        return range(count) if self._views.mix else sorted({position % count for position in positions})

    def _readable_image(self, number: int) -> Tensor:
        """Return an image, or what stands in for it."""
        return self.readable.first(number, self._image)[1]

    def _image(self, number: int) -> Tensor:
        """Return an image, from the cache where that has it."""
        inputs = None if self.cache is None else self.cache.get(number)
        if inputs is None:
            inputs = self.load(number)
            if self.cache is not None:
                self.cache.put(number, inputs)
        return inputs

    def load(self, number: int) -> Tensor:
        """Return an image from the data set itself."""
        return _to_tensor(_split_item(self.source[number])[0], self._preprocess)


class Labelled(Dataset[tuple[Tensor, Tensor] | None]):
    """A dataset with its labels, for evaluation only: items are (input, label), None where one cannot be read."""

    def __init__(
        self,
        dataset: Dataset[Any],
        preprocess: Callable[[Any], Tensor] | None = None,
        readable: Readable | None = None,
    ) -> None:
        self._dataset = dataset
        self._preprocess = preprocess
        self.readable = readable or Readable(dataset)

    def changed(self, change: Callable[[Dataset[Any]], Dataset[Any]]) -> "Labelled":
        """Return the same images, labels and account of what cannot be read, with a change to the data set."""
        return Labelled(change(self._dataset), self._preprocess, self.readable)

    def __len__(self) -> int:
        return length_of(self._dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | None:
        return self.readable.get(index, self._get)

    def _get(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, label = _split_item(self._dataset[index])
        if label is None:
            raise InputError(
                f"Evaluation needs labels: item {index} of {self._dataset!r} is not a pair (input, label)."
            )
        return _to_tensor(inputs, self._preprocess), torch.tensor(int(label))


def _split_item(item: Any) -> tuple[Any, Any]:
    """Take an item apart into input and label (None where it has none)."""
    if isinstance(item, (tuple, list)):
        return item[0], item[1] if len(item) > 1 else None
    if isinstance(item, Mapping):
        raise InputError(
            f"Data sets of mappings (keys {', '.join(map(str, item))}) are ambiguous: wrap yours so that items are "
            "(input, label) or the input alone."
        )
    return item, None


def _to_tensor(inputs: Any, preprocess: Callable[[Any], Tensor] | None) -> Tensor:
    if isinstance(inputs, Tensor):
        return inputs
    if preprocess is None:
        raise InputError(
            f"Data sets must give tensors, found {type(inputs).__name__}, and the backbone has no preprocessing. "
            "Give the data set a transform that ends in a tensor."
        )
    return preprocess(inputs)


def length_of(dataset: Dataset[Any], where: str = "data") -> int:
    """Return the length of a map-style data set, or refuse an iterable one; ``where`` names the option."""
    try:
        return len(dataset)  # type: ignore[arg-type]
    except TypeError as error:
        raise InputError(
            f"{where}: {type(dataset).__name__} has no length. Expected a map-style data set with __len__ and "
            "__getitem__; collect an iterable one into a list."
        ) from error
