"""open_clip's folder: ``open_clip_config.json`` and the weights, for ``local-dir:`` and ``hf-hub:``."""

import shutil
from pathlib import Path
from typing import Any

import torch

from adamerge.backbones import Backbone, OpenClip
from adamerge.checkpoints.model_folder import OPEN_CLIP_CONFIG
from adamerge.errors import InputError
from adamerge.results.formats.merged import MergedFolder, Usage, check_equal, describe, example
from adamerge.system.files import save_json

WEIGHTS = "open_clip_model.safetensors"


def sidecar_of(backbone: Backbone, target: str) -> dict[str, Any]:
    """Return the configuration of an open_clip model.

    Raises:
        InputError: If the backbone is another library's.
    """
    sidecar = backbone.sidecar()
    if sidecar is None:
        raise InputError(
            f"--to {target}: expected a merge of open_clip models, found {describe(backbone)}. Choose torchvision or "
            "onnx."
        )
    return sidecar


def write(merged: MergedFolder, folder: Path) -> Usage:
    """Write the weights, with the base's keys and dtypes, and the configuration.

    Raises:
        InputError: If the merge is not of open_clip models.
    """
    sidecar = sidecar_of(merged.backbone, "open_clip")
    save_json(sidecar, folder / OPEN_CLIP_CONFIG)
    shutil.copyfile(merged.path, folder / WEIGHTS)
    files = {WEIGHTS: "the weights, both towers", OPEN_CLIP_CONFIG: "architecture and preprocessing"}
    notes = tokenizer_notes(merged.backbone)
    return Usage("open_clip", "zero-shot-image-classification", files, sidecar["preprocess_cfg"], notes)


def prove(merged: MergedFolder, folder: Path) -> None:
    """Load the folder in open_clip, and compare features of images.

    Raises:
        GuardError: If they differ.
    """
    import open_clip

    for problem in merged.backbone.base_problems(merged.checkpoint) if isinstance(merged.backbone, OpenClip) else ():
        raise InputError(problem)
    images, encoder = example(merged.backbone, 2), merged.encoder()  # which refuses what describes no model
    model = open_clip.create_model(f"local-dir:{folder}", precision="fp32").eval()
    with torch.no_grad():
        check_equal(model.encode_image(images), encoder(images), f"{folder.name} in open_clip")


def tokenizer_notes(backbone: Backbone) -> tuple[str, ...]:
    """Say so where texts go through a tokenizer that is neither library's."""
    tokenizer = backbone.tokenizer if isinstance(backbone, OpenClip) else None
    if tokenizer is None:
        return ()
    name = f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}"
    return (f"Texts were tokenized by `{name}`, which is not part of this folder.",)
