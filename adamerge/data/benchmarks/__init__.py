"""The field's tasks, ready to use: SUN397, Cars, RESISC45, EuroSAT, SVHN, GTSRB, MNIST, DTD and twelve more."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from adamerge.data.benchmarks.definitions import BENCHMARKS, Definition, definition, names
from adamerge.data.benchmarks.opening import Split, open_split
from adamerge.data.task import Task
from adamerge.errors import InputError, check_choice

__all__ = ["BENCHMARKS", "Definition", "Split", "definition", "names", "open_split", "task"]


def task(
    name: str,
    root: str | Path = "data",
    *,
    adapt: Literal["test", "train", "val"] = "test",
    naming: Literal["published", "plain"] = "published",
    classes: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    expert: str | None = None,
) -> Task:
    """Return one of the field's tasks, from files that are there; nothing is downloaded.

    Args:
        name: Name of the data set, see :func:`names`.
        root: Folder of the data sets, as torchvision's ``root``.
        adapt: Images to adapt on: ``test``, which the protocol divides or uses twice; ``train`` or ``val``, with the
            whole test set scored.
        naming: Class names in prompts: those that the published heads were made with, or plain ones; they differ
            for CIFAR-100, Food-101 and FER2013 (underscores, several names at once).
        classes: Class names instead, in the order of the labels.
        templates: Prompts instead.
        expert: Name of the expert that belongs to the task; default the task's own name.

    Raises:
        InputError: If there is no such data set, or it is not complete.
    """
    facts = definition(name)
    check_choice(f"{name}: naming", naming, ("published", "plain"))
    if adapt not in facts.splits:
        raise InputError(f"{name}: adapt: {facts.title} has {', '.join(facts.splits)}, found {adapt!r}.")
    if classes is not None and len(classes) != len(facts.classes):
        raise InputError(f"{name}: classes: expected {len(facts.classes)} names, found {len(classes)}.")
    published = facts.published_classes if naming == "published" else None
    options = {
        "classes": list(classes or published or facts.classes),
        "templates": list(templates or facts.templates),
        "expert": expert,
    }
    scored = open_split(name, "test", root)
    if adapt == "test":
        return Task(dataset=scored, **options)  # type: ignore[arg-type]
    return Task(adapt=open_split(name, adapt, root), evaluate=scored, **options)  # type: ignore[arg-type]
