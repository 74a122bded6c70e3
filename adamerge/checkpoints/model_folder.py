"""Checkpoints as libraries keep them, files and folders, all seen under open_clip's names."""

import json
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamerge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from adamerge.checkpoints.clip_names import KeyTable, as_own, table_of
from adamerge.checkpoints.hub import located
from adamerge.errors import InputError, shorten
from adamerge.system.files import combined_hash

log = logging.getLogger(__name__)

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


class ShardedCheckpoint:
    """Tensors that are divided among several files, by the index that Hugging Face writes beside them.

    Args:
        index: The index, JSON with a ``weight_map`` from tensor name to file name.

    Raises:
        FileNotFoundError: If a file is missing.
        InputError: If the index or a file is damaged, or a file lacks a tensor.
    """

    def __init__(self, index: Path) -> None:
        self.name = str(index)
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise InputError(f"{index}: weight_map: expected a mapping from tensor names to file names. Copy it again.")
        # Names only: an index must not lead out of its folder.
        self._files = {file: open_checkpoint(index.parent / Path(file).name) for file in sorted(set(places.values()))}
        self._places = {str(key): str(file) for key, file in places.items()}
        missing = [key for key, file in self._places.items() if key not in set(self._files[file].keys)]
        if missing:
            raise InputError(f"{index}: {shorten(missing)} not in the files that it names. Copy the folder again.")

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the tensor names in the index's order."""
        return tuple(self._places)

    def spec(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return shape and dtype of a tensor."""
        return self._files[self._places[key]].spec(key)

    def get(self, key: str) -> Tensor:
        """Return a tensor on the CPU, zero-copy where the format allows."""
        return self._files[self._places[key]].get(key)

    def sha256(self) -> str:
        """Hash the files' bytes into one."""
        return combined_hash({name: file.sha256() for name, file in self._files.items()})


@dataclass(frozen=True)
class ModelFiles:
    """A model's files, as they are.

    Attributes:
        checkpoint: The weights, under their own names.
        config_file: The configuration of their library that lies in the folder, or beside the file, if any does.
        table: Of the names, where they are not open_clip's.
    """

    checkpoint: Checkpoint
    config_file: Path | None
    table: KeyTable | None


def find_model(path: Path | str) -> ModelFiles:
    """Open a checkpoint file, or the folder of an open_clip or Hugging Face model, as it is; also in the Hub's cache.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If the folder is neither's, or see :func:`~adamerge.checkpoints.checkpoint.open_checkpoint`.
    """
    path = located(path)
    checkpoint: Checkpoint
    if path.is_dir():
        config = next((path / name for name in _WEIGHTS if (path / name).is_file()), None)
        if config is None:
            raise InputError(
                f"{path}: expected a checkpoint file, or the folder of a model or (for an expert) of a LoRA adapter, "
                f"found a folder without {', '.join(_WEIGHTS)} or adapter_config.json. Name the file inside it."
            )
        weights = next((path / name for name in _WEIGHTS[config.name] if (path / name).is_file()), None)
        if weights is None:
            raise FileNotFoundError(f"{path}: no weights: expected one of {', '.join(_WEIGHTS[config.name])} there.")
        checkpoint = ShardedCheckpoint(weights) if weights.suffix == ".json" else open_checkpoint(weights)
        return ModelFiles(checkpoint, config, table_of(checkpoint))
    checkpoint = open_checkpoint(path)
    table = table_of(checkpoint)
    beside = path.parent / (OPEN_CLIP_CONFIG if table is None else HF_CONFIG)
    return ModelFiles(checkpoint, beside if beside.is_file() else None, table)


def open_model(path: Path | str) -> Checkpoint:
    """Open a checkpoint file or a model's folder; one of another library is seen under open_clip's names.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: See :func:`find_model`; or if a tensor of several parts lacks one.
    """
    model = find_model(path)
    if model.table is None:
        return model.checkpoint
    seen = as_own(model.checkpoint, model.table)
    seen.config_file = model.config_file
    _tell(model.checkpoint.name, model.table.name)
    return seen


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of JSON that holds a mapping.

    Raises:
        InputError: If it holds anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}). Copy it again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping, found {type(content).__name__}. Copy it again.")
    return content


@cache
def _tell(name: str, kind: str) -> None:
    """Say once of each file how it is read."""
    log.info("%s: a %s checkpoint, read under open_clip's names.", name, kind)
