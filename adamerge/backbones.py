"""What differs between architectures, as data: encoder, key prefix, preprocessing, heads.

One class per library of models, none per model family. A backbone of your own is any class with the
members of :class:`Backbone`, chosen by import path (``backbone._target_=my_package.MyBackbone``).
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from adamerge.checkpoints import Checkpoint
from adamerge.data import Task
from adamerge.errors import InputError, did_you_mean, shorten


class Backbone(Protocol):
    """A shared encoder, and how its checkpoints and tasks go with it.

    Attributes:
        prefix: Of the encoder's keys in checkpoint files; other keys are not merged.
        exclude: Globs of parameter names that are not merged, such as a classifier in the experts' files.
    """

    @property
    def prefix(self) -> str:
        """Key prefix, such as ``"visual."``."""
        ...

    @property
    def exclude(self) -> tuple[str, ...]:
        """Globs of names to leave out."""
        ...

    def encoder(self) -> nn.Module:
        """Return the encoder, inputs to features (B, F); its weights do not matter."""
        ...

    def preprocess(self) -> Callable[[Any], Tensor] | None:
        """Return the transform from a PIL image to an input; None where data sets give tensors themselves."""
        ...

    def heads(
        self, base: Checkpoint, experts: Mapping[str, Checkpoint], tasks: Mapping[str, Task]
    ) -> dict[str, nn.Module]:
        """Return each task's frozen classifier, features (B, F) to logits (B, C)."""
        ...

    def sidecar(self) -> dict[str, Any] | None:
        """Return ``open_clip_config.json``'s content where the export is an open_clip model."""
        ...


class ZeroShotHead(nn.Module):
    """CLIP's classifier: scaled cosine between image features and class embeddings.

    Args:
        weight: Normalised class embeddings, (F, C).
        scale: Logit scale, already exponentiated.
    """

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, C)."""
        return self.scale * functional.normalize(features, dim=-1) @ self.weight


@dataclass(frozen=True)
class OpenClip:
    """An open_clip model: its visual tower is the encoder, its text tower makes the heads.

    Args:
        model: A name that open_clip knows (``ViT-B-32``), or a folder with an ``open_clip_config.json``.
        tokenizer: Texts to token ids (N, context length); default open_clip's for the model.

    Raises:
        InputError: If there is no such model.
    """

    model: str
    tokenizer: Callable[[list[str]], Tensor] | None = None
    prefix: str = "visual."
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        import open_clip

        known = open_clip.list_models()
        if not self._folder and self.model not in known:
            raise InputError(
                f"backbone.model: open_clip knows no model {self.model!r}, and it is no folder with an "
                f"open_clip_config.json.{did_you_mean(self.model, known)}"
            )

    @property
    def _folder(self) -> Path | None:
        folder = Path(self.model)
        return folder if (folder / "open_clip_config.json").is_file() else None

    @property
    def _name(self) -> str:
        """What open_clip calls the model."""
        return f"local-dir:{self._folder}" if self._folder else self.model

    @cached_property
    def _clip(self) -> Any:
        import open_clip

        with _quiet():
            return open_clip.create_model(self._name, load_weights=False, pretrained_text=False)

    def encoder(self) -> nn.Module:
        """Return the visual tower."""
        encoder: nn.Module = self._clip.visual
        return encoder

    def preprocess(self) -> Callable[[Any], Tensor]:
        """Return open_clip's evaluation transform for the model."""
        from open_clip.transform import PreprocessCfg, image_transform_v2

        config = PreprocessCfg(**self.sidecar()["preprocess_cfg"])
        transform: Callable[[Any], Tensor] = image_transform_v2(config, is_train=False)
        return transform

    def heads(
        self, base: Checkpoint, experts: Mapping[str, Checkpoint], tasks: Mapping[str, Task]
    ) -> dict[str, nn.Module]:
        """Build zero-shot heads from class names and templates with the base's text tower.

        Raises:
            InputError: If the base is not a checkpoint of this model, or a task has no class names.
        """
        import open_clip

        wanted = {key: tuple(tensor.shape) for key, tensor in self._clip.state_dict().items()}
        found = {key: base.spec(key)[0] for key in base.keys}
        other = [key for key, shape in wanted.items() if found.get(key, shape) != shape]
        problems = {
            "missing": shorten(key for key in wanted if key not in found),
            "unexpected": shorten(key for key in found if key not in wanted),
            "reshaped": shorten(f"{key}: expected {wanted[key]}, found {found[key]}" for key in other),
        }
        if any(problems.values()):
            listed = "; ".join(f"{kind} {keys or 'none'}" for kind, keys in problems.items())
            raise InputError(f"{base.name}: not a checkpoint of {self.model}: {listed}. Is backbone.model right?")
        self._clip.load_state_dict({key: base.get(key) for key in base.keys})
        tokenizer = self.tokenizer or open_clip.get_tokenizer(self._name)
        heads: dict[str, nn.Module] = {}
        for name, task in tasks.items():
            classes = task.class_names
            if not classes:
                raise InputError(
                    f"data.tasks.{name}.classes: a zero-shot head needs class names, and the data set has none."
                )
            weight = open_clip.build_zero_shot_classifier(self._clip.eval(), tokenizer, classes, list(task.templates))
            heads[name] = ZeroShotHead(weight.float(), self._clip.logit_scale.detach().exp().float())
        return heads

    def sidecar(self) -> dict[str, Any]:
        """Return the model's configuration in open_clip's file format."""
        import open_clip
        from open_clip.transform import PreprocessCfg

        config: dict[str, Any] = {"model_cfg": open_clip.get_model_config(self.model)}
        if self._folder:
            config = json.loads((self._folder / "open_clip_config.json").read_text(encoding="utf-8"))
        # What open_clip gives a model without pretrained weights; building one only to ask it takes gigabytes.
        default = PreprocessCfg(size=config["model_cfg"]["vision_cfg"].get("image_size", 224))
        return {**config, "preprocess_cfg": dataclasses.asdict(default) | config.get("preprocess_cfg", {})}


@dataclass(frozen=True)
class Torchvision:
    """A torchvision classifier; each expert's own classifier becomes its task's head.

    Args:
        model: A name that ``torchvision.models.get_model`` knows.
        head: Path of the final Linear layer: ``fc`` (ResNet), ``heads.head`` (ViT), ``classifier.2`` (ConvNeXt).

    Raises:
        InputError: If there is no such model or layer.
    """

    model: str
    head: str = "fc"
    prefix: str = ""

    def __post_init__(self) -> None:
        from torchvision import models

        known = models.list_models()
        if self.model not in known:
            raise InputError(
                f"backbone.model: torchvision knows no model {self.model!r}.{did_you_mean(self.model, known)}"
            )

    @property
    def exclude(self) -> tuple[str, ...]:
        """The classifier's tensors."""
        return (f"{self.head}.*",)

    def encoder(self) -> nn.Module:
        """Return the model with its classifier taken off."""
        from torchvision import models

        model: nn.Module = models.get_model(self.model, weights=None)
        try:
            layer = model.get_submodule(self.head)
        except AttributeError as error:
            linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
            hint = f"; its last Linear layer is {linear[-1]!r}" if linear else ", and no Linear layer at all"
            raise InputError(f"backbone.head: {self.model} has no layer {self.head!r}{hint}.") from error
        if not isinstance(layer, nn.Linear):
            raise InputError(
                f"backbone.head: {self.head!r} of {self.model} is {type(layer).__name__}, expected Linear."
            )
        model.set_submodule(self.head, nn.Identity())
        return model

    def preprocess(self) -> Callable[[Any], Tensor]:
        """Return the transform of the model's default weights (nothing is downloaded)."""
        from torchvision import models

        transform: Callable[[Any], Tensor] = models.get_model_weights(self.model).DEFAULT.transforms()
        return transform

    def heads(
        self, base: Checkpoint, experts: Mapping[str, Checkpoint], tasks: Mapping[str, Task]
    ) -> dict[str, nn.Module]:
        """Split each expert's own classifier off its file.

        Raises:
            InputError: If a task has no expert, or the expert's file has no classifier.
        """
        heads: dict[str, nn.Module] = {}
        for name, task in tasks.items():
            expert = task.expert or name
            if expert not in experts:
                raise InputError(
                    f"data.tasks.{name}.expert: no expert {expert!r} in the pool, whose classifier would be the head."
                    f"{did_you_mean(expert, experts)}"
                )
            source = experts[expert]
            keys = [f"{self.head}.weight", f"{self.head}.bias"]
            missing = [key for key in keys if key not in source.keys]
            if missing:
                raise InputError(f"{source.name}: no classifier: {shorten(missing)} missing. Is backbone.head right?")
            weight, bias = (source.get(key).float() for key in keys)
            head = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0])
            head.load_state_dict({"weight": weight, "bias": bias})
            heads[name] = head
        return heads

    def sidecar(self) -> None:
        """Torchvision checkpoints need no configuration beside them."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence open_clip's warning that a model without weights is random: its weights are not used."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def check_classes(tasks: Mapping[str, Task], heads: Mapping[str, nn.Module], features: int) -> None:
    """Check that every head has as many classes as its task's data.

    Args:
        tasks: Task name to its data.
        heads: Task name to classifier.
        features: F, the width of the encoder's features.

    Raises:
        InputError: If they differ.
    """
    for name, task in tasks.items():
        data = task.evaluate or task.dataset or task.adapt
        names = getattr(data, "classes", None) or task.class_names
        with torch.no_grad():
            classes = heads[name](torch.zeros(1, features)).shape[-1]
        if names is not None and len(names) != classes:
            raise InputError(
                f"data.tasks.{name}: the data set has {len(names)} classes, but its head has {classes}. "
                "Is it the expert's own data set, and are all class folders there?"
            )
