"""Make a zoo: train one base and an expert per task, write them with what is known about them."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors.torch import load_file, save
from torch import Tensor, nn

from adamerge.system.files import atomic_path, remove_temporaries, save_json, sha256
from adamerge.system.progress import Stopwatch
from adamerge.system.progress import bar as progress_bar
from adamerge.zoo.design import DEMO, Design
from adamerge.zoo.model import CONFIG_FILE, model_from_config
from adamerge.zoo.progress import BuildRecord
from adamerge.zoo.training import train_base, train_expert

if TYPE_CHECKING:
    from open_clip import CLIP
    from rich.progress import Progress

POOL_FILE = "pool.yaml"

_BASE = "base.safetensors"
_NUM_HELD_OUT = {"digits": 200}  # last images of the training split, never trained on; 500 for the other tasks
_PACKAGES = ("torch", "numpy", "open_clip_torch", "mlxtend", "scikit-learn", "matplotlib")
_CRITERION = "mean over tasks of held-out accuracy: expert + 0.25 * zero-shot base"


def build(output: str | Path, seed: int = 0, progress: bool = True, *, design: Design | None = None) -> dict[str, Any]:
    """Train the base and the experts, and write the zoo; models that an interrupted build has finished are kept.

    The same seed, thread count and package versions give the same weights, interrupted or not.

    Args:
        output: Folder to write to; created if missing.
        seed: Seed of weights, drawn images and batches.
        progress: Show progress bars.
        design: What is made, and how; default the demo zoo.

    Returns:
        The content of ``zoo.json``: seed, versions, held-out accuracies, seconds, hashes, sources.

    Raises:
        InputError: If a package or data set that holds the images is missing, or the folder holds another zoo.
    """
    output, design = Path(output), design or DEMO
    recipe = {part: asdict(getattr(design, part)) for part in ("base", "expert", "curriculum")}
    key = {"name": design.name, "seed": seed, "recipe": recipe}
    record = BuildRecord(output, key)
    if record.finished is not None:
        return record.finished
    (output / "experts").mkdir(parents=True, exist_ok=True)
    remove_temporaries(output)
    save_json(design.config(), output / CONFIG_FILE)
    with progress_bar("steps", draw=progress) as bars, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_from_config(design.config()).train()
        _make_base(model, design, seed, record, bars)
        start = {name: value.clone() for name, value in model.visual.state_dict().items()}
        for task in design.classes:
            model.visual.load_state_dict(start)
            _make_expert(model, design, task, seed, record, bars)
    accuracy = {task: record.accuracy[task] for task in design.classes}
    facts = {
        **key,
        "held_out_accuracy": accuracy,
        "criterion": {"rule": _CRITERION, "value": _criterion(accuracy)},
        "seconds": {part: record.seconds[part] for part in ("base", *design.classes)},
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "sha256": _write_pool(design, record),
        "sources": dict(design.sources),
    }
    record.finish(facts)
    return facts


def _make_base(model: CLIP, design: Design, seed: int, record: BuildRecord, bars: Progress) -> None:
    """Train and write the base, or read it where it is done; ``model`` becomes it."""
    if not record.is_written(_BASE):
        watch = Stopwatch()
        train_base(model, design, seed, _advance(bars, "base", design.base.steps))
        _save(record.folder / _BASE, model)
        record.add(_BASE, watch.seconds())
    model.load_state_dict(load_file(record.folder / _BASE))


def _make_expert(model: CLIP, design: Design, task: str, seed: int, record: BuildRecord, bars: Progress) -> None:
    """Train and write one expert from the base in ``model``, unless it is done; note its accuracy before and after."""
    from open_clip import build_zero_shot_classifier

    file = _expert(task)
    if record.is_written(file):
        return
    data, watch = design.images(task, seed), Stopwatch()
    head: Tensor = build_zero_shot_classifier(
        model, design.tokenizer(), list(design.classes[task]), list(design.templates)
    )
    cut = len(data.labels) - _NUM_HELD_OUT.get(task, 500)
    held_out = data.images[cut:], data.labels[cut:]
    accuracy = {"base": _accuracy(model, head, *held_out)}
    train = data.images[:cut], data.labels[:cut]
    train_expert(model, head, train, design.expert, seed, _advance(bars, task, design.expert.steps))
    _save(record.folder / file, model, prefix="visual.")
    accuracy["expert"] = _accuracy(model, head, *held_out)
    record.add(file, watch.seconds(), accuracy)


def _expert(task: str) -> str:
    return f"experts/{task}.safetensors"


def _advance(bars: Progress, name: str, steps: int) -> Callable[[], None]:
    """Open a progress bar and return what advances it."""
    return functools.partial(bars.advance, bars.add_task(name, total=steps, detail=""))


@torch.no_grad()
def _accuracy(model: CLIP, head: Tensor, images: Tensor, labels: Tensor) -> float:
    predicted = torch.cat([(model.encode_image(part) @ head).argmax(1) for part in images.split(250)])
    return round((predicted == labels).float().mean().item(), 4)


def _criterion(accuracy: Mapping[str, Mapping[str, float]]) -> float:
    rows = list(accuracy.values())
    return round(sum(row["expert"] + 0.25 * row["base"] for row in rows) / len(rows), 4)


def _write_pool(design: Design, record: BuildRecord) -> dict[str, str]:
    """Write the pool file, unless the user has edited it; return the hashes of all files, as a build writes them."""
    files = [CONFIG_FILE, _BASE, *map(_expert, design.classes)]
    hashes = {file: sha256(record.folder / file) for file in files}
    experts = {task: {"file": _expert(task), "task": task, "sha256": hashes[_expert(task)]} for task in design.classes}
    content = {"base": {"file": _BASE, "sha256": hashes[_BASE]}, "key_prefix": "visual.", "experts": experts}
    text = yaml.safe_dump(content, sort_keys=False).encode()
    path = record.folder / POOL_FILE
    if not path.is_file() or POOL_FILE not in record.hashes or record.is_written(POOL_FILE):
        with atomic_path(path) as temporary:
            temporary.write_bytes(text)
    return {**hashes, POOL_FILE: hashlib.sha256(text).hexdigest()}


@torch.no_grad()
def _save(path: Path, model: nn.Module, prefix: str = "") -> None:
    """Round the model to half precision in place, and write its tensors whose names start with ``prefix``."""
    for parameter in model.parameters():
        parameter.copy_(parameter.half())
    tensors = {name: value.half() for name, value in model.state_dict().items() if name.startswith(prefix)}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(tensors, metadata={"format": "pt"}))
