"""The contract of backbones."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.data.first_look import check_labels
from adamerge.data.task import Task
from adamerge.errors import InputError


class Backbone(Protocol):
    """A shared encoder, and how its checkpoints and tasks go with it.

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
        """Return the encoder, inputs to features (B, F); its weights do not matter."""
        ...

    def preprocess(self) -> Callable[[Any], Tensor] | None:
        """Return the transform from a PIL image to an input; None where data sets give tensors themselves."""
        ...

    def heads(
        self, base: Checkpoint, experts: Mapping[str, Checkpoint], tasks: Mapping[str, Task]
    ) -> dict[str, nn.Module]:
        """Return each task's frozen classifier, features (B, F) to logits (B, C)."""
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
