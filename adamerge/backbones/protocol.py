"""The contract of backbones."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.data.batch import Collate, Read, Valid, read_output, stack
from adamerge.data.first_look import check_labels
from adamerge.data.task import Task
from adamerge.errors import InputError, did_you_mean

_TEMPLATE = re.compile(r"[^{}]*(\{0?\}[^{}]*)+")


class Backbone(Protocol):
    """A shared encoder, and how its checkpoints and tasks go with it.

    A backbone may have three methods more, for networks whose inputs are mappings or whose output is no tensor:

    - ``collate(samples) -> Inputs``: makes what :meth:`preprocess` gives, B samples without batch axis, a batch, and
      pads them where their lengths differ (:func:`adamerge.data.batch.pad`). Default: stacks them, of one shape.
    - ``read(output, inputs) -> Outputs``: reads the network's result. Its ``features`` are what a task's head takes,
      its ``logits`` (B, ..., C) what counts where there is no head. Default: :func:`adamerge.data.batch.read_output`.
    - ``valid(inputs) -> Tensor | None``: the rows of the logits that count, see
      :class:`adamerge.data.batch.Outputs`; known before the network runs, so that devices can weigh by their rows.
      Default None: all of them.

    A mapping is the network's keyword arguments. Keys that begin with an underscore go to ``read`` and ``valid`` only.
    What a network keeps from call to call, such as the cache of a language model, must be off.

    Attributes:
        prefix: Prefix of the encoder's keys in checkpoint files; other keys are not merged.
        exclude: Globs of parameter names that are not merged, such as a classifier in the experts' files.
    """

    @property
    def prefix(self) -> str:
        """Key prefix of the encoder's tensors, such as ``"visual."``."""
        ...

    @property
    def exclude(self) -> tuple[str, ...]:
        """Globs of names to leave out."""
        ...

    def encoder(self) -> nn.Module:
        """Return the network, called with inputs, in general to features (B, F); its weights do not matter."""
        ...

    def preprocess(self) -> Callable[[Any], Any] | None:
        """Return the transform from a data set's item, such as a PIL image or a text, to an input without batch axis.

        That is a tensor, or a mapping of tensors; None where data sets give tensors themselves.
        """
        ...

    def heads(
        self, base: Checkpoint, experts: Mapping[str, Checkpoint], tasks: Mapping[str, Task]
    ) -> dict[str, nn.Module]:
        """Return each task's frozen classifier, features (B, F) to logits (B, C); {} where the network has its own."""
        ...

    def sidecar(self) -> dict[str, Any] | None:
        """Return ``open_clip_config.json``'s content where the export is an open_clip model."""
        ...


def own_base(backbone: Backbone, *, download: bool) -> Path | None:
    """Return the base that a backbone itself names, None where it names none.

    Args:
        backbone: With or without a method ``base``, see :class:`~adamerge.backbones.OpenClip`.
        download: Whether to download what is not here; else None is returned for that.
    """
    find = getattr(backbone, "base", None)
    path: Path | None = None if find is None else find(download=download)
    return path


def collate_of(backbone: Backbone) -> Collate:
    """Return how a backbone makes samples a batch."""
    collate: Collate = getattr(backbone, "collate", stack)
    return collate


def read_of(backbone: Backbone) -> Read:
    """Return how a backbone reads its network's result."""
    read: Read = getattr(backbone, "read", read_output)
    return read


def valid_of(backbone: Backbone) -> Valid | None:
    """Return how a backbone tells which rows count; None where all do."""
    valid: Valid | None = getattr(backbone, "valid", None)
    return valid


def check_templates(name: str, templates: Sequence[str]) -> None:
    """Check that a task's templates have ``{}`` in the place of the class name, and no other field.

    A field may ask for a text of any width, ``{:>9999999999}``.

    Raises:
        InputError: If not.
    """
    for template in templates:
        if not isinstance(template, str) or not _TEMPLATE.fullmatch(template):
            raise InputError(
                f"data.tasks.{name}.templates: expected texts with {{}} in the place of the class name, found "
                f"{repr(template)[:80]}."
            )


def expert_of(name: str, task: Task, experts: Mapping[str, Checkpoint], part: str) -> Checkpoint:
    """Return the expert of a task, whose ``part`` is the task's head.

    Raises:
        InputError: If the pool has none.
    """
    expert = task.expert or name
    if expert not in experts:
        raise InputError(
            f"data.tasks.{name}.expert: no expert {expert!r} in the pool, whose {part} would be the head."
            f"{did_you_mean(expert, experts)}"
        )
    return experts[expert]


def check_classes(tasks: Mapping[str, Task], heads: Mapping[str, nn.Module], features: int) -> None:
    """Check that every head has as many classes as its task's data, and that no label is beyond them.

    Args:
        tasks: Task name to its data.
        heads: Task name to classifier.
        features: F, the width of the encoder's features.

    Raises:
        InputError: If they differ.
    """
    for name, task in tasks.items():
        data = task.evaluate or task.dataset or task.adapt
        names = getattr(data, "classes", None) or task.class_names
        with torch.no_grad():
            classes = heads[name](torch.zeros(1, features)).shape[-1]
        if names is not None and len(names) != classes:
            raise InputError(
                f"data.tasks.{name}: the data set has {len(names)} classes, but its head has {classes}. "
                "Is it the expert's own data set, and are all class folders there?"
            )
        check_labels(name, task, classes)
