"""Frozen classifiers of tasks, in a file beside the models: class sentences' features, or probes."""

from collections.abc import Iterable
from pathlib import Path

from torch import nn

from adamerge.checkpoints.checkpoint import load_state_dict
from adamerge.errors import InputError, did_you_mean


def read_classifiers(path: str | Path, tasks: Iterable[str]) -> dict[str, nn.Module]:
    """Return the classifier of each task, features (B, F) to logits (B, C).

    Args:
        path: A checkpoint with ``TASK.weight`` (C, F) and, where there is one, ``TASK.bias`` (C,).
        tasks: Names of the tasks.

    Raises:
        InputError: If the file cannot be read, or lacks a task.
    """
    tensors = load_state_dict(path)
    names = sorted(key.removesuffix(".weight") for key in tensors if key.endswith(".weight"))
    heads: dict[str, nn.Module] = {}
    for task in tasks:
        if task not in names:
            raise InputError(
                f"backbone.classifiers: {path} has no {task}.weight.{did_you_mean(task, names)} It has classifiers of: "
                f"{', '.join(names) or 'none'}."
            )
        own = {key: tensors[f"{task}.{key}"].float() for key in ("weight", "bias") if f"{task}.{key}" in tensors}
        shapes = {key: tuple(value.shape) for key, value in own.items()}
        if len(shapes["weight"]) != 2 or shapes.get("bias", shapes["weight"][:1]) != shapes["weight"][:1]:
            raise InputError(
                f"backbone.classifiers: {path}: {task}: expected weight (C, F) and bias (C,), found {shapes}."
            )
        classes, features = own["weight"].shape
        head = nn.utils.skip_init(nn.Linear, features, classes, bias="bias" in own)
        head.load_state_dict(own)
        heads[task] = head.requires_grad_(False)
    return heads
