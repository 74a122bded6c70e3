"""The texts of a zoo as tasks to adapt on and to be scored on."""

from __future__ import annotations

import json
from pathlib import Path

from adamerge.data.task import Task
from adamerge.data.texts import Texts
from adamerge.errors import InputError

FOLDER = "texts"


def text_tasks(folder: str | Path) -> dict[str, Task]:
    """Return the tasks of a zoo: its split ``adapt`` adapts, its split ``test`` is scored.

    Args:
        folder: Folder of the zoo.

    Raises:
        InputError: If the folder holds no finished zoo.
    """
    path = Path(folder) / "zoo.json"
    try:
        classes: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))["classes"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: expected what adamerge zoo build writes, found no such file.") from error
    tasks = {}
    for name, names in classes.items():
        splits = {split: Path(folder) / FOLDER / name / f"{split}.jsonl" for split in ("adapt", "test")}
        adapt, test = (Texts(file, classes=names) for file in splits.values())
        tasks[name] = Task(adapt=adapt, evaluate=test, classes=names)
    return tasks
