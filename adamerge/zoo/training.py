"""How the demo zoo's models are trained: a contrastive base, then experts against frozen text heads.

Shapes: B images in a batch, U different classes among them, F features, C classes of a task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from adamerge.zoo.images import PRETRAINING_CLASSES, TEMPLATES, pretraining_images
from adamerge.zoo.tokenizer import Tokenizer

if TYPE_CHECKING:
    from open_clip import CLIP


@dataclass(frozen=True)
class Recipe:
    """How one model is trained: AdamW, linear warm-up, cosine decay to zero.

    Args:
        steps: Optimizer steps.
        batch_size: Images per step.
        learning_rate: Largest learning rate.
        weight_decay: Of tensors with two dimensions or more; the others have none.
        warmup: Steps of linear warm-up.
    """

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup: int = 0


@dataclass(frozen=True)
class Curriculum:
    """What the base sees when.

    Args:
        num_images: Size of the pretraining set, one third clean and two thirds generic.
        clean_steps: First steps with clean images only; without them the loss stalls for hundreds of steps.
    """

    num_images: int = 24_000
    clean_steps: int = 150


def train_base(model: CLIP, recipe: Recipe, curriculum: Curriculum, seed: int, advance: Callable[[], None]) -> None:
    """Train both towers in place so that images of a class meet its captions.

    Args:
        model: Changed in place.
        recipe: How it is trained.
        curriculum: What it sees when.
        seed: Seed of images, batches and captions.
        advance: Called after every step.
    """
    num_clean = curriculum.num_images // 3
    clean = pretraining_images("clean", num_clean, seed)
    generic = pretraining_images("generic", curriculum.num_images - num_clean, seed)
    images, labels = (torch.cat(parts) for parts in zip(clean, generic, strict=True))
    tokenizer = Tokenizer()
    captions = torch.stack([tokenizer([t.format(name) for t in TEMPLATES]) for name in PRETRAINING_CLASSES])
    generator = torch.Generator().manual_seed(seed)

    def draw(step: int) -> Tensor:
        population = num_clean if step < curriculum.clean_steps else curriculum.num_images
        return torch.randint(population, (recipe.batch_size,), generator=generator)

    def loss(index: Tensor) -> Tensor:
        classes, target = labels[index].unique(return_inverse=True)  # (U,), (B,)
        template = torch.randint(len(TEMPLATES), (len(classes),), generator=generator)
        text = model.encode_text(captions[classes, template], normalize=True)  # (U, F)
        image = model.encode_image(images[index], normalize=True)  # (B, F)
        return _contrast(model.logit_scale.exp() * image @ text.T, target)

    _fit(model.parameters(), loss, draw, recipe, advance)


def train_expert(
    model: CLIP,
    head: Tensor,
    data: tuple[Tensor, Tensor],
    recipe: Recipe,
    seed: int,
    advance: Callable[[], None],
) -> None:
    """Fine-tune the visual tower in place on one task; the text tower and the head stay as they are.

    Args:
        model: Its visual tower is changed in place.
        head: Class embeddings, shape ``(F, C)``.
        data: Images ``(N, 3, 28, 28)`` and labels ``(N,)``.
        recipe: How it is trained.
        seed: Seed of the batches.
        advance: Called after every step.
    """
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    scale = model.logit_scale.detach().exp()

    def draw(step: int) -> Tensor:
        return torch.randint(len(labels), (recipe.batch_size,), generator=generator)

    def loss(index: Tensor) -> Tensor:
        features = model.encode_image(images[index], normalize=True)
        return functional.cross_entropy(scale * features @ head, labels[index])

    _fit(model.visual.parameters(), loss, draw, recipe, advance)


def _fit(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[Tensor], Tensor],
    draw: Callable[[int], Tensor],
    recipe: Recipe,
    advance: Callable[[], None],
) -> None:
    """Minimize ``loss`` of the image indices that ``draw`` gives for each step; changes the parameters."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, recipe))
    for step in range(recipe.steps):
        optimizer.zero_grad()
        loss(draw(step)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        advance()


def _learning_rate_factor(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _contrast(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy image to caption, and caption to all its images; ``logits`` is ``(B, U)``."""
    positive = functional.one_hot(target, logits.shape[1]).to(logits)  # (B, U)
    to_images = -(logits.log_softmax(0) * positive / positive.sum(0)).sum(0).mean()
    return (functional.cross_entropy(logits, target) + to_images) / 2
