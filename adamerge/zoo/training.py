"""How a zoo's models are trained: a contrastive base, then experts against frozen text heads.

Shapes: B images in a batch, U different classes among them, F features, C classes of a task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from adamerge.zoo.design import Design, TrainingPlan

if TYPE_CHECKING:
    from open_clip import CLIP


def train_base(model: CLIP, design: Design, seed: int, advance: Callable[[], None]) -> None:
    """Train both towers in place so that images of a class meet its captions.

    Args:
        model: Changed in place.
        design: The images that the base is pretrained on, their order, and how it is trained.
        seed: Seed of images, batches and captions.
        advance: Called after every step.
    """
    recipe, curriculum, templates = design.base, design.curriculum, design.templates
    num_clean = curriculum.num_images // 3
    clean = design.pretraining("clean", num_clean, seed)
    generic = design.pretraining("generic", curriculum.num_images - num_clean, seed)
    images, labels = (torch.cat(parts) for parts in zip(clean, generic, strict=True))
    tokenizer = design.tokenizer()
    captions = torch.stack([tokenizer([t.format(name) for t in templates]) for name in design.pretraining_classes])
    generator = torch.Generator().manual_seed(seed)

    def draw(step: int) -> Tensor:
        population = num_clean if step < curriculum.clean_steps else len(labels)
        return torch.randint(population, (recipe.batch_size,), generator=generator)

    def loss(index: Tensor) -> Tensor:
        classes, target = labels[index].unique(return_inverse=True)  # (U,), (B,)
        template = torch.randint(len(templates), (len(classes),), generator=generator)
        text = model.encode_text(captions[classes, template], normalize=True)  # (U, F)
        image = model.encode_image(images[index], normalize=True)  # (B, F)
        return _contrast(model.logit_scale.exp() * image @ text.T, target)

    fit(model.parameters(), loss, draw, recipe, advance)


def train_expert(
    model: CLIP,
    head: Tensor,
    data: tuple[Tensor, Tensor],
    recipe: TrainingPlan,
    seed: int,
    advance: Callable[[], None],
) -> None:
    """Fine-tune the visual tower in place on one task; the text tower and the head stay as they are.

    Args:
        model: Its visual tower is changed in place.
        head: Class embeddings, shape ``(F, C)``.
        data: Images ``(N, 3, S, S)`` and labels ``(N,)``.
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

    fit(model.visual.parameters(), loss, draw, recipe, advance)


def fit(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[Tensor], Tensor],
    draw: Callable[[int], Tensor],
    recipe: TrainingPlan,
    advance: Callable[[], None],
) -> None:
    """Minimize ``loss`` of the sample indices (B,) that ``draw`` gives for each step; changes the parameters."""
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


def fit_labels(
    parameters: Iterable[nn.Parameter],
    logits: Callable[[list[list[int]]], Tensor],
    texts: tuple[Sequence[list[int]], Tensor],
    recipe: TrainingPlan,
    advance: Callable[[], None],
) -> None:
    """Train parameters by cross-entropy on batches of texts, drawn by torch's own generator.

    Args:
        parameters: Changed in place.
        logits: The ids of B texts to (B, C).
        texts: The ids of each, and the labels (N,), of C.
        recipe: How it is trained.
        advance: Called after every step.
    """
    ids, labels = texts

    def draw(step: int) -> Tensor:
        return torch.randint(len(ids), (recipe.batch_size,))

    def loss(index: Tensor) -> Tensor:
        return functional.cross_entropy(logits([ids[position] for position in index.tolist()]), labels[index])

    fit(parameters, loss, draw, recipe, advance)


def _learning_rate_factor(step: int, recipe: TrainingPlan) -> float:
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _contrast(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy image to caption, and caption to all its images; ``logits`` is ``(B, U)``."""
    positive = functional.one_hot(target, logits.shape[1]).to(logits)  # (B, U)
    to_images = -(logits.log_softmax(0) * positive / positive.sum(0)).sum(0).mean()
    return (functional.cross_entropy(logits, target) + to_images) / 2
