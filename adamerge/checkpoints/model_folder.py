"""Checkpoints as libraries keep them, files and folders, all seen under open_clip's names."""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adamerge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from adamerge.checkpoints.clip_names import as_own, is_hugging_face
from adamerge.checkpoints.composed import ComposedCheckpoint, Piece, check_parts, tell_once, unwrapped
from adamerge.checkpoints.distributed import METADATA, DistributedCheckpoint
from adamerge.checkpoints.hub import located
from adamerge.errors import InputError, check_keys, check_number, shorten
from adamerge.system.reading import read_json_mapping

HF_CONFIG = "config.json"
OPEN_CLIP_CONFIG = "open_clip_config.json"
# By the configuration that marks a folder: the weights' names, the safe format first; an index lists shards.
_WEIGHTS = {
    OPEN_CLIP_CONFIG: ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    HF_CONFIG: (
        *("model.safetensors", "model.safetensors.index.json"),
        *("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ),
}
_TOKENIZING = ("clean", "language", "strip_sep_token")  # what open_clip may be told; others open files, or trust code
_MAX_EDGE = 4096  # pixels of the images that a configuration may ask for


def open_shards(index: Path) -> ComposedCheckpoint:
    """Open tensors that are divided among several files, by the index that Hugging Face writes beside them.

    Args:
        index: The index, JSON with a ``weight_map`` from tensor name to file name.

    Raises:
        FileNotFoundError: If a file is missing.
        InputError: If the index or a file is damaged, or a file lacks a tensor.
    """
    places = read_json_mapping(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise InputError(f"{index}: weight_map: expected a mapping from tensor names to file names. Copy it again.")
    # Names only: an index must not lead out of its folder.
    paths = {file: index.parent / Path(file).name for file in sorted(set(places.values()))}
    check_parts(index, [path.name for path in paths.values()])
    files = {file: open_checkpoint(path) for file, path in paths.items()}
    present = {file: set(checkpoint.keys) for file, checkpoint in files.items()}
    if missing := [key for key, file in places.items() if key not in present[file]]:
        raise InputError(f"{index}: {shorten(missing)} not in the files that it names. Copy the folder again.")
    if unlisted := [key for file, keys in present.items() for key in sorted(keys) if places.get(key) != file]:
        tell_once(f"{index}: weight_map lacks {shorten(unlisted)} of its files, so they are not read.", logging.WARNING)
    return ComposedCheckpoint(str(index), {key: Piece(files[file], (key,)) for key, file in places.items()}, files)


@dataclass(frozen=True)
class ModelFiles:
    """A model's files, as they are.

    Attributes:
        checkpoint: The weights, under their own names.
        config_file: The configuration of their library that lies in the folder, or beside the file, if any does.
        is_hugging_face: Whether the names are Hugging Face's.
    """

    checkpoint: Checkpoint
    config_file: Path | None
    is_hugging_face: bool


def _is_clip(names: Collection[str]) -> bool:
    return any(name.startswith("visual.") for name in names)


def _is_plain(names: Collection[str]) -> bool:
    """Return whether torch's own wrappers have put nothing into names; ``model.`` may be the model's."""
    return all(not name.startswith("module.") and "_orig_mod." not in name for name in names)


def find_model(path: Path | str, fits: Callable[[Collection[str]], bool] = _is_clip) -> ModelFiles:
    """Open a checkpoint file, or the folder of an open_clip or Hugging Face model, as it is; also in the Hub's cache.

    Args:
        path: The file or folder, or a reference to the Hub.
        fits: Whether names are the model's; what wrappers put before them is taken off where that helps.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If the folder is neither's, or see :func:`~adamerge.checkpoints.checkpoint.open_checkpoint`.
    """
    path = located(path)
    checkpoint: Checkpoint
    if path.is_dir():
        config = next((path / name for name in _WEIGHTS if (path / name).is_file()), None)
        if config is None and not (path / METADATA).is_file():
            raise InputError(
                f"{path}: expected a checkpoint file, or the folder of a model or (for an expert) of a LoRA adapter, "
                f"found a folder without {', '.join(_WEIGHTS)}, {METADATA} or adapter_config.json. "
                "Name the file inside it."
            )
        checkpoint = _in_folder(path, config)
    else:
        checkpoint, config = open_checkpoint(path), None
    for is_wanted in (lambda names: is_hugging_face(names) or fits(names), _is_plain):
        checkpoint = unwrapped(checkpoint, is_wanted)
        if is_wanted(checkpoint.keys):
            break
    is_theirs = is_hugging_face(checkpoint.keys)
    if config is None:
        beside = path.parent / (HF_CONFIG if is_theirs else OPEN_CLIP_CONFIG)
        config = beside if beside.is_file() else None
    return ModelFiles(checkpoint, config, is_theirs)


def _in_folder(folder: Path, config: Path | None) -> Checkpoint:
    """Open the weights that lie beside a configuration, or those that torch.distributed.checkpoint wrote."""
    names = () if config is None else _WEIGHTS[config.name]
    weights = next((folder / name for name in names if (folder / name).is_file()), None)
    if weights is None and (folder / METADATA).is_file():
        return DistributedCheckpoint(folder)
    if weights is None or config is None:
        raise FileNotFoundError(f"{folder}: no weights: expected one of {', '.join(names)} there.")
    _tell_unread(folder, config)
    return open_shards(weights) if weights.suffix == ".json" else open_checkpoint(weights)


def open_model(
    path: Path | str, base: Checkpoint | None = None, fits: Callable[[Collection[str]], bool] = _is_clip
) -> Checkpoint:
    """Open a checkpoint file or a model's folder; a Hugging Face CLIP is seen under open_clip's names.

    Args:
        path: The file or folder, or a reference to the Hub.
        base: An expert's, of which it takes what its format may lack.
        fits: See :func:`find_model`.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: See :func:`find_model`; or if a tensor of several parts lacks one.
    """
    model = find_model(path, fits)
    if not model.is_hugging_face:
        return model.checkpoint
    tell_once(f"{model.checkpoint.name}: a Hugging Face CLIP checkpoint, read under open_clip's names.")
    seen = as_own(model.checkpoint, base)
    seen.config_file = model.config_file
    return seen


def _tell_unread(folder: Path, config: Path) -> None:
    """Warn of weights in a model's folder that belong to it and are not read, as sentence-transformers has them."""
    weights = [path for name in _WEIGHTS[HF_CONFIG] for path in sorted(folder.glob(f"*/{name}"))]
    parts = [path for path in weights if not _is_model(path.parent / HF_CONFIG)]
    if parts:
        names = shorten(str(path.relative_to(folder)) for path in parts)
        text = f"{folder}: {names} beside the model of {config.name} is not read, and no part of what is merged."
        tell_once(text, logging.WARNING)


def _is_model(config: Path) -> bool:
    """Return whether a configuration is that of a model of its own, such as an earlier checkpoint."""
    return config.is_file() and "model_type" in read_json_mapping(config)


def read_open_clip_config(file: Path) -> dict[str, Any]:
    """Read an ``open_clip_config.json``.

    Raises:
        InputError: If its parts are no mappings, its images would take gigabytes, or its tokenizer would run code.
    """
    config = read_json_mapping(file)
    model = _mapping(config, "model_cfg", file)
    vision, text = _mapping(model, "vision_cfg", file), _mapping(model, "text_cfg", file)
    check_keys(text.get("tokenizer_kwargs") or {}, _TOKENIZING, f"{file}: model_cfg.text_cfg.tokenizer_kwargs")
    preprocessing = _mapping({"preprocess_cfg": {}, **config}, "preprocess_cfg", file)
    sizes = {
        "preprocess_cfg.size": preprocessing.get("size"),
        "model_cfg.vision_cfg.image_size": vision.get("image_size"),
    }
    for name, value in sizes.items():
        for edge in value if isinstance(value, (list, tuple)) else [] if value is None else [value]:
            check_number(f"{file}: {name}", edge, 1, _MAX_EDGE, whole=True)
    return config


def _mapping(content: Mapping[str, Any], key: str, file: Path) -> Mapping[str, Any]:
    if not isinstance(part := content.get(key), dict):
        raise InputError(f"{file}: {key}: expected a mapping, found {type(part).__name__}. Copy it again.")
    return part
