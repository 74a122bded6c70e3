"""A look at a task before a run: its class names, and a few items of each of its splits."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from adamerge.data.batch import Collate, Inputs, described, stack
from adamerge.data.datasets import class_number, input_of, length_of, split_item
from adamerge.data.random_states import seeded
from adamerge.data.task import Task
from adamerge.data.texts import Text
from adamerge.data.unreadable import DAMAGE, item_name
from adamerge.errors import InputError, shorten

T = TypeVar("T")

_SPLITS = ("dataset", "adapt", "evaluate")
_NO_CLASSES = {"__macosx", "__pycache__", "@eadir", "lost+found", "$recycle.bin"}  # what systems and tools leave behind
_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval", "images"}

_ALIKE = (
    "Give both the same class folders (a class without images: an empty folder, and allow_empty: true), or adapt on a "
    "data set without classes."
)


def check_task(
    name: str, task: Task, preprocess: Callable[[Any], Inputs] | None = None, collate: Collate = stack
) -> None:
    """Check a task's class names, and a few of the inputs to adapt on; labels and what is scored are left alone.

    Args:
        name: Name of the task.
        task: Its data.
        preprocess: Applied to inputs that are not tensors yet.
        collate: Makes inputs a batch.

    Raises:
        InputError: If something is wrong; the message names the task, the split, the item and the remedy.
    """
    check_class_names(name, task)
    check_metrics(name, task)
    for where, dataset in _to_adapt(name, task):
        _check_inputs(where, dataset, preprocess, collate)


def check_metrics(name: str, task: Task) -> None:
    """Try a task's metrics on logits of as many classes as it names.

    Raises:
        InputError: If one is no metric, has another number of classes, or gives more than one number.
    """
    if not isinstance(task.metrics, Mapping):
        raise InputError(f"data.tasks.{name}.metrics: expected name: metric, found {task.metrics!r}.")
    for key, metric in task.metrics.items():
        where, classes = f"data.tasks.{name}.metrics.{key}", len(task.class_names or ())
        if not callable(metric) or not hasattr(metric, "reset"):
            raise InputError(
                f"{where}: expected a metric of torchmetrics, found {metric!r}. Such as "
                "{_target_: torchmetrics.classification.MulticlassF1Score, num_classes: 3, average: macro}."
            )
        if classes:
            measure(metric, torch.eye(classes), torch.arange(classes), where)


def measure(metric: Any, predictions: Tensor, labels: Tensor, where: str) -> float:
    """Return the number that a metric gives for logits (N, C), or classes (N,), and labels (N,).

    Raises:
        InputError: If it gives none; ``where`` names it.
    """
    try:
        value = float(metric(predictions, labels))
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        of = f" on {predictions.shape[-1]} classes" if predictions.ndim > 1 else ""
        raise InputError(f"{where}: {type(metric).__name__}{of}: {reason}") from error
    metric.reset()
    return value


def check_precision(name: str, task: Task) -> None:
    """Refuse tensors to adapt on in double precision, which a network in single precision does not take.

    Raises:
        InputError: If a data set gives such tensors; the message names the task, the split and the item.
    """
    for where, dataset in _to_adapt(name, task):
        for item, inputs in _looks(where, dataset, lambda item: split_item(item)[0]):
            if isinstance(inputs, Tensor) and inputs.dtype == torch.float64:
                raise InputError(
                    f"{where}: {item}: expected float32, found float64. Convert in the data set: inputs.float()."
                )


def check_scored(
    name: str, task: Task, preprocess: Callable[[Any], Inputs] | None = None, collate: Collate = stack
) -> None:
    """Check inputs and labels that a task is scored by, before the work that scoring comes after.

    All labels are looked at where the data set has them beside its images, else those of a few items.

    Args:
        name: Name of the task.
        task: Its data.
        preprocess: Applied to inputs that are not tensors yet.
        collate: Makes inputs a batch.

    Raises:
        InputError: If something is wrong; the message names the task, the split, the item and the remedy.
    """
    key = "dataset" if task.evaluate is None else "evaluate"
    dataset, names = getattr(task, key), task.class_names
    if dataset is None or _is_unmade(dataset):
        return
    where, classes = f"data.tasks.{name}.{key}", len(names) if names else None
    _check_inputs(where, dataset, preprocess, collate)
    list(_looks(where, dataset, lambda item: _check_label(item, classes)))
    if classes is not None:
        check_labels(name, task, classes)


def _check_label(item: Any, classes: int | None) -> None:
    """Refuse an item without the number of a class as its label; texts are scored without one too."""
    inputs, label = split_item(item)
    if label is not None or not isinstance(inputs, Text):
        class_number(label, classes)


def check_labels(name: str, task: Task, classes: int) -> None:
    """Look at all labels that a task is scored by where the data set has them beside its images.

    Raises:
        InputError: If a label is not the number of a class.
    """
    key = "dataset" if task.evaluate is None else "evaluate"
    labels = _labels(getattr(task, key))
    if labels is None or not labels.size or 0 <= labels.min() <= labels.max() < classes:
        return
    low, high = int(labels.min()), int(labels.max())
    remedy = "Subtract 1: labels begin with 0." if (low, high) == (1, classes) else "Are all classes named?"
    raise InputError(
        f"data.tasks.{name}.{key}: labels: expected class numbers from 0 to {classes - 1}, found {low} to {high}. "
        f"{remedy}"
    )


def _to_adapt(name: str, task: Task) -> Iterator[tuple[str, Dataset[Any]]]:
    """Yield a task's data sets to adapt on that can be looked at, after their options."""
    for key in ("dataset", "adapt"):
        dataset = getattr(task, key)
        if dataset is not None and not _is_unmade(dataset):
            yield f"data.tasks.{name}.{key}", dataset


def _is_unmade(dataset: Any) -> bool:
    """Whether a data set makes all its items when one is asked for, and has not yet: the demo zoo's, which fit."""
    return bool(getattr(dataset, "is_unmade", False))


def check_class_names(name: str, task: Task) -> None:
    """Compare a task's class names with one another: those given, and those of each split's folders.

    Raises:
        InputError: If there is one class only, a folder that is no class, or names that contradict one another.
    """
    where = f"data.tasks.{name}"
    for option in ("classes", "templates"):
        if isinstance(getattr(task, option), str):
            raise InputError(
                f"{where}.{option}: expected a list, found the text {getattr(task, option)!r}; write [...]."
            )
    bare = [template for template in task.templates if "{" not in template]
    if bare:
        raise InputError(f"{where}.templates: {bare[0]!r} has no {{}} in the place of the class name. Write it in.")
    folders = {key: _names(getattr(task, key)) for key in _SPLITS}
    for key, names in folders.items():
        _check_folders(f"{where}.{key}", names or [], may_be_pile=key == "adapt")
        _check_depth(f"{where}.{key}", getattr(task, key))
    adapt, evaluate = folders["adapt"], folders["evaluate"]
    if adapt and evaluate and adapt != evaluate and len(adapt) > 1:
        raise InputError(
            f"{where}: adapt and evaluate have different classes: {_difference(adapt, evaluate)}. {_ALIKE}"
        )
    key = next((key for key in ("evaluate", "dataset", "adapt") if folders[key]), "dataset")
    if task.classes is not None and folders[key] and (key != "adapt" or len(folders[key] or []) > 1):
        _check_given(where, key, [str(name) for name in task.classes], folders[key] or [])
    names = task.class_names
    if names is not None and len(names) < 2:
        raise InputError(
            f"{where}: expected at least two classes, found {shorten(names) or 'none'}: nothing to tell apart. Is the "
            "root the folder of the class folders?"
        )


def _names(dataset: Any) -> list[str] | None:
    names = getattr(dataset, "classes", None)
    if not isinstance(names, Iterable) or isinstance(names, (str, Mapping)):
        return None
    return [str(name) for name in names]


def _check_folders(where: str, names: Sequence[str], *, may_be_pile: bool) -> None:
    """Refuse folders whose names are no class's; images to adapt on may lie in one folder of any name."""
    strange = [name for name in names if name.startswith(".") or name.lower() in _NO_CLASSES]
    if strange:
        raise InputError(
            f"{where}: the folder {shorten(strange)} does not look like a class, and would be one. Remove it from the "
            "data set's root."
        )
    if len(names) > may_be_pile and all(name.lower() in _SPLIT_NAMES for name in names):
        raise InputError(
            f"{where}: the classes are called {shorten(names)}, which look like splits: the root is one level too "
            f"high. Name the folder of one split, such as root: .../{names[0]}."
        )


def _check_depth(where: str, dataset: Any) -> None:
    """Refuse folders of classes that all hold the same folders, and no images beside them."""
    root, below = getattr(dataset, "root", None), defaultdict[str, set[str]](set)
    if not isinstance(root, (str, Path)):
        return
    for path, _ in getattr(dataset, "samples", None) or []:
        inside = isinstance(path, (str, Path)) and Path(path).is_relative_to(root)
        if not inside or len(parts := Path(path).relative_to(root).parts) < 3:
            return
        below[parts[0]].add(parts[1])
    names = next(iter(below.values()), set())
    if len(below) > 1 and len(names) > 1 and all(folders == names for folders in below.values()):
        raise InputError(
            f"{where}: the folders {shorten(sorted(below))} hold the same folders {shorten(sorted(names))}: the root "
            f"is one level too high. Name one of them, such as root: {Path(root, min(below))}."
        )


def _check_given(where: str, key: str, given: Sequence[str], folders: Sequence[str]) -> None:
    """Refuse given names that are not as many as the data set's classes, or are its names in another order."""
    if len(given) != len(folders):
        raise InputError(
            f"{where}.classes: expected as many names as {key} has classes, found {len(given)} names, but the data set "
            f"has {len(folders)} classes ({shorten(folders)}). Name each class once, in the order of the labels; are "
            "all class folders there?"
        )
    plain = [_plain(name) for name in folders]
    for position, name in enumerate(map(_plain, given)):
        if name in plain and plain[position] != name:
            raise InputError(
                f"{where}.classes: {given[position]!r} stands at position {position}, but label {position} of {key} is "
                f"{folders[position]!r}. Name the classes in the order of the labels: {shorten(folders, 10)}."
            )


def _plain(name: str) -> str:
    return " ".join(re.split(r"[\W_]+", name.lower())).strip()


def _difference(adapt: Sequence[str], evaluate: Sequence[str]) -> str:
    """Say how two lists of names differ."""
    only = [
        f"only {key} has {shorten([name for name in names if name not in others], 3)}"
        for key, names, others in (("adapt", adapt, evaluate), ("evaluate", evaluate, adapt))
        if set(names) - set(others)
    ]
    return "; ".join(only) or f"their order differs, {shorten(adapt, 3)} and {shorten(evaluate, 3)}"


def _looks(where: str, dataset: Dataset[Any], read: Callable[[Any], T]) -> Iterator[tuple[str, T]]:
    """Yield what ``read`` makes of the first, middle and last item, and their names.

    The run counts the damaged among them, and these are left out here, unless that leaves none.
    """
    count = length_of(dataset, where)
    positions = sorted({0, count // 2, count - 1}) if count else []
    damaged: list[Exception] = []
    for index in positions:
        item = f"item {index} ({item_name(dataset, index)})"
        try:
            with seeded("look"):
                value = read(dataset[index])
        except DAMAGE as error:
            damaged.append(error)
            continue
        except InputError as error:
            raise InputError(f"{where}: {item}: {error}") from error
        except Exception as error:  # what data sets and transforms of others raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise InputError(f"{where}: {item}: {reason}. Mend the data set or its transform.") from error
        yield item, value
    if damaged and len(damaged) == len(positions):
        reason = " ".join(str(damaged[-1]).split()) or type(damaged[-1]).__name__
        raise InputError(f"{where}: none of the items {positions} can be read ({reason}). Mend the data set.")


def _check_inputs(
    where: str, dataset: Dataset[Any], preprocess: Callable[[Any], Inputs] | None, collate: Collate
) -> None:
    """Read a few items as a run would."""
    shapes: dict[Any, tuple[str, Inputs]] = {}
    for item, inputs in _looks(where, dataset, lambda item: input_of(split_item(item)[0], preprocess)):
        # The lengths of a mapping's tensors may differ: the backbone pads them.
        shape = tuple(inputs.shape) if isinstance(inputs, Tensor) else frozenset(inputs)
        shapes.setdefault(shape, (item, inputs))
    if len(shapes) > 1:
        (of_first, first), (of_second, second) = list(shapes.values())[:2]
        if collate is not stack:
            try:
                collate([first, second])
            except InputError as error:
                raise InputError(f"{where}: {of_first}, {of_second}: {error}") from error
            return
        if isinstance(first, Tensor) and isinstance(second, Tensor):
            raise InputError(
                f"{where}: {of_first} has the shape {tuple(first.shape)}, {of_second} {tuple(second.shape)}: no batch "
                "has both. Give images, which the backbone's preprocessing resizes, or resize and crop in the data "
                "set's transform."
            )
        raise InputError(
            f"{where}: {of_first} is {described(first)}, {of_second} {described(second)}: no batch has both."
        )


def _labels(dataset: Any) -> np.ndarray | None:
    """Return the whole numbers (N,) that a data set has as labels; None where it does not show them."""
    if type(dataset) is Subset:
        labels = _labels(dataset.dataset)
        return None if labels is None else labels[np.asarray(dataset.indices, dtype=np.int64)]
    if getattr(dataset, "target_transform", None) is not None:
        return None
    if isinstance(dataset, TensorDataset):
        candidates: list[Any] = list(dataset.tensors[1:2])
    elif isinstance(dataset, (list, tuple)):
        candidates = [[item[1] for item in dataset if isinstance(item, (list, tuple)) and len(item) > 1]]
    else:
        candidates = [getattr(dataset, name, None) for name in ("targets", "labels", "_labels")]
    for labels in candidates:
        if isinstance(labels, (list, tuple, np.ndarray, Tensor)) and len(labels) == length_of(dataset):
            numbers = np.asarray(labels) if not isinstance(labels, Tensor) else labels.cpu().numpy()
            if numbers.ndim == 1 and numbers.dtype.kind in "iu":
                return numbers
    return None
