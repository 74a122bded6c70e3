"""What configurations beside weights say, and where they contradict one another: it changes features, not shapes."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.checkpoints.clip_configs import as_open_clip
from adamerge.checkpoints.model_folder import OPEN_CLIP_CONFIG, read_open_clip_config
from adamerge.errors import InputError
from adamerge.system.reading import read_json_mapping

QUICK_GELU = "model_cfg.quick_gelu"
_ACTIVATIONS = ("gelu", "quick_gelu")  # as Hugging Face's files call what quick_gelu is false and true of
_PREPROCESSOR = "preprocessor_config.json"
_PREPROCESSING = ("size", "mean", "std", "interpolation", "resize_mode")
_UNHEARD = {  # options of open_clip that change no feature of a model that is evaluated
    *(
        "patch_dropout",
        "output_tokens",
        "hf_tokenizer_name",
        "tokenizer_mode",
        "tokenizer_kwargs",
        "hf_model_pretrained",
    ),
    *("timm_model_pretrained", "timm_drop", "timm_drop_path"),
}
# What Hugging Face's two files call the options of open_clip's one; the others they share, or have not.
_NAMES = {
    QUICK_GELU: "hidden_act",
    "model_cfg.vision_cfg.image_size": "vision_config.image_size",
    "model_cfg.vision_cfg.head_width": "vision_config.hidden_size / num_attention_heads",
    "model_cfg.vision_cfg.norm_kwargs": "vision_config.layer_norm_eps",
    "preprocess_cfg.mean": "image_mean",
    "preprocess_cfg.std": "image_std",
    "preprocess_cfg.interpolation": "resample",
    "preprocess_cfg.size": "crop_size",
    "preprocess_cfg.resize_mode": "size",
}


@dataclass(frozen=True)
class Configuration:
    """What the configuration of some weights says.

    Attributes:
        file: Where, or what else to call it in messages.
        options: Name to value, by open_clip's names, such as ``preprocess_cfg.mean``.
        is_hugging_face: Whether the file is one of that library.
    """

    file: Path | str
    options: Mapping[str, Any]
    is_hugging_face: bool = False

    def label(self, option: str) -> str:
        """Return the file and what it calls an option."""
        if not self.is_hugging_face:
            return f"{self.file}: {option}"
        file = Path(self.file).parent / _PREPROCESSOR if option.startswith("preprocess_cfg.") else self.file
        return f"{file}: {_NAMES.get(option, option)}"

    def value(self, option: str) -> Any:
        """Return an option's value as the file has it."""
        value = self.options.get(option)
        return _ACTIVATIONS[bool(value)] if self.is_hugging_face and option == QUICK_GELU else value


def configuration_of(content: Mapping[str, Any], file: Path | str, is_hugging_face: bool = False) -> Configuration:
    """Return what the content of an ``open_clip_config.json`` says."""
    model, preprocessing = content.get("model_cfg", {}), content.get("preprocess_cfg", {})
    options: dict[str, Any] = {QUICK_GELU: bool(model.get("quick_gelu", False))}
    for tower in ("vision_cfg", "text_cfg"):
        values = {key: value for key, value in model.get(tower, {}).items() if key not in _UNHEARD}
        options |= {f"model_cfg.{tower}.{key}": value for key, value in values.items()}
    stated = {key: preprocessing.get(key) for key in _PREPROCESSING}
    options |= {f"preprocess_cfg.{key}": value for key, value in stated.items() if value is not None}
    return Configuration(file, options, is_hugging_face)


def configuration_beside(checkpoint: Checkpoint) -> Configuration | None:
    """Return what the configuration in a checkpoint's folder says; None without one, or where it is not a CLIP's."""
    file: Path | None = getattr(checkpoint, "config_file", None)
    if file is None:
        path = Path(checkpoint.name)
        file = path.parent / OPEN_CLIP_CONFIG if path.is_file() else None
    if file is None or not file.is_file():
        return None
    if file.name == OPEN_CLIP_CONFIG:
        return configuration_of(read_open_clip_config(file), file)
    preprocessor = file.parent / _PREPROCESSOR
    content = as_open_clip(
        read_json_mapping(file), read_json_mapping(preprocessor) if preprocessor.is_file() else {}, str(file)
    )
    return None if content is None else configuration_of(content, file, is_hugging_face=True)


def differences(stated: Configuration, expected: Configuration, *, texts: bool = False) -> dict[str, tuple[Any, Any]]:
    """Return the options that both have with other values, with the two values.

    Args:
        stated: By one file.
        expected: By another, or by the model that computes.
        texts: Whether the text towers matter: those of the experts are not used.
    """
    if stated.options == expected.options:
        return {}
    values, others = _filled(stated.options), _filled(expected.options)
    return {
        option: (value, others[option])
        for option, value in values.items()
        if option in others and (texts or not option.startswith("model_cfg.text_cfg."))
        if not _alike(value, others[option])
    }


def _filled(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with open_clip's defaults for what is left out of a tower."""
    from open_clip import CLIPTextCfg, CLIPVisionCfg

    filled = dict(options)
    for tower, kind in (("model_cfg.vision_cfg.", CLIPVisionCfg), ("model_cfg.text_cfg.", CLIPTextCfg)):
        if any(option.startswith(tower) for option in options):
            defaults = {tower + field.name: field.default for field in dataclasses.fields(kind)}
            filled = {**{key: value for key, value in defaults.items() if key[len(tower) :] not in _UNHEARD}, **filled}
    return filled


def check_configurations(base: Checkpoint, experts: Mapping[str, Checkpoint]) -> None:
    """Compare the configurations beside a pool's files with one another, where no backbone says what is computed.

    Raises:
        InputError: If two differ in what changes features.
    """
    files = [configuration_beside(checkpoint) for checkpoint in (base, *experts.values())]
    stated = [configuration for configuration in files if configuration is not None]
    for configuration in stated[1:]:
        for option in differences(configuration, stated[0]):
            value, first = configuration.value(option), stated[0].value(option)
            raise InputError(
                f"{configuration.label(option)}: found {value!r}, but {stated[0].label(option)} is {first!r}. Models "
                "that compute otherwise cannot be merged: leave one out, or correct the file that is wrong."
            )


def _alike(value: Any, other: Any) -> bool:
    """Whether two values mean the same: one number is all of a list's, None and an empty mapping are both nothing."""
    lists = [item for item in (value, other) if isinstance(item, (list, tuple))]
    if not lists:
        return _same(value or None, other or None)
    first, second = (item if isinstance(item, (list, tuple)) else [item] * len(lists[0]) for item in (value, other))
    return len(first) == len(second) and all(map(_same, first, second))


def _same(value: Any, other: Any) -> bool:
    numbers = isinstance(value, (int, float)) and isinstance(other, (int, float))
    return math.isclose(value, other, rel_tol=1e-5, abs_tol=1e-8) if numbers else bool(value == other)
