"""A task's inputs, and their division into those that adapt, are held out, and are scored."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch.utils.data import Dataset, Subset

from adamerge.data.batch import Inputs
from adamerge.data.corruptions import Corrupted, Corruption, scale_of
from adamerge.data.datasets import Labelled, Unlabeled, length_of
from adamerge.data.random_states import permutation
from adamerge.data.unreadable import Readable
from adamerge.data.views import Views
from adamerge.errors import InputError, check_number, did_you_mean

Protocol = Literal["split", "transductive"]
PROTOCOLS = ("split", "transductive")
Holdout = float | Literal["auto"]
_MOST_HELD_OUT = 64  # of a task by "auto": enough to prove a gain of a few points, and little time to measure
_LEAST_HELD_OUT = 64  # of all tasks together, by "auto": fewer prove little
_FOLDS = 4


@dataclass(frozen=True)
class Task:
    """Where a task's inputs come from, and what its classes are called.

    Give either ``dataset`` (divided by the protocol), or ``adapt`` and ``evaluate``. Any map-style
    dataset works whose items are inputs, or tuples that begin with the input and the label: ImageFolder,
    torchvision's, or your own.

    Args:
        dataset: Labelled inputs, of which one half adapts and the other is scored.
        adapt: Inputs to adapt on; labels, if there are any, are dropped.
        evaluate: Labelled inputs to score.
        classes: Class names in the order of the labels; default ``dataset.classes``.
        templates: Prompts such as ``"a photo of a {}."`` for zero-shot heads.
        expert: Name of the expert that belongs to the task; default the task's own name.
        metrics: Name to a metric of torchmetrics, of logits (N, C) and labels (N,) to one number, that is measured
            beside the accuracy.
    """

    dataset: Dataset[Any] | None = None
    adapt: Dataset[Any] | None = None
    evaluate: Dataset[Any] | None = None
    classes: Sequence[str] | None = None
    templates: Sequence[str] = ("a photo of a {}.",)
    expert: str | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)

    @property
    def class_names(self) -> list[str] | None:
        """Class names, from here or from the dataset; None where neither has any."""
        sources = (self.evaluate, self.dataset, self.adapt)
        names = self.classes or next((getattr(d, "classes", None) for d in sources if hasattr(d, "classes")), None)
        return None if names is None else [str(name) for name in names]


@dataclass(frozen=True)
class Opener:
    """Divides tasks' inputs to adapt on, and makes inputs ready to be read, without labels or with them.

    Args:
        preprocess: Applied to inputs that are not tensors (or mappings of tensors) yet.
        seed: Of divisions, views and corruptions.
        max_unreadable: Largest share of a task's inputs that may be damaged.
        shared: Whether several processes read them.
    """

    preprocess: Callable[[Any], Inputs] | None
    seed: int
    max_unreadable: float
    shared: bool

    def unlabeled(
        self,
        task: str,
        images: Dataset[Any],
        corruption: Corruption | None,
        first: int = 0,
        views: Views | None = None,
    ) -> Unlabeled:
        """Return inputs to adapt on, or held out, of which ``first`` is the position of the first."""
        readable = self._readable(task, images)
        images = self.corrupted(task, images, corruption)
        return Unlabeled(images, self.preprocess, first, readable, views, f"{self.seed}/views/{task}")

    def labelled(self, task: str, of: Task, images: Dataset[Any]) -> Labelled:
        """Return inputs to score."""
        names = of.class_names
        return Labelled(images, self.preprocess, self._readable(task, images), len(names) if names else None)

    def corrupted(self, task: str, images: Dataset[Any], corruption: Corruption | None) -> Dataset[Any]:
        """Return the images with a corruption, or as they are."""
        if corruption is None:
            return images
        return Corrupted(images, corruption, f"data.tasks.{task}, seed {self.seed}", scale_of(self.preprocess))

    def hold_out(self, task: str, images: Dataset[Any], share: Holdout) -> tuple[Dataset[Any], Dataset[Any]]:
        """Divide inputs at random into those that adapt and those that are held out, at least one each.

        Args:
            task: Its name.
            images: A task's inputs to adapt on.
            share: Held out of them, in (0, 1); ``"auto"`` for a fifth, but at most 64 inputs.

        Raises:
            InputError: If the share leaves nothing to adapt on.
        """
        order = self._order(task, images)
        count = _fifth(len(order)) if share == "auto" else max(1, round(share * len(order)))
        if count >= len(order):
            remedy = "more inputs, or none held out, and no proof: data.holdout=0 callbacks=none"
            raise InputError(
                f"data.holdout: {share} of {len(order)} inputs of {task!r} leaves none to adapt on; expected "
                f"{remedy if len(order) == 1 else 'a smaller share'}."
            )
        return _parts(images, order[:count])

    def hold_out_fold(
        self, task: str, images: Dataset[Any], number: int, folds: int
    ) -> tuple[Dataset[Any], Dataset[Any]]:
        """Divide inputs at random into part ``number``, from 0, of ``folds``, which is held out, and all others."""
        return _parts(images, self._order(task, images)[number::folds])

    def _order(self, task: str, images: Dataset[Any]) -> list[int]:
        return permutation(length_of(images), f"{self.seed}/holdout/{task}").tolist()

    def _readable(self, task: str, images: Dataset[Any]) -> Readable:
        return Readable(images, f"data.tasks.{task}", self.max_unreadable, shared=self.shared)


def divide(name: str, task: Task, protocol: Protocol, seed: int) -> tuple[Dataset[Any], Dataset[Any] | None]:
    """Return a task's adaptation and evaluation data under the protocol.

    Args:
        name: Name of the task.
        task: Its data.
        protocol: See :class:`~adamerge.data.UnlabeledTasks`.
        seed: Seed of the division into halves.

    Raises:
        InputError: If the task has no data, or data that the protocol cannot divide.
    """
    for key in ("dataset", "adapt", "evaluate"):
        dataset = getattr(task, key)
        if dataset is not None and length_of(dataset, f"data.tasks.{name}.{key}") == 0:
            raise InputError(f"data.tasks.{name}.{key}: the data set is empty. Check its folder or split.")
    if task.dataset is not None and (task.adapt is not None or task.evaluate is not None):
        raise InputError(f"data.tasks.{name}: give either dataset, or adapt and evaluate, not both.")
    if task.dataset is not None and protocol == "transductive":
        return task.dataset, task.dataset
    if task.dataset is not None:
        order = permutation(length_of(task.dataset), f"{seed}/split/{name}").tolist()
        half = (len(order) + 1) // 2
        if half == len(order):
            raise InputError(f"data.tasks.{name}.dataset: one input cannot be split; expected at least two.")
        return Subset(task.dataset, sorted(order[:half])), Subset(task.dataset, sorted(order[half:]))
    if protocol == "transductive" and task.evaluate is not None:
        return task.evaluate, task.evaluate
    if task.adapt is None:
        raise InputError(
            f"data.tasks.{name}: no adaptation inputs. Give dataset, or adapt (and evaluate to score the result); "
            "to adapt on the scored inputs themselves, set data.protocol=transductive."
        )
    return task.adapt, task.evaluate


def scored_only(name: str, task: Task) -> Dataset[Any]:
    """Return all the labelled inputs of a task that has no stream.

    Raises:
        InputError: If it has none.
    """
    scored = task.evaluate if task.evaluate is not None else task.dataset
    if scored is None or length_of(scored, f"data.tasks.{name}.evaluate") == 0:
        raise InputError(f"data.unseen: {name} has no labelled inputs. Give data.tasks.{name}.evaluate (or dataset).")
    return scored


def checked_unseen(unseen: Sequence[str], tasks: Mapping[str, Task]) -> tuple[str, ...]:
    """Refuse unseen names that no task has, and data without a task to adapt on."""
    if isinstance(unseen, str):
        raise InputError(f"data.unseen: expected a list of tasks, found {unseen!r}; write [{unseen}].")
    for name in unseen:
        if name not in tasks:
            raise InputError(
                f"data.unseen: no task {name!r}.{did_you_mean(str(name), tasks)} Known: {', '.join(tasks)}."
            )
    if set(unseen) == set(tasks):
        raise InputError("data.unseen: expected some tasks, found all: none is left to adapt on.")
    return tuple(dict.fromkeys(unseen))


def sample(dataset: Dataset[Any], limit: int | None, key: str) -> Dataset[Any]:
    """Return at most ``limit`` inputs, drawn by ``key`` alone; all for None.

    Raises:
        InputError: If the limit is no positive number.
    """
    if limit is not None:
        check_number("data.limit", limit, 1, whole=True)
    if limit is None or limit >= length_of(dataset):
        return dataset
    return Subset(dataset, sorted(permutation(length_of(dataset), key)[:limit].tolist()))


def _fifth(size: int) -> int:
    return max(1, min(_MOST_HELD_OUT, round(size / 5)))


def folds_of(sizes: Iterable[int]) -> int:
    """Return in how many parts tasks of these sizes are held out, where a fifth of each would prove little; else 0."""
    sizes = list(sizes)
    rows = len(sizes) ** 2 / sum(1 / _fifth(size) for size in sizes)  # of equal weight that have the error of the mean
    is_few = rows < _LEAST_HELD_OUT and min(sizes) > 1
    return min(_FOLDS, *sizes) if is_few else 0


def _parts(images: Dataset[Any], held_out: Sequence[int]) -> tuple[Dataset[Any], Dataset[Any]]:
    """Return all others, and those at some positions."""
    others = sorted(set(range(length_of(images))).difference(held_out))
    return Subset(images, others), Subset(images, sorted(held_out))
