"""Data sets as streams and scores see them: inputs without labels and their positions, or inputs with labels."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from adamerge.data.batch import Inputs, TaskBatch
from adamerge.data.images import as_seen
from adamerge.data.texts import Text
from adamerge.data.unreadable import Readable, UnreadableError, item_name
from adamerge.data.views import Views
from adamerge.errors import InputError

NO_LABEL = -1  # of a text that is scored without


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


class MappingCache:
    """Inputs that are mappings, such as of token ids, by position, in the memory of one process.

    Args:
        positions: Those that are kept.
    """

    def __init__(self, positions: Sequence[int]) -> None:
        self._positions = positions if isinstance(positions, range) else frozenset(positions)
        self._inputs: dict[int, Mapping[str, Tensor]] = {}

    def get(self, position: int) -> Mapping[str, Tensor] | None:
        """Return the input, or None where it is not kept."""
        return self._inputs.get(position)

    def put(self, position: int, inputs: Inputs) -> None:
        """Keep an input, if it can be kept."""
        if position in self._positions and isinstance(inputs, Mapping):
            self._inputs[position] = inputs


class Unlabeled(Dataset[TaskBatch]):
    """A dataset without its labels: items are (input, position).

    Args:
        dataset: Items are inputs, or tuples that begin with the input.
        preprocess: Applied to inputs that are not tensors, or mappings of tensors, yet (PIL images, texts).
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
        preprocess: Callable[[Any], Inputs] | None = None,
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
        self.cache: InputCache | MappingCache | None = None
        self.readable = readable or Readable(dataset)
        self._preprocess = preprocess
        self._first = first
        self._views = views
        self._key = key

    def __len__(self) -> int:
        return length_of(self.source) * (self._views.count if self._views else 1)

    def __getitem__(self, index: int) -> TaskBatch:
        inputs: Inputs
        if self._views is None:
            position, inputs = self.readable.first(index, self._input)
        else:
            position, inputs = index, self._views(self._readable_input, length_of(self.source), index, self._key)
        return TaskBatch(inputs, torch.tensor(self._first + position))

    def numbers(self, positions: Sequence[int]) -> Sequence[int]:
        """Return the numbers of the items in the data set that inputs at these positions are made of."""
        count = length_of(self.source)
        if self._views is None:
            return positions
        return range(count) if self._views.mix else sorted({position % count for position in positions})

    def _readable_input(self, number: int) -> Inputs:
        """Return an item's input, or the one that stands in for it."""
        return self.readable.first(number, self._input)[1]

    def _input(self, number: int) -> Inputs:
        """Return an item's input, from the cache where that has it."""
        inputs: Inputs | None = None if self.cache is None else self.cache.get(number)
        if inputs is None:
            inputs = self.load(number)
            if self.cache is not None:
                self.cache.put(number, inputs)  # type: ignore[arg-type]  # each kind of cache keeps its own kind
        return inputs

    def load(self, number: int) -> Inputs:
        """Return an item's input from the data set itself."""
        return input_of(split_item(self.source[number])[0], self._preprocess)


class Labelled(Dataset[tuple[Inputs, Tensor] | None]):
    """A dataset with its labels, for evaluation only: items are (input, label), None where one cannot be read."""

    def __init__(
        self,
        dataset: Dataset[Any],
        preprocess: Callable[[Any], Inputs] | None = None,
        readable: Readable | None = None,
        classes: int | None = None,
    ) -> None:
        self.source = dataset
        self._preprocess = preprocess
        self._classes = classes
        self.readable = readable or Readable(dataset)

    def changed(self, change: Callable[[Dataset[Any]], Dataset[Any]]) -> "Labelled":
        """Return the same items, labels and account of unreadable ones, with a change to the data set."""
        return Labelled(change(self.source), self._preprocess, self.readable, self._classes)

    def __len__(self) -> int:
        return length_of(self.source)

    def __getitem__(self, index: int) -> tuple[Inputs, Tensor] | None:
        return self.readable.get(index, self._get)

    def _get(self, index: int) -> tuple[Inputs, Tensor]:
        inputs, label = split_item(self.source[index])
        try:
            number = NO_LABEL if label is None and isinstance(inputs, Text) else class_number(label, self._classes)
        except InputError as error:
            item = f"item {index} ({item_name(self.source, index)})"
            raise InputError(f"{self.readable.where}: {item}: {error}") from error
        return input_of(inputs, self._preprocess), torch.tensor(number)


def split_item(item: Any) -> tuple[Any, Any]:
    """Take an item apart into input and label (None where it has none).

    Raises:
        InputError: If it is a mapping.
    """
    if isinstance(item, (tuple, list)):
        return item[0], item[1] if len(item) > 1 else None
    if isinstance(item, Mapping):
        raise InputError(
            f"a mapping with the keys {', '.join(map(str, item))}, which is ambiguous. Wrap the data set so that items "
            "are (input, label) or the input alone."
        )
    return item, None


def class_number(label: Any, classes: int | None = None) -> int:
    """Return a label as the number of its class.

    Args:
        label: A whole number, also as NumPy's or a tensor without axes.
        classes: How many there are; None where that is not known.

    Raises:
        InputError: If it is anything else, or the number of no class.
    """
    size = label.numel() if isinstance(label, Tensor) else label.size if isinstance(label, np.ndarray) else 1
    limit = "" if classes is None else f" from 0 to {classes - 1}"
    remedy = "Give items (input, label), or a target_transform that returns the number."
    if label is None:
        raise InputError(f"expected a label to score by, found none. {remedy}")
    if isinstance(label, (list, tuple, Mapping)) or size > 1:
        raise InputError(f"expected the number of a class as label, found {_shown(label)}. For one-hot labels: argmax.")
    try:
        number = int(label)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"expected the number of a class{limit} as label, found {label!r}. {remedy}") from None
    if isinstance(label, str) or number != float(label):
        raise InputError(f"expected the number of a class{limit} as label, found {label!r}. {remedy}")
    if number < 0 or (classes is not None and number >= classes):
        begins = " Do they begin with 1? Subtract 1." if number == classes else " Are all classes named?"
        raise InputError(f"expected the number of a class{limit} as label, found {number}.{begins}")
    return number


def _shown(label: Any) -> str:
    shape = getattr(label, "shape", None)
    return f"{type(label).__name__} of {len(label)} entries" if shape is None else f"numbers of shape {tuple(shape)}"


def input_of(item: Any, preprocess: Callable[[Any], Inputs] | None) -> Inputs:
    """Return an item as an input: tensors and mappings of tensors as they are, all else through the preprocessing.

    Images go upright and with 8 bits into the preprocessing.

    Raises:
        InputError: If it can become none.
        UnreadableError: If it has values that are not finite.
    """
    inputs: Inputs = item if is_input(item) else _preprocessed(item, preprocess)
    for tensor in (inputs,) if isinstance(inputs, Tensor) else inputs.values():
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise UnreadableError("NaN or infinite values")
    return inputs


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; by the sum first, which is a tenth of the work and finite only if they all are."""
    return math.isfinite(tensor.sum()) or bool(tensor.isfinite().all())


def is_input(item: Any) -> bool:
    """Whether an item is a tensor or a mapping of names to tensors."""
    if isinstance(item, Mapping):
        return bool(item) and all(isinstance(k, str) and isinstance(tensor, Tensor) for k, tensor in item.items())
    return isinstance(item, Tensor)


def _preprocessed(item: Any, preprocess: Callable[[Any], Inputs] | None) -> Inputs:
    kind = type(item).__name__
    remedy = "Give PIL images, or a transform that ends in a float32 tensor (torch.from_numpy for NumPy arrays)."
    if isinstance(item, np.ndarray):  # which torchvision's transforms pass on as they are
        raise InputError(f"expected a tensor or a PIL image, found a NumPy array of shape {item.shape}. {remedy}")
    if preprocess is None:
        raise InputError(f"expected a tensor, found {kind}, and the backbone has no preprocessing. {remedy}")
    if isinstance(item, Image.Image):
        item = as_seen(item)
    try:
        inputs = preprocess(item)
    except (TypeError, AttributeError) as error:
        raise InputError(f"found {kind}, which the preprocessing cannot take ({error}). {remedy}") from error
    if not is_input(inputs):
        raise InputError(
            f"expected a tensor, or a mapping of names to tensors, from the preprocessing, found "
            f"{type(inputs).__name__}. {remedy}"
        )
    return inputs


def length_of(dataset: Dataset[Any], where: str = "data") -> int:
    """Return the length of a map-style data set, or refuse an iterable one; ``where`` names the option."""
    try:
        return len(dataset)  # type: ignore[arg-type]
    except TypeError as error:
        raise InputError(
            f"{where}: {type(dataset).__name__} has no length. Expected a map-style data set with __len__ and "
            "__getitem__; collect an iterable one into a list."
        ) from error
