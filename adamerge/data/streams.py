"""Streams of unlabeled batches: what an item is, in which order they come, and how a run resumes among them.

Labels are dropped where data enters. The order of every stream is a function of (seed, task, step) alone.
"""

import contextlib
import random
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from adamerge.data.batch import TaskBatch
from adamerge.data.unreadable import Readable
from adamerge.data.views import Views
from adamerge.errors import InputError


class Store(Protocol):
    """Inputs by position."""

    def get(self, position: int) -> Tensor | None:
        """Return an input, or None."""
        ...

    def put(self, position: int, inputs: Tensor) -> None:
        """Keep an input, or not."""
        ...


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
        self.cache: Store | None = None
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


class StreamLoader(DataLoader[dict[str, TaskBatch]]):
    """A loader of steps that Lightning can resume in the middle of an epoch.

    Args:
        steps: Maps a step's number to its batches.
        length: Steps per epoch.
        position: Returns the number of steps done in this epoch, for checkpoints.
        num_workers: Processes that load data.
        prefetch: Steps that each process loads ahead; without processes, that a thread loads ahead (0: none).
    """

    def __init__(
        self, steps: "Steps", length: int, position: Callable[[], int], num_workers: int = 0, prefetch: int = 0
    ) -> None:
        super().__init__(
            steps, batch_size=None, sampler=_StepSampler(length), num_workers=num_workers,
            persistent_workers=num_workers > 0, pin_memory=torch.cuda.is_available(),
            prefetch_factor=max(1, prefetch) if num_workers else None,
        )  # fmt: skip
        self._current_position = position
        self._ahead = 0 if num_workers else prefetch

    def __iter__(self) -> Any:
        """Return an iterator of steps."""
        batches = super().__iter__()
        return _read_ahead(batches, self._ahead) if self._ahead else batches

    def state_dict(self) -> dict[str, int]:
        """Return the position, counted over all epochs, for Lightning's checkpoint."""
        assert isinstance(self.sampler, _StepSampler)
        return {"position": self.sampler.epoch * self.sampler.length + self._current_position()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Start the next pass at the saved position, in the epoch that it lies in.

        The epoch too, because workers read ahead before Lightning tells it.
        """
        assert isinstance(self.sampler, _StepSampler)
        self.sampler.epoch, self.sampler.start = divmod(state["position"], self.sampler.length)


def _read_ahead(batches: Iterator[dict[str, TaskBatch]], count: int) -> Iterator[dict[str, TaskBatch]]:
    """Yield batches that a thread loads while the ones before them are used: decoding leaves Python's lock."""
    with ThreadPoolExecutor(1, "prefetch") as thread:
        waiting = deque(thread.submit(next, batches, None) for _ in range(count))
        try:
            while (batch := waiting.popleft().result()) is not None:
                waiting.append(thread.submit(next, batches, None))
                yield batch
        finally:
            thread.shutdown(wait=False, cancel_futures=True)


class _StepSampler(Sampler[int]):
    """Counts steps; an epoch goes on where the one before it stopped."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.start = 0
        self.epoch = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self.length
        start, self.start = self.start, 0  # at once: who counts along never exhausts this
        yield from range(first + start, first + self.length)

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch


class Steps(Dataset[dict[str, TaskBatch]]):
    """Step number to every task's batch: consecutive pieces of seeded permutations, pass after pass.

    What all ranks together see in a step depends on the size of the global batch alone; each takes its part of it.

    Args:
        streams: Task to its stream.
        batch_size: Inputs per task, step and rank; a stream shorter than a global batch gives each input once.
        seed: Of the orders.
        rank: Of ``world`` ranks, the one whose parts these are.
        world: Number of ranks.
        by_task: A rank takes whole batches of some tasks, instead of a part of every task's batch.
        draws: Whether items draw random numbers; then they draw from generators that are seeded for their step, so
            that a step is the same after a resume and with any number of workers.
    """

    def __init__(
        self,
        streams: Mapping[str, Unlabeled],
        batch_size: int,
        seed: int,
        rank: int,
        world: int,
        by_task: bool = False,
        draws: bool = False,
    ) -> None:
        self._streams = dict(streams)
        self._sizes = {task: min(batch_size * world, len(stream)) for task, stream in streams.items()}
        self._seed = seed
        self._rank, self._world = rank, world
        self._by_task = by_task
        self._draws = draws
        self._orders: dict[tuple[str, int], Tensor] = {}

    def global_size(self, task: str) -> int:
        """Inputs per step on all ranks together."""
        return self._sizes[task]

    def per_pass(self, task: str) -> int:
        """Steps that one pass over a task's stream takes."""
        return len(self._streams[task]) // self._sizes[task]

    def part(self, task: str) -> range:
        """Return which positions of a global batch this rank takes; parts of ranks differ by at most one input."""
        size = self._sizes[task]
        if self._by_task:
            return range(size if list(self._streams).index(task) % self._world == self._rank else 0)
        return range(size * self._rank // self._world, size * (self._rank + 1) // self._world)

    def share(self, task: str) -> float:
        """Return this rank's part of a global batch, times the number of ranks.

        The mean over ranks of (share x mean over the rank's part) is the mean over the global batch.
        """
        return self._world * len(self.part(task)) / self._sizes[task]

    def __getitem__(self, step: int) -> dict[str, TaskBatch]:
        if not self._draws:
            return self._batches(step)
        with seeded(f"{self._seed}/draws/{step}/{self._rank}"):
            return self._batches(step)

    def _batches(self, step: int) -> dict[str, TaskBatch]:
        indices = {task: self._indices(task, step) for task in self._streams}
        return {task: collate([self._streams[task][i] for i in found]) for task, found in indices.items() if found}

    def visited(self, task: str, steps: int) -> list[int]:
        """Return the positions that this rank visits in the first ``steps`` steps, ascending."""
        if self._world == 1:
            total, length = steps * self._sizes[task], len(self._streams[task])
            return list(range(length)) if total >= length else sorted(self._order(task, 0)[:total].tolist())
        found: set[int] = set()
        for step in range(steps if len(self.part(task)) else 0):
            found.update(self._indices(task, step))
            if len(found) == len(self._streams[task]):
                break
        return sorted(found)

    def _indices(self, task: str, step: int) -> list[int]:
        first, length = step * self._sizes[task], len(self._streams[task])
        return [int(self._order(task, (first + i) // length)[(first + i) % length]) for i in self.part(task)]

    def _order(self, task: str, number: int) -> Tensor:
        """The permutation of pass ``number``; the two latest are kept."""
        key = (task, number)
        if key not in self._orders:
            self._orders.pop((task, number - 2), None)
            self._orders[key] = permutation(len(self._streams[task]), f"{self._seed}/{task}/{number}")
        return self._orders[key]


def permutation(length: int, key: str) -> Tensor:
    """Return a random order of ``length`` positions that depends on ``key`` alone."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))


@contextlib.contextmanager
def seeded(key: str) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's generators by ``key`` alone, and give them their states back."""
    states = generator_states(cuda=False)
    seed = zlib.crc32(key.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # the processor's only: images are not drawn on a GPU
    try:
        yield
    finally:
        set_generator_states(states)


def generator_states(cuda: bool = True) -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's generators as tensors and plain values, for checkpoints."""
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    key = torch.from_numpy(numpy["state"]["key"].view(np.int32).copy())
    return {
        "python": random.getstate(),
        "numpy": {**numpy, "state": {**numpy["state"], "key": key}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if cuda and torch.cuda.is_initialized() else [],
    }


def set_generator_states(states: Mapping[str, Any]) -> None:
    """Undo what has been drawn since :func:`generator_states`."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy = dict(states["numpy"])
    key = numpy["state"]["key"].cpu().numpy().view(np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


def collate(items: Sequence[TaskBatch]) -> TaskBatch:
    """Stack items into a batch."""
    inputs, indices = default_collate([tuple(item) for item in items])
    return TaskBatch(inputs, indices)


def collate_labelled(items: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor] | None:
    """Stack what could be read of a batch into inputs and labels; None where nothing could."""
    read = [item for item in items if item is not None]
    if not read:
        return None
    inputs, labels = default_collate(read)
    return inputs, labels


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
