"""torchvision's state dict: a ``.pth`` file of tensors for ``torchvision.models.get_model``."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from adamerge.backbones import Torchvision
from adamerge.errors import InputError
from adamerge.results.formats.merged import MergedFolder, Usage, check_equal, describe, example
from adamerge.system.archives import stored_members
from adamerge.system.files import save_json

WEIGHTS = "model.pth"

_NO_TASK = (
    "The classifier is the base's: none of the tasks'. Those are in `heads.safetensors`, as `TASK/weight` and "
    "`TASK/bias`; `adamerge export ... --task TASK` puts one in its place."
)


def write(merged: MergedFolder, folder: Path, task: str | None = None) -> Usage:
    """Write the whole model with the base's classifier, or with a task's.

    Raises:
        InputError: If the merge is not of torchvision models, or has no classifier to write.
    """
    backbone = _backbone_of(merged)
    tensors = {key: merged.checkpoint.get(key).clone() for key in merged.checkpoint.keys}
    names = [f"{backbone.head}.{part}" for part in ("weight", "bias")]
    if task is not None:
        head = merged.head(task)
        if not isinstance(head, nn.Linear):
            raise InputError(
                f"--to torchvision: task {task!r}: expected a Linear head, which the model's {backbone.head!r} can be, "
                f"found {type(head).__name__}. Choose --to onnx."
            )
        tensors |= {f"{backbone.head}.{part}": tensor for part, tensor in head.state_dict().items()}
    elif not set(names) <= set(tensors):
        raise InputError(
            f"--to torchvision: the base has no classifier {backbone.head!r} that the model could have. Give --task "
            f"NAME, whose head to use: one of {', '.join(merged.heads) or 'none'}."
        )
    torch.save(tensors, folder / WEIGHTS)
    preprocessing = preprocessing_of(backbone.preprocess())
    save_json(preprocessing, folder / "preprocessing.json")
    files = {WEIGHTS: "the state dict", "preprocessing.json": "what images go through"}
    notes = (_NO_TASK if task is None else f"The classifier is that of the task {task}.",)
    options = {"model": backbone.model, "classes": len(tensors[names[0]])}
    return Usage("torchvision", "image-classification", files, preprocessing, notes, options)


def prove(merged: MergedFolder, folder: Path, task: str | None = None) -> None:
    """Load the file strictly in torchvision, and compare logits, or without a task what enters the classifier.

    Raises:
        GuardError: If they differ.
    """
    from torchvision import models

    backbone = _backbone_of(merged)
    with (folder / WEIGHTS).open("rb") as file:
        stored_members(file)
        file.seek(0)
        tensors = torch.load(file, weights_only=True)
    model = models.get_model(backbone.model, weights=None, num_classes=len(tensors[f"{backbone.head}.weight"])).float()
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise InputError(f"{merged.path}: not a model of torchvision: {' '.join(str(error).split())}") from error
    head = nn.Identity() if task is None else merged.head(task)
    if task is None:
        model.set_submodule(backbone.head, nn.Identity())
    images = example(merged.backbone, 2)
    with torch.no_grad():
        check_equal(model.eval()(images), head(merged.encoder()(images)), f"{folder.name} in torchvision")


def preprocessing_of(transform: Any) -> dict[str, Any]:
    """Return what is known of a transform, ready for JSON: a torchvision preset's settings, or how it is printed."""
    if transform is None:
        return {}
    names = ("resize_size", "crop_size", "mean", "std", "interpolation", "antialias")
    settings = {name: getattr(transform, name) for name in names if hasattr(transform, name)}
    if "mean" not in settings:
        return {"transform": repr(transform)}
    return {name: getattr(value, "value", value) for name, value in settings.items()}


def _backbone_of(merged: MergedFolder) -> Torchvision:
    if not isinstance(merged.backbone, Torchvision):
        raise InputError(
            f"--to torchvision: expected a merge of torchvision models, found {describe(merged.backbone)}. Choose "
            "open_clip, hf or onnx."
        )
    return merged.backbone
