"""Streams of unlabeled batches: what an item is, in which order they come, and how a run resumes among them.

Labels are dropped where data enters. The order of every stream is a function of (seed, task, step) alone.
"""

import contextlib
import random
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from adamerge.errors import InputError
from adamerge.reading import Readable


class TaskBatch(NamedTuple):
    """One task's unlabeled batch: inputs (B, ...) and positions in the task's stream (B,)."""

    inputs: Tensor
    indices: Tensor


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

    Attributes:
        source: The data set itself, for the baselines that are marked as using labels.
        readable: As given. In the place of an item that cannot be read stands the next one that can, with that one's
            position, so that the order of the others, and what experts say of a position, do not depend on it.
        cache: Keeps inputs that have been loaded; None for none.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        preprocess: Callable[[Any], Tensor] | None = None,
        first: int = 0,
        readable: Readable | None = None,
    ) -> None:
        self.source = dataset
        self.cache: Store | None = None
        self.readable = readable or Readable(dataset)
        self._preprocess = preprocess
        self._first = first

    def __len__(self) -> int:
        return length_of(self.source)

    def __getitem__(self, index: int) -> TaskBatch:
        position, inputs = self.readable.first(index, self._get)
        return TaskBatch(inputs, torch.tensor(self._first + position))

    def _get(self, index: int) -> Tensor:
        inputs = None if self.cache is None else self.cache.get(index)
        if inputs is None:
            inputs = self.load(index)
            if self.cache is not None:
                self.cache.put(index, inputs)
        return inputs

    def load(self, index: int) -> Tensor:
        """Return an input from the data set itself."""
        return _to_tensor(_split_item(self.source[index])[0], self._preprocess)


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

    Args:
        streams: Task to its stream.
        batch_size: Inputs per rank and step.
        seed: Of the orders.
        rank: Of this process.
        world: Number of processes.
        draws: Whether items draw random numbers; then they draw from generators that are seeded for their step, so
            that a step is the same after a resume and with any number of workers.
    """

    def __init__(
        self, streams: Mapping[str, Unlabeled], batch_size: int, seed: int, rank: int, world: int, draws: bool = False
    ) -> None:
        self._streams = dict(streams)
        self._batch_size = batch_size
        self._seed = seed
        self._rank, self._world = rank, world
        self._draws = draws
        self._orders: dict[tuple[str, int], Tensor] = {}

    def batch_size(self, task: str) -> int:
        """Inputs per rank and step: a stream shorter than a global batch gives each of its images once."""
        return max(1, min(self._batch_size, len(self._streams[task]) // self._world))

    def per_pass(self, task: str) -> int:
        """Steps that one pass over a task's stream takes."""
        return len(self._streams[task]) // (self.batch_size(task) * self._world)

    def __getitem__(self, step: int) -> dict[str, TaskBatch]:
        if not self._draws:
            return self._batches(step)
        with seeded(f"{self._seed}/draws/{step}/{self._rank}"):
            return self._batches(step)

    def _batches(self, step: int) -> dict[str, TaskBatch]:
        return {task: collate([stream[i] for i in self._indices(task, step)]) for task, stream in self._streams.items()}

    def visited(self, task: str, steps: int) -> list[int]:
        """Return the positions that the first ``steps`` steps visit on all ranks, ascending."""
        total = steps * self.batch_size(task) * self._world
        length = len(self._streams[task])
        return list(range(length)) if total >= length else sorted(self._order(task, 0)[:total].tolist())

    def _indices(self, task: str, step: int) -> list[int]:
        size, length = self.batch_size(task), len(self._streams[task])
        first = (step * self._world + self._rank) * size
        return [int(self._order(task, p // length)[p % length]) for p in range(first, first + size)]

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
