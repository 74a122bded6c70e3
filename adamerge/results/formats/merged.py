"""A merged model in the folder of a run or of ``adamerge merge``, and what all formats share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adamerge.backbones import Backbone, ZeroShotHead
from adamerge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from adamerge.errors import GuardError, InputError, did_you_mean, shorten
from adamerge.results.export import HEADS, RECIPE, load_heads
from adamerge.system.reading import read_json_mapping

WEIGHTS = "merged.safetensors"

BackboneOf = Callable[[Path, Mapping[str, Any]], Backbone]  # of a folder and its recipe


@dataclass(frozen=True)
class MergedFolder:
    """A merged model, with all that an export needs to know of it.

    Attributes:
        checkpoint: The merged weights, under the base's keys.
        backbone: What they are weights of.
        path: Path of the weights' file.
        recipe: The content of ``merge.json``.
        heads: Task to its classifier's tensors; {} where none were written.
        info: Task to class names and templates.
    """

    checkpoint: Checkpoint
    backbone: Backbone
    path: Path
    recipe: Mapping[str, Any] = field(default_factory=dict)
    heads: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where the merge lies."""
        return self.path.parent

    def encoder(self) -> nn.Module:
        """Return the encoder with the merged weights, in float32 and eval mode.

        Raises:
            InputError: If the weights are another architecture's.
        """
        encoder, prefix = self.backbone.encoder(), self.backbone.prefix
        fresh, present = encoder.state_dict(), set(self.checkpoint.keys)
        missing = [name for name, _ in encoder.named_parameters() if prefix + name not in present]
        if missing:
            raise InputError(
                f"{self.path}: lacks {shorten(prefix + name for name in missing)} of {describe(self.backbone)}. "
                "Is it a merge of this model?"
            )
        merged = {name: self.checkpoint.get(prefix + name) for name in fresh if prefix + name in present}
        try:
            encoder.load_state_dict(fresh | merged)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{self.path}: not weights of {describe(self.backbone)}: {reason}") from error
        encoder.float().eval().requires_grad_(False)
        return encoder

    def head(self, task: str) -> nn.Module:
        """Return a task's classifier, features (B, F) to logits (B, C).

        Raises:
            InputError: If the task has no head here, or its tensors are neither a zero-shot head's nor a Linear's.
        """
        if task not in self.heads:
            raise InputError(
                f"--task {task}: expected one of the tasks whose heads lie beside the merge, "
                f"{shorten(self.heads) or 'none'}, found {task!r}.{did_you_mean(task, self.heads)}"
            )
        tensors = {name: tensor.float() for name, tensor in self.heads[task].items()}
        if set(tensors) == {"weight", "scale"}:
            return ZeroShotHead(tensors["weight"], tensors["scale"]).eval()
        if any(tensor.ndim != (2 if name == "weight" else 1) for name, tensor in tensors.items() if name != "scale"):
            raise InputError(f"{self.folder / 'heads.safetensors'}: task {task!r}: expected a matrix of weights.")
        if "weight" not in tensors or not set(tensors) <= {"weight", "bias"}:
            raise InputError(
                f"{self.folder / 'heads.safetensors'}: task {task!r}: expected the tensors of a zero-shot or a Linear "
                f"head, found {shorten(tensors)}. Only those can be exported."
            )
        classes, features = tensors["weight"].shape
        head: nn.Module = nn.utils.skip_init(nn.Linear, features, classes, bias="bias" in tensors)
        head.load_state_dict(tensors)
        return head.eval().requires_grad_(False)


def example(backbone: Backbone, count: int, seed: int = 0) -> Tensor:
    """Return random inputs (count, ...) of the shape that a backbone's preprocessing gives.

    Raises:
        InputError: If it has no preprocessing, or one that takes no image.
    """
    from PIL import Image

    transform = backbone.preprocess()
    if transform is None:
        raise InputError(
            f"{describe(backbone)}: has no preprocessing, so that the shape of its inputs is not known. Give the "
            "backbone a preprocess()."
        )
    try:
        shape = transform(Image.new("RGB", (320, 256))).shape
    except (AssertionError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(f"{describe(backbone)}: its preprocessing takes no image ({reason}).") from error
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def open_merged(folder: Path, backbone_of: BackboneOf) -> MergedFolder:
    """Open what ``adamerge adapt``, ``adamerge merge`` or ``adamerge export`` wrote.

    Args:
        folder: A run's folder, or one of a merge.
        backbone_of: Says what the weights are, from the folder and the content of its ``merge.json``.

    Raises:
        InputError: If the folder has no merged checkpoint.
    """
    folder = folder.absolute()
    path, recipe_file = folder / WEIGHTS, folder / RECIPE
    if not path.is_file():
        hint = f" Write it first: adamerge export {folder}." if (folder / "config.yaml").is_file() else ""
        raise InputError(f"{folder}: expected a merge, {WEIGHTS}, found none.{hint}")
    recipe = read_json_mapping(recipe_file) if recipe_file.is_file() else {}
    heads, info = load_heads(folder / HEADS) if (folder / HEADS).is_file() else ({}, {})
    return MergedFolder(open_checkpoint(path), backbone_of(folder, recipe), path, recipe, heads, info)


def describe(backbone: Backbone) -> str:
    """Return a backbone's name for messages."""
    return f"{type(backbone).__name__} {getattr(backbone, 'model', '')}".rstrip()


@dataclass(frozen=True)
class Usage:
    """How an export is used.

    Attributes:
        library: Its name for the Hub's ``library_name``, by which ``card.md`` chooses the code.
        pipeline: The Hub's ``pipeline_tag``.
        files: File name to what it holds.
        preprocessing: What images go through, ready for JSON.
        notes: Further sentences, such as what could not be written.
        options: What the code names: class counts, shapes, tasks.
    """

    library: str
    pipeline: str
    files: Mapping[str, str]
    preprocessing: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def check_equal(outputs: Tensor, expected: Tensor, name: str, tolerance: float = 1e-4) -> None:
    """Compare the outputs of an export, loaded back, with those of the merge.

    Args:
        outputs: Outputs of the foreign library.
        expected: Outputs of the merge, in float32.
        name: What gives the outputs, for the message.
        tolerance: Largest difference, as a share of the largest expected value.

    Raises:
        GuardError: If they differ.
    """
    scale = float(expected.abs().max())
    difference = float((outputs.float() - expected).abs().max()) if outputs.shape == expected.shape else float("inf")
    if not difference <= tolerance * max(scale, 1e-6):
        raise GuardError(
            f"{name}, loaded back, differs from the merge by {difference:.2g} where values reach {scale:.2g}, so "
            "nothing was exported. Please report it, with the versions in merge.json."
        )
