"""Unlabeled streams, one per task, and the labelled images they are scored on.

Labels are dropped where data enters: a stream's batch holds inputs and their positions, nothing else.
The order of every stream is a function of (seed, task, step) alone, so that a resumed run, or another
number of workers, sees the same batches.
"""

import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, default_collate

from adamerge.errors import InputError

log = logging.getLogger(__name__)

Protocol = Literal["split", "transductive"]


class TaskBatch(NamedTuple):
    """One task's unlabeled batch: inputs (B, ...) and positions in the task's stream (B,)."""

    inputs: Tensor
    indices: Tensor


@dataclass(frozen=True)
class Task:
    """Where a task's images come from, and what its classes are called.

    Give either ``dataset`` (divided by the protocol), or ``adapt`` and ``evaluate``. Any map-style
    dataset works whose items are inputs, or tuples that begin with the input and the label: ImageFolder,
    torchvision's, or your own.

    Args:
        dataset: Labelled images, of which one half adapts and the other is scored.
        adapt: Images to adapt on; labels, if there are any, are dropped.
        evaluate: Labelled images to score.
        classes: Class names in the order of the labels; default ``dataset.classes``.
        templates: Prompts such as ``"a photo of a {}."`` for zero-shot heads.
        expert: Name of the expert that belongs to the task; default the task's own name.
    """

    dataset: Dataset[Any] | None = None
    adapt: Dataset[Any] | None = None
    evaluate: Dataset[Any] | None = None
    classes: Sequence[str] | None = None
    templates: Sequence[str] = ("a photo of a {}.",)
    expert: str | None = None

    @property
    def class_names(self) -> list[str] | None:
        """Class names, from here or from the dataset; None where neither has any."""
        sources = (self.evaluate, self.dataset, self.adapt)
        found = self.classes or next((getattr(d, "classes", None) for d in sources if hasattr(d, "classes")), None)
        return None if found is None else [str(name) for name in found]


class Unlabeled(Dataset[TaskBatch]):
    """A dataset without its labels: items are (input, position).

    Args:
        dataset: Items are inputs, or tuples that begin with the input.
        preprocess: Applied to inputs that are not tensors yet (PIL images).
        first: Position of the first item, where several data sets make up a stream.

    Attributes:
        source: The data set itself, for the baselines that are marked as using labels.
    """

    def __init__(
        self, dataset: Dataset[Any], preprocess: Callable[[Any], Tensor] | None = None, first: int = 0
    ) -> None:
        self.source = dataset
        self._preprocess = preprocess
        self._first = first

    def __len__(self) -> int:
        return _length(self.source)

    def __getitem__(self, index: int) -> TaskBatch:
        inputs = _split_item(self.source[index])[0]
        return TaskBatch(_to_tensor(inputs, self._preprocess), torch.tensor(self._first + index))


class Labelled(Dataset[tuple[Tensor, Tensor]]):
    """A dataset with its labels, for evaluation only: items are (input, label)."""

    def __init__(self, dataset: Dataset[Any], preprocess: Callable[[Any], Tensor] | None = None) -> None:
        self._dataset = dataset
        self._preprocess = preprocess

    def __len__(self) -> int:
        return _length(self._dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, label = _split_item(self._dataset[index])
        if label is None:
            raise InputError(
                f"Evaluation needs labels: item {index} of {self._dataset!r} is not a pair (input, label)."
            )
        return _to_tensor(inputs, self._preprocess), torch.tensor(int(label))


class UnlabeledTasks(LightningDataModule):
    """One unlabeled stream per task for adaptation, and labelled loaders for evaluation.

    Args:
        tasks: Task name to its data.
        batch_size: Inputs per task and batch (on each device).
        batches_per_step: Batches per task and step, whose losses are summed; AdaMerging's released script
            uses 2.
        protocol: ``"split"``: images that adapt are never scored. ``"transductive"``: adapt on the very
            images that are scored, as the AdaMerging paper does.
        limit: Most adaptation images per task, a seeded sample; None for all.
        holdout: Share of each task's adaptation images that is held out, in [0, 1): see ``KeepBest``.
        seed: Of splits, samples and orders.
        num_workers: Processes that load data; 0 loads in the main one.
        preprocess: Applied to inputs that are not tensors yet, usually the backbone's.
        evaluation_batch_size: Inputs per batch when scoring.

    Raises:
        InputError: If a task has no data, an empty stream, or data that the protocol cannot divide.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        *,
        batch_size: int = 16,
        batches_per_step: int = 1,
        protocol: Protocol = "split",
        limit: int | None = None,
        holdout: float = 0.0,
        seed: int = 0,
        num_workers: int = 0,
        preprocess: Callable[[Any], Tensor] | None = None,
        evaluation_batch_size: int = 256,
    ) -> None:
        super().__init__()
        if not tasks:
            raise InputError("data.tasks: expected at least one task, found none.")
        if batch_size < 1:
            raise InputError(f"data.batch_size: expected a number >= 1, found {batch_size}.")
        if batches_per_step < 1:
            raise InputError(f"data.batches_per_step: expected a number >= 1, found {batches_per_step}.")
        if not 0 <= holdout < 1:
            raise InputError(f"data.holdout: expected a share in [0, 1), found {holdout}.")
        if protocol not in ("split", "transductive"):
            raise InputError(f"data.protocol: expected 'split' or 'transductive', found {protocol!r}.")
        self.tasks = dict(tasks)
        self.batch_size = batch_size
        self.batches_per_step = batches_per_step
        self.protocol = protocol
        self.seed = seed
        self.num_workers = num_workers
        self.evaluation_batch_size = evaluation_batch_size
        self.streams: dict[str, Unlabeled] = {}
        self.holdout_streams: dict[str, Unlabeled] = {}
        self.evaluation: dict[str, Labelled] = {}
        for name, task in self.tasks.items():
            adapt, evaluate = self._divide(name, task)
            adapt = _sample(adapt, limit, f"{seed}/limit/{name}")
            if holdout:
                adapt, held_out = _hold_out(adapt, holdout, f"{seed}/holdout/{name}")
                self.holdout_streams[name] = Unlabeled(held_out, preprocess, first=_length(adapt))
            self.streams[name] = Unlabeled(adapt, preprocess)
            if evaluate is not None:
                self.evaluation[name] = Labelled(evaluate, preprocess)

    def train_dataloader(self) -> "StreamLoader":
        """Return a loader whose items are one step's batches: task to :class:`TaskBatch`."""
        steps = self._steps(self.streams)
        return StreamLoader(steps, self._steps_per_epoch(steps), self._position, self.num_workers)

    def first_batch(self) -> dict[str, TaskBatch]:
        """Return what the first step of a run sees."""
        return self._steps(self.streams)[0]

    def holdout_batches(self) -> Iterator[dict[str, TaskBatch]]:
        """Yield the held-out images once, in their own order; tasks with fewer end earlier."""
        size, streams = self.batch_size * self.batches_per_step, self.holdout_streams
        for start in range(0, max(map(len, streams.values()), default=0), size):
            yield {
                task: _collate([stream[i] for i in range(start, min(start + size, len(stream)))])
                for task, stream in streams.items()
                if start < len(stream)
            }

    def evaluation_loader(self, task: str) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the labelled images of a task in their own order, (inputs, labels)."""
        return DataLoader(self.evaluation[task], self.evaluation_batch_size, num_workers=self.num_workers)

    def teacher_loader(self, task: str, steps: int | None = None) -> DataLoader[TaskBatch]:
        """Return the stream's samples that the first ``steps`` steps visit (None: all), in ascending order.

        The order does not depend on the run's position, so that cached teacher outputs are the same
        to the last bit after a resume.
        """
        stream = self.streams[task]
        visited = list(range(len(stream)))
        if steps is not None:
            visited = self._steps({task: stream}).visited(task, steps)
        batch_size = max(self.batch_size, self.evaluation_batch_size)
        return DataLoader(Subset(stream, visited), batch_size, num_workers=self.num_workers, collate_fn=_collate)

    def _divide(self, name: str, task: Task) -> tuple[Dataset[Any], Dataset[Any] | None]:
        """Return the task's adaptation and evaluation data under the protocol."""
        for key in ("dataset", "adapt", "evaluate"):
            found = getattr(task, key)
            if found is not None and _length(found, f"data.tasks.{name}.{key}") == 0:
                raise InputError(f"data.tasks.{name}.{key}: the data set is empty. Check its folder or split.")
        if task.dataset is not None and (task.adapt is not None or task.evaluate is not None):
            raise InputError(f"data.tasks.{name}: give either dataset, or adapt and evaluate, not both.")
        if task.dataset is not None and self.protocol == "transductive":
            return task.dataset, task.dataset
        if task.dataset is not None:
            order = _permutation(_length(task.dataset), f"{self.seed}/split/{name}").tolist()
            half = (len(order) + 1) // 2
            if half == len(order):
                raise InputError(f"data.tasks.{name}.dataset: one image cannot be split; expected at least two.")
            return Subset(task.dataset, sorted(order[:half])), Subset(task.dataset, sorted(order[half:]))
        if self.protocol == "transductive" and task.evaluate is not None:
            return task.evaluate, task.evaluate
        if task.adapt is None:
            raise InputError(
                f"data.tasks.{name}: no adaptation images. Give dataset, or adapt (and evaluate to score the result); "
                "to adapt on the scored images themselves, set data.protocol=transductive."
            )
        return task.adapt, task.evaluate

    def _steps(self, streams: Mapping[str, Unlabeled]) -> "_Steps":
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return _Steps(streams, self.batch_size * self.batches_per_step, self.seed, rank, world)

    def _steps_per_epoch(self, steps: "_Steps") -> int:
        """One epoch is the whole run where the trainer counts steps, else one pass over the longest stream."""
        trainer = self.trainer
        if trainer is not None and trainer.max_steps > 0:
            return trainer.max_steps * trainer.accumulate_grad_batches
        return max(1, max(steps.per_pass(task) for task in self.streams))

    def _position(self) -> int:
        """Batches of this epoch that have been trained on."""
        if self.trainer is None:
            return 0
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return int(progress.processed)


class StreamLoader(DataLoader[dict[str, TaskBatch]]):
    """A loader of steps that Lightning can resume in the middle of an epoch.

    Args:
        steps: Maps a step's number to its batches.
        length: Steps per epoch.
        position: Returns the number of steps done in this epoch, for checkpoints.
        num_workers: Processes that load data.
    """

    def __init__(self, steps: "_Steps", length: int, position: Callable[[], int], num_workers: int = 0) -> None:
        super().__init__(
            steps, batch_size=None, sampler=_StepSampler(length), num_workers=num_workers,
            persistent_workers=num_workers > 0, pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        self._current_position = position

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


class _Steps(Dataset[dict[str, TaskBatch]]):
    """Step number to every task's batch: consecutive pieces of seeded permutations, pass after pass."""

    def __init__(self, streams: Mapping[str, Unlabeled], batch_size: int, seed: int, rank: int, world: int) -> None:
        self._streams = dict(streams)
        self._batch_size = batch_size
        self._seed = seed
        self._rank, self._world = rank, world
        self._orders: dict[tuple[str, int], Tensor] = {}

    def batch_size(self, task: str) -> int:
        """Inputs per rank and step: a stream shorter than a global batch gives each of its images once."""
        return max(1, min(self._batch_size, len(self._streams[task]) // self._world))

    def per_pass(self, task: str) -> int:
        """Steps that one pass over a task's stream takes."""
        return len(self._streams[task]) // (self.batch_size(task) * self._world)

    def __getitem__(self, step: int) -> dict[str, TaskBatch]:
        return {
            task: _collate([stream[i] for i in self._indices(task, step)]) for task, stream in self._streams.items()
        }

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
            self._orders[key] = _permutation(len(self._streams[task]), f"{self._seed}/{task}/{number}")
        return self._orders[key]


def _permutation(length: int, key: str) -> Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))


def _sample(dataset: Dataset[Any], limit: int | None, key: str) -> Dataset[Any]:
    if limit is None or limit >= _length(dataset):
        return dataset
    if limit < 1:
        raise InputError(f"data.limit: expected a number >= 1, found {limit}.")
    return Subset(dataset, sorted(_permutation(_length(dataset), key)[:limit].tolist()))


def _hold_out(dataset: Dataset[Any], share: float, key: str) -> tuple[Dataset[Any], Dataset[Any]]:
    """Divide at random into what adapts and what is held out, at least one image each."""
    order = _permutation(_length(dataset), key).tolist()
    count = max(1, round(share * len(order)))
    if count >= len(order):
        raise InputError(
            f"data.holdout: {share} of {len(order)} images leaves none to adapt on; expected a smaller share."
        )
    return Subset(dataset, sorted(order[count:])), Subset(dataset, sorted(order[:count]))


def _collate(items: Sequence[TaskBatch]) -> TaskBatch:
    inputs, indices = default_collate([tuple(item) for item in items])
    return TaskBatch(inputs, indices)


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


def _length(dataset: Dataset[Any], where: str = "data") -> int:
    try:
        return len(dataset)  # type: ignore[arg-type]
    except TypeError as error:
        raise InputError(
            f"{where}: {type(dataset).__name__} has no length. Expected a map-style data set with __len__ and "
            "__getitem__; collect an iterable one into a list."
        ) from error
