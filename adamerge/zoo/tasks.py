"""The zoo's tasks as the trainer wants them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from adamerge.zoo.images import CLASSES, TASKS, TEMPLATES, ZooImages

if TYPE_CHECKING:
    from adamerge.data.task import Task


def tasks(split: str = "test", seed: int = 0) -> dict[str, Task]:
    """Return the six tasks: images of a split, class names and prompts.

    Args:
        split: Which images, see :class:`~adamerge.zoo.images.ZooImages`; the protocol divides them.
        seed: Of the images.
    """
    from adamerge.data.unlabeled_tasks import Task  # imports Lightning

    images = _images(split, seed)
    return {name: Task(dataset=images[name], classes=CLASSES[name], templates=TEMPLATES) for name in TASKS}


@functools.lru_cache(maxsize=1)  # runs in one process draw them once
def _images(split: str, seed: int) -> dict[str, ZooImages]:
    return {name: ZooImages(name, split, seed) for name in TASKS}
