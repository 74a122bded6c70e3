"""Configurations of CLIP models: open_clip's and Hugging Face's, each from the other.

The tables are all that is known of the two; weights are related in :mod:`adamerge.checkpoints.clip_names`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from adamerge.errors import InputError, shorten

# open_clip's option: Hugging Face's, for what means the same in both.
_VISION = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
}
_TEXT = {
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
}
# What transformers takes an option for that a config.json leaves out.
_SHARED_DEFAULTS = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "vision_config": {
        **_SHARED_DEFAULTS,
        **{"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        **{"image_size": 224, "patch_size": 32},
    },
    "text_config": {
        **_SHARED_DEFAULTS,
        **{"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8},
        **{"vocab_size": 49408, "max_position_embeddings": 77},
    },
}
_ACTIVATIONS = {"quick_gelu": True, "gelu": False}  # Hugging Face's hidden_act: open_clip's quick_gelu
# Options of open_clip that do not matter to a model that is evaluated, or to its weights.
_HARMLESS = {"patch_dropout", "output_tokens", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "eos_id"}
_TOP = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale"}
_RESAMPLE = {"nearest": 0, "bilinear": 2, "bicubic": 3}
_EPSILON = 1e-5  # of both libraries' layer norms


def quick_gelu_of(config: Mapping[str, Any], where: str) -> bool | None:
    """Return whether a Hugging Face CLIP uses QuickGELU; None where the configuration is not a CLIP's.

    Args:
        config: The content of ``config.json``: of a whole CLIP or of one tower.
        where: What to call it in messages.

    Raises:
        InputError: If its activation is one that open_clip's CLIPs do not have, or differs between the towers.
    """
    towers = _towers(config)
    activations = {str(tower["hidden_act"]) for tower in towers.values()}
    if not activations:
        return None
    if len(activations) > 1 or not activations <= set(_ACTIVATIONS):
        raise InputError(
            f"{where}: hidden_act: expected {' or '.join(_ACTIVATIONS)}, the same in both towers, found "
            f"{shorten(sorted(activations))}. open_clip has no such CLIP."
        )
    return _ACTIVATIONS[activations.pop()]


def to_open_clip(config: Mapping[str, Any], preprocessor: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return ``open_clip_config.json``'s content for a Hugging Face CLIP.

    Args:
        config: The content of ``config.json``.
        preprocessor: The content of ``preprocessor_config.json``; empty where there is none.
        where: What to call the configuration in messages.

    Raises:
        InputError: If it is not that of a whole CLIP, or has an option that open_clip's lacks.
    """
    towers = _towers(config)
    if len(towers) < 2:
        raise InputError(
            f"{where}: model_type: expected 'clip', with both towers, found {config.get('model_type')!r}. An open_clip "
            "model needs both: convert the base, or name a file, --out NAME.safetensors, for the weights alone."
        )
    content = as_open_clip(config, preprocessor, where)
    assert content is not None
    size = towers["vision_config"]["image_size"]
    return {**content, "preprocess_cfg": _to_preprocess_cfg(preprocessor, size)}


def as_open_clip(config: Mapping[str, Any], preprocessor: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """Return what a Hugging Face CLIP's configuration says, in the words of ``open_clip_config.json``.

    Args:
        config: The content of ``config.json``: of a whole CLIP or of one tower; of anything else None is returned.
        preprocessor: The content of ``preprocessor_config.json``; without it nothing is said of the preprocessing.
        where: What to call the configuration in messages.

    Raises:
        InputError: If it has an option that open_clip's lacks.
    """
    towers = _towers(config)
    if not towers:
        return None
    model: dict[str, Any] = {
        "embed_dim": int(config.get("projection_dim", 512)),
        "quick_gelu": bool(quick_gelu_of(config, where)),
    }
    content = {"model_cfg": model}
    if vision := towers.get("vision_config"):
        model["vision_cfg"] = {
            **{option: vision[key] for option, key in _VISION.items()},
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
        }
        if preprocessor:
            content["preprocess_cfg"] = _to_preprocess_cfg(preprocessor, vision["image_size"])
    if text := towers.get("text_config"):
        model["text_cfg"] = {
            **{option: text[key] for option, key in _TEXT.items()},
            "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
        }
    for tower, cfg in ((vision, "vision_cfg"), (text, "text_cfg")):
        if tower and tower["layer_norm_eps"] != _EPSILON:
            model[cfg]["norm_kwargs"] = {"eps": tower["layer_norm_eps"]}
    return content


def to_hugging_face(config: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the content of ``config.json`` and ``preprocessor_config.json`` for an open_clip model.

    Args:
        config: The content of ``open_clip_config.json``.
        where: What to call it in messages.

    Raises:
        InputError: If it has an option that Hugging Face's CLIP lacks.
    """
    from open_clip import CLIPTextCfg, CLIPVisionCfg

    model = config["model_cfg"]
    others = [key for key in model if key not in _TOP and model[key]]
    vision = _options(model["vision_cfg"], CLIPVisionCfg, {*_VISION, "head_width", "mlp_ratio"}, others, "vision_cfg")
    text = _options(model["text_cfg"], CLIPTextCfg, {*_TEXT, "mlp_ratio"}, others, "text_cfg")
    size = vision["image_size"]
    if isinstance(size, (list, tuple)):
        others += ["vision_cfg.image_size"] if len(set(size)) > 1 else []
        vision["image_size"] = size[0]
    if others:
        raise InputError(
            f"{where}: {shorten(others)} has no place in Hugging Face's CLIP. Export to open_clip or onnx instead."
        )
    activation = next(name for name, quick in _ACTIVATIONS.items() if quick == bool(model.get("quick_gelu")))
    shared = {"hidden_act": activation, "projection_dim": model["embed_dim"]}
    content = {
        "projection_dim": model["embed_dim"],
        "vision_config": {
            **{key: vision[option] for option, key in _VISION.items()},
            "num_attention_heads": vision["width"] // vision["head_width"],
            "intermediate_size": int(vision["width"] * vision["mlp_ratio"]),
            "layer_norm_eps": (vision["norm_kwargs"] or {}).get("eps", _EPSILON),
            **shared,
        },
        "text_config": {
            **{key: text[option] for option, key in _TEXT.items()},
            "intermediate_size": int(text["width"] * text["mlp_ratio"]),
            "layer_norm_eps": (text["norm_kwargs"] or {}).get("eps", _EPSILON),
            # The end of a text is its highest token, as in open_clip: what transformers makes of this very number.
            **{"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1},
            **shared,
        },
    }
    return content, _to_preprocessor(config["preprocess_cfg"], where)


def _towers(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the options of the towers that a ``config.json`` describes, with what it leaves out."""
    kind = config.get("model_type")
    if kind == "clip":  # older files have the options that count in .._dict
        towers = {name: {**(config.get(name) or {}), **(config.get(f"{name}_dict") or {})} for name in _HF_DEFAULTS}
    else:
        towers = {name: dict(config) for name in _HF_DEFAULTS if kind == f"clip_{name.removesuffix('_config')}_model"}
    return {name: {**_HF_DEFAULTS[name], **options} for name, options in towers.items()}


def _options(given: Mapping[str, Any], kind: type, mapped: set[str], others: list[str], where: str) -> dict[str, Any]:
    """Return a tower's options with open_clip's defaults; what has no counterpart and matters goes to ``others``."""
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    for key, value in given.items():
        norm = key == "norm_kwargs" and set(value or {}) <= {"eps"}
        if key not in mapped | _HARMLESS and not norm and value != defaults.get(key):
            others.append(f"{where}.{key}={value!r}")
    return {**defaults, **given}


def _to_preprocess_cfg(preprocessor: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """Return open_clip's preprocessing for Hugging Face's, whose older files give sizes as plain numbers."""
    size = preprocessor.get("size", image_size)
    squashed = isinstance(size, Mapping) and "height" in size
    names = {number: name for name, number in _RESAMPLE.items()}
    content = {
        "mean": preprocessor.get("image_mean"),
        "std": preprocessor.get("image_std"),
        "interpolation": names.get(preprocessor.get("resample", 3)),
        "resize_mode": "squash" if squashed else "shortest",
    }
    if preprocessor.get("do_normalize", True) is False:
        content |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    return {"size": image_size, **{key: value for key, value in content.items() if value is not None}}


def _to_preprocessor(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return Hugging Face's preprocessing for open_clip's."""
    size, mode = config["size"], config.get("resize_mode", "shortest")
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    if mode not in ("shortest", "squash") or config.get("interpolation") not in _RESAMPLE:
        raise InputError(
            f"{where}: preprocess_cfg: resize_mode={mode!r}, interpolation={config.get('interpolation')!r} has no "
            "place in Hugging Face's CLIP. Export to open_clip or onnx instead."
        )
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": min(height, width)} if mode == "shortest" else {"height": height, "width": width},
        "do_center_crop": mode == "shortest",
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config["mean"]),
        "image_std": list(config["std"]),
        "resample": _RESAMPLE[config["interpolation"]],
    }
