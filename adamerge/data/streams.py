"""Streams of unlabeled batches: in which order the items come, and how a run resumes among them.

The order of every stream is a function of (seed, task, step) alone.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from adamerge.data.batch import Collate, Inputs, TaskBatch, stack
from adamerge.data.datasets import Unlabeled
from adamerge.data.lengths import grouped
from adamerge.data.random_states import permutation, seeded
from adamerge.errors import InputError


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
        seed: Seed of the orders.
        rank: The one of ``world`` ranks whose parts these are.
        world: Number of ranks.
        by_task: A rank takes whole batches of some tasks, instead of a part of every task's batch.
        draws: Whether items draw random numbers; then they draw from generators that are seeded for their step, so
            that a step is the same after a resume and with any number of workers.
        collate: Makes samples a batch.
        lengths: Task to the lengths of its inputs, (N,), by which they are grouped; None for no groups.
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
        collate: Collate = stack,
        lengths: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._streams = dict(streams)
        self._sizes = {task: min(batch_size * world, len(stream)) for task, stream in streams.items()}
        self._seed = seed
        self._rank, self._world = rank, world
        self._by_task = by_task
        self._draws = draws
        self._collate = collate
        self._lengths = lengths
        self._orders: dict[tuple[str, int], Tensor] = {}

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
        indices = {task: self._indices(task, step) for task in self._streams}
        with seeded(f"{self._seed}/draws/{step}/{self._rank}") if self._draws else nullcontext():
            return {
                task: collate_batch([self._streams[task][i] for i in part], self._collate, f"data.tasks.{task}")
                for task, part in indices.items()
                if part
            }

    def visited(self, task: str, steps: int) -> list[int]:
        """Return the positions that this rank visits in the first ``steps`` steps, ascending."""
        if self._world == 1:
            total, length = steps * self._sizes[task], len(self._streams[task])
            return list(range(length)) if total >= length else sorted(self._order(task, 0)[:total].tolist())
        positions: set[int] = set()
        for step in range(steps if len(self.part(task)) else 0):
            positions.update(self._indices(task, step))
            if len(positions) == len(self._streams[task]):
                break
        return sorted(positions)

    def _indices(self, task: str, step: int) -> list[int]:
        first, length = step * self._sizes[task], len(self._streams[task])
        return [int(self._order(task, (first + i) // length)[(first + i) % length]) for i in self.part(task)]

    def _order(self, task: str, number: int) -> Tensor:
        """The permutation of pass ``number``; the two latest are kept."""
        key = (task, number)
        if key not in self._orders:
            self._orders.pop((task, number - 2), None)
            order = permutation(len(self._streams[task]), f"{self._seed}/{task}/{number}")
            lengths = None if self._lengths is None else self._lengths[task]
            self._orders[key] = order if lengths is None else grouped(order, lengths, self._sizes[task])
        return self._orders[key]


def collate_batch(items: Sequence[TaskBatch], collate: Collate = stack, where: str = "data") -> TaskBatch:
    """Make items a batch; ``where`` names the data in messages."""
    return TaskBatch(_collated([item.inputs for item in items], collate, where), torch.stack([i for _, i in items]))


def collate_labelled(
    items: Sequence[tuple[Inputs, Tensor] | None], collate: Collate = stack
) -> tuple[Inputs, Tensor] | None:
    """Make what could be read of a batch inputs and labels; None where nothing could."""
    read = [item for item in items if item is not None]
    if not read:
        return None
    return _collated([inputs for inputs, _ in read], collate, "data"), torch.stack([label for _, label in read])


def _collated(samples: Sequence[Inputs], collate: Collate, where: str) -> Inputs:
    try:
        return collate(samples)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
