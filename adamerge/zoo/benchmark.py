"""The offline benchmark: a larger zoo with Fashion-MNIST beside the demo's tasks, made on the user's machine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from adamerge.data.benchmarks import definition, open_split
from adamerge.data.task import Task
from adamerge.errors import InputError
from adamerge.zoo.design import SOURCES, Curriculum, Design, TrainingPlan, training_images
from adamerge.zoo.glyphs import STYLES, random_affine
from adamerge.zoo.images import (
    CLASSES,
    PRETRAINING_CLASSES,
    TASKS,
    TEMPLATES,
    ZooImages,
    normalise,
    pretraining_images,
    seeded,
)
from adamerge.zoo.model import BENCHMARK, clip_config
from adamerge.zoo.tokenizer import CONTEXT_LENGTH

DEBIAN = Path("/usr/share/datasets")
"""Where Debian's package ``dataset-fashion-mnist`` puts its files."""

FASHION: tuple[str, ...] = tuple(name.lower() for name in definition("fashion_mnist").classes)
BENCHMARK_CLASSES: dict[str, tuple[str, ...]] = {"fashion": FASHION, **CLASSES}

_VOCABULARY = 49408  # open_clip's, whole: prompts may have any word
_PRETRAINING = slice(0, 5000)  # of Fashion-MNIST's 60,000 training images
_EXPERT = slice(5000, 25_000)
_GARMENTS = 0.25  # share of them in the generic part of the pretraining set


class FashionImages(TensorDataset):
    """Images of Fashion-MNIST in the form of the zoos' images.

    Args:
        split: ``train`` or ``test``.
        root: Folder of the data sets; without the files there, those of Debian's package are taken.
        part: Which of the images.

    Attributes:
        images: Shape ``(N, 3, 28, 28)``, float32 in [-1, 1].
        labels: Shape ``(N,)``, int64.

    Raises:
        InputError: If the files are in neither place.
    """

    def __init__(self, split: str, root: str | Path, part: slice = slice(None)) -> None:
        pixels, labels = _fashion(split, Path(root))
        self.images = normalise(pixels[part, None].float().div(255).expand(-1, 3, -1, -1))
        self.labels = labels[part].clone()
        super().__init__(self.images, self.labels)


def _fashion(split: str, root: Path) -> tuple[Tensor, Tensor]:
    """Return pixels (N, 28, 28), uint8, and labels (N,)."""
    try:
        dataset: Any = open_split("fashion_mnist", split, root).dataset
    except InputError as missing:
        try:
            dataset = open_split("fashion_mnist", split, DEBIAN).dataset
        except InputError:
            raise InputError(
                f"The offline benchmark needs Fashion-MNIST, which is neither below {root} nor below {DEBIAN} "
                f"({missing}) Get it in one of two ways: apt install dataset-fashion-mnist (Debian, Ubuntu); or "
                f"adamerge data get fashion_mnist --root {root}, which makes torchvision's folder; another folder is "
                "named by data.root=DIR, --root DIR or the environment variable ADAMERGE_DATA."
            ) from missing
    return dataset.data, dataset.targets


def benchmark_tasks(root: str | Path, seed: int = 0) -> dict[str, Task]:
    """Return the seven tasks' test images, class names and prompts; the protocol divides the images.

    Args:
        root: Folder of the data sets.
        seed: Seed of the drawn characters.

    Raises:
        InputError: If Fashion-MNIST is not there.
    """
    images = {"fashion": FashionImages("test", root), **{name: ZooImages(name, "test", seed) for name in TASKS}}
    return {
        name: Task(dataset=images[name], classes=names, templates=TEMPLATES)
        for name, names in BENCHMARK_CLASSES.items()
    }


def benchmark_design(root: str | Path) -> Design:
    """Return how the benchmark's zoo is made.

    Args:
        root: Folder of the data sets, where Fashion-MNIST is looked for.
    """
    return Design(
        name=BENCHMARK,
        classes=BENCHMARK_CLASSES,
        pretraining_classes=(*PRETRAINING_CLASSES, *FASHION),
        templates=TEMPLATES,
        config=lambda: clip_config(128, width=192, layers=6, head_width=64, vocabulary=_VOCABULARY),  # 2.7 M parameters
        tokenizer=_tokenizer,
        images=functools.partial(_images, Path(root)),
        pretraining=functools.partial(_pretraining, Path(root)),
        base=TrainingPlan(steps=900, batch_size=128, learning_rate=1.5e-3, weight_decay=0.05, warmup=50),
        expert=TrainingPlan(steps=150, batch_size=64, learning_rate=4e-4, weight_decay=0.1),
        curriculum=Curriculum(num_images=36_000, clean_steps=150),
        sources={"fashion": "Fashion-MNIST (H. Xiao, K. Rasul, R. Vollgraf; Zalando SE): MIT", **SOURCES},
    )


def _images(root: Path, task: str, seed: int) -> FashionImages | ZooImages:
    return FashionImages("train", root, _EXPERT) if task == "fashion" else training_images(task, seed)


def _pretraining(root: Path, style: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw the demo's pretraining images, and among the generic ones garments that no expert is trained on."""
    garments = round(_GARMENTS * count) if style == "generic" else 0
    images, labels = pretraining_images(style, count - garments, seed)
    if not garments:
        return images, labels
    pixels, classes = (values[_PRETRAINING] for values in _fashion("train", root))
    rng = seeded("fashion", f"pretraining/{style}", seed)
    chosen = torch.from_numpy(rng.permutation(np.arange(garments) % len(pixels)))
    masks = random_affine(pixels[chosen, None].float() / 255, rng, 30.0)
    photographed = normalise(STYLES[style](masks, rng))
    return torch.cat([images, photographed]), torch.cat([labels, classes[chosen] + len(PRETRAINING_CLASSES)])


def _tokenizer() -> Callable[[list[str]], Tensor]:
    from open_clip.tokenizer import SimpleTokenizer  # imports slowly

    tokenizer: Callable[[list[str]], Tensor] = SimpleTokenizer(context_length=CONTEXT_LENGTH)
    return tokenizer
