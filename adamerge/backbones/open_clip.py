"""open_clip's models, the timm encoders among them, and the classifiers that their texts make."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from adamerge.backbones.clip_texts import check_text_tower, tokenizer_of
from adamerge.backbones.forecast import forecast
from adamerge.backbones.head_cache import head_key, open_head_cache
from adamerge.backbones.protocol import check_templates
from adamerge.backbones.tags import Tag, find_tag
from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.checkpoints.configurations import (
    QUICK_GELU,
    Configuration,
    configuration_beside,
    configuration_of,
    differences,
)
from adamerge.checkpoints.hashes import digest
from adamerge.checkpoints.model_folder import OPEN_CLIP_CONFIG, read_open_clip_config
from adamerge.data.task import Task
from adamerge.errors import InputError, did_you_mean, shorten
from adamerge.system.progress import only_errors


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
        pretrained: A tag that open_clip knows for the model (``openai``), or a file: the base where the pool names
            none. A tag also sets the preprocessing, and its weights are downloaded if they are not in the cache.
        head_cache: A folder that keeps zero-shot heads for other runs, named by a hash of all that decides them;
            ``auto``: ``~/.cache/adamerge/heads``; ``off``: none.

    Raises:
        InputError: If there is no such model, tag or file, or the tag's weights are another model's.
    """

    model: str
    tokenizer: Callable[[list[str]], Tensor] | None = None
    prefix: str = "visual."
    exclude: tuple[str, ...] = ()
    pretrained: str | None = None
    head_cache: str | bool = "auto"

    def __post_init__(self) -> None:
        open_head_cache(self.head_cache)
        if not self._folder:
            self._check_name()
        tag = self._tag
        if tag is not None and tag.quick_gelu != self._quick_gelu:
            raise InputError(self._other_activation(f"backbone.pretrained={self.pretrained}", tag.quick_gelu))

    def _check_name(self) -> None:
        import open_clip

        names = open_clip.list_models()
        if self.model not in names:
            is_foreign = (Path(self.model) / "config.json").is_file()
            hint = f" Make one of it: adamerge convert {self.model} --to open_clip --out FOLDER." if is_foreign else ""
            raise InputError(
                f"backbone.model: open_clip knows no model {self.model!r}, and it is no folder with an "
                f"{OPEN_CLIP_CONFIG}.{hint or did_you_mean(self.model, names)}"
            )

    @property
    def _folder(self) -> Path | None:
        folder = Path(self.model)
        return folder if (folder / OPEN_CLIP_CONFIG).is_file() else None

    @property
    def _tag(self) -> Tag | None:
        """The tag that ``pretrained`` names; None where it names a file or nothing."""
        if self.pretrained is None or Path(self.pretrained).exists():
            return None
        return find_tag("" if self._folder else self.model, self.pretrained)

    @property
    def _quick_gelu(self) -> bool:
        return bool(self._config()["model_cfg"].get("quick_gelu", False))

    def base(self, *, download: bool = True) -> Path | None:
        """Return the checkpoint that ``pretrained`` names, None for none.

        Args:
            download: Whether to download a tag's weights that are not in the cache; else None is returned for them.

        Raises:
            InputError: If they cannot be downloaded.
        """
        if self.pretrained is None:
            return None
        tag = self._tag
        return Path(self.pretrained) if tag is None else tag.weights(download=download)

    def problems(self, checkpoints: Mapping[str, Checkpoint]) -> list[str]:
        """List where the configurations beside checkpoints, ``base`` among them, contradict the model that computes."""
        others = {name: checkpoint for name, checkpoint in checkpoints.items() if not self._has(checkpoint)}
        stated = {name: configuration_beside(checkpoint) for name, checkpoint in others.items()}
        if not any(stated.values()):
            return []  # before open_clip is imported, which takes most of a check's time
        expected = configuration_of(self.sidecar(), f"backbone.model={self.model}")
        messages = []
        for name, configuration in stated.items():
            if configuration is not None:
                differing = differences(configuration, expected, texts=name == "base")
                messages += [self._contradiction(configuration, key, *values) for key, values in differing.items()]
        return messages

    def _has(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint lies in the model's own folder, whose configuration is the one that computes."""
        return self._folder is not None and Path(checkpoint.name).parent == self._folder

    def _contradiction(self, stated: Configuration, option: str, value: Any, used: Any) -> str:
        """Say that a file and the model differ in an option, and how they are brought together."""
        if option == QUICK_GELU:
            return self._other_activation(stated.label(option), value)
        folder = Path(stated.file).parent
        remedy = f"backbone=open_clip backbone.model={folder}"
        if stated.is_hugging_face:
            remedy = f"adamerge convert {folder} --to open_clip --out FOLDER and backbone.model=FOLDER"
        return (
            f"{stated.label(option)}: found {value!r}, but backbone.model={self.model} computes with {used!r}, and the "
            f"export would say so. Compute with that model: {remedy}; or correct the file."
        )

    def base_problems(self, base: Checkpoint) -> list[str]:
        """Compare the base's tensors with the model's before anything is read.

        Weights in the model's own folder are its own, and compared when they are read.
        """
        return [] if self._has(base) else self._misfits(base)

    def _misfits(self, base: Checkpoint) -> list[str]:
        """Say where the base's tensors are not the model's, which is built without memory."""
        with forecast(f"backbone.model={self.model}", 1000 + 4 * len(base.keys)):  # its modules are parts too
            model = self._create("meta")
        wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        shapes = {key: tuple(base.spec(key)[0]) for key in base.keys}
        kinds = {
            "missing": [key for key in wanted if key not in shapes],
            "unexpected": [key for key in shapes if key not in wanted],
            "reshaped": [
                f"{key}: expected {wanted[key]}, found {shapes[key]}"
                for key in wanted
                if shapes.get(key, wanted[key]) != wanted[key]
            ],
        }
        if not any(kinds.values()):
            return []
        listed = "; ".join(f"{kind} {shorten(keys, 2) or 'none'}" for kind, keys in kinds.items())
        return [
            f"{base.name}: not a checkpoint of backbone.model={self.model}: {listed}. Name the architecture of your "
            "checkpoints: backbone=open_clip backbone.model=NAME of open_clip's, or a folder with an "
            "open_clip_config.json."
        ]

    def _other_activation(self, where: str, quick_gelu: bool) -> str:
        """Say that weights were trained with another activation than the model has, and which model has it."""
        import open_clip

        plain = self.model.removesuffix("-quickgelu")
        name = f"{plain}-quickgelu" if quick_gelu else plain
        remedy = f"backbone.model to a folder whose model_cfg has quick_gelu: {str(quick_gelu).lower()}"
        if not self._folder and name in open_clip.list_models():
            remedy = f"backbone.model={name}"
        with_it, without = ("quick_gelu", "gelu")[:: 1 if quick_gelu else -1]
        return (
            f"{where}: these weights were trained with {with_it}, but backbone.model={self.model} computes {without}. "
            f"Set {remedy}."
        )

    @property
    def _name(self) -> str:
        """The model's name in open_clip."""
        return f"local-dir:{self._folder}" if self._folder else self.model

    def _new(self) -> Any:
        """Build the model with weights that do not matter."""
        if self._folder:  # whose file may ask for anything
            with forecast(f"backbone.model={self.model}"):
                self._create("meta")
        return self._create("cpu")

    def _create(self, device: str) -> Any:
        import open_clip

        with only_errors():  # not that a model without weights is random: its weights are not used
            try:
                if self._folder:
                    check_text_tower(self._config())
                return open_clip.create_model(self._name, device=device, load_weights=False, pretrained_text=False)
            except Exception as error:  # whatever the library makes of a file that is not its own
                if not self._folder or isinstance(error, InputError):
                    raise
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                file = self._folder / OPEN_CLIP_CONFIG
                raise InputError(f"{file}: open_clip builds no model of it ({reason}).") from error

    @cached_property
    def _clip(self) -> Any:
        return self._new()

    def whole(self, tensors: Mapping[str, Tensor]) -> Any:
        """Return a model of its own, both towers, with given weights, in float32 and eval mode.

        Raises:
            InputError: If they are not weights of this model.
        """
        model = self._new()
        try:
            model.load_state_dict(dict(tensors))
        except RuntimeError as error:
            raise InputError(f"Not weights of {self.model}: {' '.join(str(error).split())}") from error
        return model.float().eval()

    def encoder(self) -> nn.Module:
        """Return the visual tower."""
        encoder: nn.Module = self._clip.visual
        return encoder

    def preprocess(self) -> Callable[[Any], Tensor]:
        """Return open_clip's evaluation transform for the model."""
        from open_clip.transform import PreprocessCfg, image_transform_v2

        stated = self.sidecar()["preprocess_cfg"]
        try:
            transform: Callable[[Any], Tensor] = image_transform_v2(PreprocessCfg(**stated), is_train=False)
        except (AssertionError, LookupError, TypeError, ValueError) as error:
            raise InputError(f"backbone.model={self.model}: preprocess_cfg: not open_clip's: {stated}.") from error
        return transform

    def heads(
        self, base: Checkpoint, experts: Mapping[str, Checkpoint], tasks: Mapping[str, Task]
    ) -> dict[str, nn.Module]:
        """Build zero-shot heads from class names and templates with the base's text tower.

        Raises:
            InputError: If the base or an expert is not a checkpoint of this model, or a task has no class names.
        """
        for problem in (*self.problems({"base": base, **experts}), *self._misfits(base)):
            raise InputError(problem)
        heads: dict[str, nn.Module] = {}
        head_of = self._heads_of(base)
        for name, task in tasks.items():
            if not (classes := task.class_names):
                raise InputError(
                    f"data.tasks.{name}.classes: a zero-shot head needs class names, and the data set has none."
                )
            check_templates(name, task.templates)
            heads[name] = head_of(classes, list(task.templates))
        return heads

    def _heads_of(self, base: Checkpoint) -> Callable[[list[str], list[str]], ZeroShotHead]:
        """Return a function that makes the head of class names and templates, or finds it in the cache.

        The base is read, and its text tower built, when the first head has to be made.
        """
        import open_clip

        cache = open_head_cache(self.head_cache)
        tokenizer = self.tokenizer or tokenizer_of(self._name, self._folder, self._config())
        vocabulary = self._config()["model_cfg"].get("text_cfg", {}).get("vocab_size")
        model: dict[str, Any] = {}
        if cache is not None:
            text = {key: base.get(key) for key in base.keys if not key.startswith(self.prefix)}
            model = {"model": self._config()["model_cfg"], "text": digest(text)}

        @functools.cache
        def clip() -> Any:
            self._clip.load_state_dict({key: base.get(key) for key in base.keys})
            return self._clip.eval()

        def head(classes: list[str], templates: list[str]) -> ZeroShotHead:
            tokens = tokenizer([template.format(name) for name in classes for template in templates])
            if vocabulary is not None and int(tokens.max()) >= vocabulary:
                raise InputError(
                    f"backbone.tokenizer: expected token ids below {vocabulary}, the vocabulary of {self.model}, found "
                    f"{int(tokens.max())}. Does the tokenizer belong to the model?"
                )
            key = head_key({**model, "tokens": tokens, "templates": len(templates)})
            stored = cache.get(key, ("weight", "scale")) if cache else None
            if stored is not None:
                return ZeroShotHead(stored["weight"], stored["scale"])
            weight = open_clip.build_zero_shot_classifier(clip(), tokenizer, classes, templates).float().detach()
            scale = clip().logit_scale.detach().exp().float()
            if cache:
                facts = {"model": self.model, "classes": classes, "templates": templates}
                prompts = {"adamerge_prompts": json.dumps(facts, ensure_ascii=False)}  # for people who look
                cache.put(key, {"weight": weight, "scale": scale}, prompts)
            return ZeroShotHead(weight, scale)

        return head

    def sidecar(self) -> dict[str, Any]:
        """Return the model's configuration in open_clip's file format."""
        from open_clip.transform import PreprocessCfg, merge_preprocess_dict

        config = self._config()
        # What open_clip gives a model without pretrained weights; building one only to ask it takes gigabytes.
        default = PreprocessCfg(size=config["model_cfg"]["vision_cfg"].get("image_size", 224))
        preprocess = dataclasses.asdict(default) | config.get("preprocess_cfg", {})
        tag = self._tag
        if tag is not None:
            preprocess = merge_preprocess_dict(preprocess, tag.preprocess)
        return {**config, "preprocess_cfg": preprocess}

    def _config(self) -> dict[str, Any]:
        if self._folder:
            return read_open_clip_config(self._folder / OPEN_CLIP_CONFIG)
        import open_clip

        return {"model_cfg": open_clip.get_model_config(self.model)}
