"""Unlabeled streams, one per task, and the labelled inputs they are scored on.

Labels are dropped where data enters: a stream's batch holds inputs and their positions, nothing else.
The order of every stream is a function of (seed, task, step) alone, so that a resumed run, or another
number of workers, sees the same batches.
"""

import copy
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from adamerge.data.batch import Collate, Inputs, TaskBatch, stack
from adamerge.data.cache import CACHES, Cache, Visits, keep_inputs, nature_of
from adamerge.data.corruptions import DEFAULT_SEVERITY, Corruption
from adamerge.data.datasets import Labelled, Unlabeled, input_of, length_of
from adamerge.data.first_look import check_scored, check_task
from adamerge.data.images import read_as_seen
from adamerge.data.lengths import lengths_of
from adamerge.data.streams import Steps, StreamLoader, collate_batch, collate_labelled
from adamerge.data.task import PROTOCOLS, Holdout, Opener, checked_unseen, divide, folds_of, sample, scored_only
from adamerge.data.task import Protocol as Protocol
from adamerge.data.task import Task as Task
from adamerge.data.views import Views
from adamerge.errors import InputError, check_choice, check_number

DISTRIBUTIONS = ("samples", "tasks")

Preprocess = Callable[[Any], Inputs]


class UnlabeledTasks(LightningDataModule):
    """One unlabeled stream per task for adaptation, and labelled loaders for evaluation.

    Args:
        tasks: Task name to its data.
        batch_size: Inputs per task and batch (on each device).
        distribute: With several devices: ``"samples"``, each takes its part of every task's batch; or ``"tasks"``,
            each takes whole batches of its own tasks, so that fewer experts are asked and run per device. The
            gradient is the same.
        batches_per_step: Batches per task and step, whose losses are summed; AdaMerging's released script
            uses 2.
        protocol: ``"split"``: inputs that adapt are never scored. ``"transductive"``: adapt on the very
            inputs that are scored, as the AdaMerging paper does.
        limit: Most adaptation inputs per task, a seeded sample; None for all.
        holdout: Share of each task's adaptation inputs that is held out, in [0, 1), for ``NeverWorse`` and
            ``KeepBest``; or ``"auto"``: a fifth, at most 64; none of so few that they are divided into ``folds``.
        views: Random views that replace the images to adapt on (not those held out or scored); None for
            the images themselves.
        group_by_length: Whether texts with similarly many tokens, which are counted first, share a batch.
        seed: Seed of splits, samples and orders.
        num_workers: Processes that load data; 0 loads in the main one.
        prefetch: Steps whose inputs are loaded ahead, by each process or, without any, by a thread; 0 loads them when
            they are due. The thread is for inputs that are neither in memory nor drawn at random.
        cache: ``"auto"`` keeps decoded images, in up to a quarter of the free memory; ``"ram"`` all or refuses;
            ``"off"`` none. What draws random numbers is never kept.
        preprocess: Applied to inputs that are not tensors (or mappings of tensors) yet, usually the backbone's.
        collate: Makes samples a batch, usually the backbone's: it pads those of unequal length. Default: samples of one
            shape are stacked.
        evaluation_batch_size: Inputs per batch when scoring.
        unseen: Names of tasks that are scored only: they have no stream, and their experts do not merge.
        corruption: What is done to the images to adapt on, see :mod:`adamerge.data.corruptions`; None for nothing. The
            scored images stay clean (``adamerge evaluate --corruptions``).
        severity: Severity of the corruption, 1 to 5.
        max_unreadable: Largest share of each task's inputs that may be damaged: they are left out, counted and named;
            beyond it the run ends.
        root: Not used here: the folder of the data sets, for tasks to refer to as ``${data.root}``.
        adapt: Not used here: which inputs tasks with splits of their own adapt on, to refer to as ``${data.adapt}``.

    Attributes:
        folds: In how many parts :meth:`fold` holds out each task's inputs, where they are few; 0 for none.

    Raises:
        InputError: If a task has no data, an empty stream, or data that the protocol cannot divide.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        *,
        batch_size: int = 16,
        batches_per_step: int = 1,
        distribute: Literal["samples", "tasks"] = "samples",
        protocol: Protocol = "split",
        limit: int | None = None,
        holdout: Holdout = 0.0,
        views: Views | None = None,
        group_by_length: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        prefetch: int = 2,
        cache: Cache | Literal[False] = "auto",
        preprocess: Preprocess | None = None,
        collate: Collate = stack,
        evaluation_batch_size: int = 256,
        unseen: Sequence[str] | None = None,
        corruption: str | None = None,
        severity: int = DEFAULT_SEVERITY,
        max_unreadable: float = 0.01,
        root: str | None = None,
        adapt: str | None = None,
    ) -> None:
        super().__init__()
        if not tasks:
            raise InputError("data.tasks: expected at least one task, found none.")
        cache = "off" if cache is False else cache  # what a yaml file reads from a bare off
        check_choice("data.protocol", protocol, PROTOCOLS)
        check_choice("data.cache", cache, CACHES)
        check_choice("data.distribute", distribute, DISTRIBUTIONS)
        if holdout != "auto":
            check_number("data.holdout", holdout, 0, 1, below=True)
        check_number("data.max_unreadable", max_unreadable, 0, 1, below=True)
        check_number("data.batch_size", batch_size, 1, whole=True)
        check_number("data.batches_per_step", batches_per_step, 1, whole=True)
        check_number("data.num_workers", num_workers, 0, whole=True)
        check_number("data.prefetch", prefetch, 0, whole=True)
        self.tasks = dict(tasks)
        self.unseen = checked_unseen(unseen or (), self.tasks)
        self.corruption = None if corruption is None else Corruption(corruption, severity)
        self.batch_size = batch_size
        self.batches_per_step = batches_per_step
        self.distribute = distribute
        self.protocol = protocol
        self.seed = seed
        self.num_workers = num_workers
        self._prefetch = prefetch
        self._ahead = 0 if num_workers == 0 else prefetch  # until it is known that a thread may read
        self._cache, self._views = cache, views
        self._draws = False  # until it is known how inputs come about
        self.evaluation_batch_size = evaluation_batch_size
        self.streams: dict[str, Unlabeled] = {}
        self.holdout_streams: dict[str, Unlabeled] = {}
        self.evaluation: dict[str, Labelled] = {}
        self.unseen_evaluation: dict[str, Labelled] = {}
        self._preprocess = preprocess
        self.collate = collate
        self._opener = Opener(preprocess, seed, max_unreadable, num_workers > 0)
        opened = ((name, self._open(name, task, limit)) for name, task in self.tasks.items())
        self._images = {name: images for name, images in opened if images is not None}
        self.folds = folds_of(map(length_of, self._images.values())) if holdout == "auto" else 0
        self._divide(0.0 if self.folds else holdout)
        self._lengths = lengths_of(self.streams) if group_by_length else None

    def _open(self, name: str, task: Task, limit: int | None) -> Dataset[Any] | None:
        """Look at a task, and make its scored inputs; return those to adapt on, None for an unseen task."""
        for dataset in (task.dataset, task.adapt, task.evaluate):
            read_as_seen(dataset)
        check_task(name, task, self._preprocess, self.collate)
        if name in self.unseen:
            self.unseen_evaluation[name] = self._opener.labelled(name, task, scored_only(name, task))
            return None
        images, evaluate = divide(name, task, self.protocol, self.seed)
        if evaluate is not None:
            self.evaluation[name] = self._opener.labelled(name, task, evaluate)
        return sample(images, limit, f"{self.seed}/limit/{name}")

    def _divide(self, holdout: Holdout) -> None:
        for task, images in self._images.items():
            self._stream(task, *(self._opener.hold_out(task, images, holdout) if holdout else (images, None)))

    def _stream(self, task: str, images: Dataset[Any], held_out: Dataset[Any] | None) -> None:
        self.streams[task] = self._opener.unlabeled(task, images, self.corruption, views=self._views)
        if held_out is not None:
            self.holdout_streams[task] = self._opener.unlabeled(
                task, held_out, self.corruption, len(self.streams[task])
            )

    def fold(self, number: int) -> "UnlabeledTasks":
        """Return the same data with part ``number``, from 0, of each task's inputs held out; positions are its own."""
        data = copy.copy(self)
        data.folds, data.streams, data.holdout_streams = 0, {}, {}
        for task, images in self._images.items():
            data._stream(task, *self._opener.hold_out_fold(task, images, number, self.folds))
        data._lengths = None if self._lengths is None else lengths_of(data.streams)
        return data

    def input_of(self, item: Any) -> Inputs:
        """Return an item as an input without batch axis."""
        return input_of(item, self._preprocess)

    def check_scored(self, task: str) -> None:
        """Look at some of a task's inputs to score and at their labels, which adaptation never reads.

        Raises:
            InputError: If an item is no input, or a label no class number.
        """
        check_scored(task, self.tasks[task], self._preprocess, self.collate)

    def with_corrupted_evaluation(self, corruption: Corruption) -> "UnlabeledTasks":
        """Return the same data with corrupted images to score; streams are shared."""
        data = copy.copy(self)
        for kind in ("evaluation", "unseen_evaluation"):
            scored = {
                task: labelled.changed(lambda images, task=task: self._opener.corrupted(task, images, corruption))
                for task, labelled in getattr(self, kind).items()
            }
            setattr(data, kind, scored)
        return data

    @property
    def scored(self) -> dict[str, Labelled]:
        """Labelled inputs by task, those of unseen tasks too."""
        return {**self.evaluation, **self.unseen_evaluation}

    def unreadable(self) -> dict[str, list[str]]:
        """Return the inputs to adapt on (held-out ones too) that could not be read so far, by task; {} for none."""
        return _unreadable(self.streams, self.holdout_streams)

    def unreadable_evaluation(self) -> dict[str, list[str]]:
        """Return the inputs to score that could not be read so far, by task; {} for none."""
        return _unreadable(self.scored)

    def gather_unreadable(self) -> None:
        """Let all devices know of the inputs to adapt on that any of them could not read; all must call."""
        for stream in (*self.streams.values(), *self.holdout_streams.values()):
            stream.readable.gather()

    def state_dict(self) -> dict[str, Any]:
        """Return which inputs could not be read so far, for checkpoints."""
        return {"unreadable": {name: stream.readable.unreadable for name, stream in self.streams.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Leave out the inputs that were left out before a checkpoint."""
        for name, indices in state_dict["unreadable"].items():
            self.streams[name].readable.unreadable = indices

    def setup(self, stage: str) -> None:
        """Find out how inputs come about, and decide which are kept and which are read ahead."""
        if stage != "fit":
            return
        steps = self._steps()
        count = self._steps_per_epoch(steps) if self.trainer and self.trainer.max_steps > 0 else None
        visits = []
        for name, stream in self.streams.items():
            positions = range(len(stream)) if count is None else steps.visited(name, count)
            visits.append(Visits(name, stream, stream.numbers(positions), nature_of(stream)))
        natures = {visit.name: visit.nature for visit in visits}
        for name, stream in self.holdout_streams.items():
            visits.append(Visits(f"{name}, held out", stream, range(len(stream)), natures[name]))
        keep_inputs(visits, self._cache, self.num_workers, self._ranks()[0])
        # From generators that a thread must not touch; views too use the generator of the whole process.
        self._draws = any(nature.random for nature in natures.values())
        in_memory = all(nature.in_memory for nature in natures.values())
        if self.num_workers == 0:
            self._ahead = 0 if self._draws or self._views or in_memory else self._prefetch

    def train_dataloader(self) -> StreamLoader:
        """Return a loader whose items are one step's batches: task to :class:`TaskBatch`."""
        steps = self._steps()
        return StreamLoader(steps, self._steps_per_epoch(steps), self._position, self.num_workers, self._ahead)

    def first_batch(self) -> dict[str, TaskBatch]:
        """Return the batches of a run's first step; on each of several devices its part of them."""
        return self._steps()[0]

    def shares(self) -> dict[str, float]:
        """Return, for every task, this device's part of a step's inputs, times the number of devices."""
        steps = self._steps()
        return {task: steps.share(task) for task in self.streams}

    def holdout_batches(self, tasks: Collection[str] | None = None) -> Iterator[dict[str, TaskBatch]]:
        """Yield the held-out inputs of some tasks (None: all) once, in their own order; tasks with fewer end earlier.

        Each of several devices has every so many of the batches, and as many as the others: its last may be empty.
        """
        size, streams = self.batch_size * self.batches_per_step, self.holdout_streams
        streams = streams if tasks is None else {task: streams[task] for task in tasks}
        world, rank = self._ranks()
        for first in range(0, max(map(len, streams.values()), default=0), world * size):
            start = first + rank * size
            yield {
                task: collate_batch([stream[i] for i in range(start, min(start + size, len(stream)))], self.collate)
                for task, stream in streams.items()
                if start < len(stream)
            }

    def mixed_batches(self, count: int) -> Iterator[dict[str, Inputs]]:
        """Yield batches of inputs to adapt on, (B, ...) by task, that depend on the seed only.

        Args:
            count: Most batches; at most one pass over the longest stream, shorter ones are repeated.
        """
        steps = Steps(self.streams, self.batch_size, self.seed, 0, 1, draws=True, collate=self.collate)
        for number in range(min(count, max(steps.per_pass(task) for task in self.streams))):
            yield {task: batch.inputs for task, batch in steps[number].items()}

    def evaluation_loader(self, task: str) -> Iterator[tuple[Inputs, Tensor]]:
        """Yield the labelled inputs of a task that can be read, in their own order, (inputs, labels)."""
        batches: DataLoader[Any] = DataLoader(
            self.scored[task], self.evaluation_batch_size,
            num_workers=self.num_workers, collate_fn=functools.partial(collate_labelled, collate=self.collate),
        )  # fmt: skip
        return (batch for batch in batches if batch is not None)

    def teacher_loader(self, task: str, steps: int | None = None) -> DataLoader[TaskBatch]:
        """Return the stream's samples that this device visits in ``steps`` steps (None: all), in ascending order.

        The order does not depend on the run's position, so that cached teacher outputs are the same
        to the last bit after a resume. Of mappings, whose answers may be as many as their positions, a batch is what a
        step takes of a task; of tensors as many as are scored at once.
        """
        stream = self.streams[task]
        visited = range(len(stream)) if steps is None else self._steps().visited(task, steps)
        is_tensor = isinstance(stream[0].inputs, Tensor)
        of_step = self.batch_size * self.batches_per_step
        batch_size = max(self.batch_size, self.evaluation_batch_size) if is_tensor else of_step
        return self.loader(Subset(stream, visited), batch_size)

    def loader(self, stream: Dataset[TaskBatch], batch_size: int) -> DataLoader[TaskBatch]:
        """Return some of a stream's samples as batches, in their own order."""
        collate = functools.partial(collate_batch, collate=self.collate)
        return DataLoader(stream, batch_size, num_workers=self.num_workers, collate_fn=collate)

    def _steps(self) -> Steps:
        world, rank = self._ranks()
        size = self.batch_size * self.batches_per_step
        by_task = self.distribute == "tasks"
        return Steps(self.streams, size, self.seed, rank, world, by_task, self._draws, self.collate, self._lengths)

    def _ranks(self) -> tuple[int, int]:
        """Number of devices, and which of them this is."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _steps_per_epoch(self, steps: Steps) -> int:
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


def _unreadable(*parts: Mapping[str, Unlabeled] | Mapping[str, Labelled]) -> dict[str, list[str]]:
    """Return by task the names of inputs that could not be read, {} for none."""
    names: dict[str, list[str]] = {}
    for task, images in (item for part in parts for item in part.items()):
        if images.readable.unreadable:
            names.setdefault(task, []).extend(images.readable.names)
    return names
