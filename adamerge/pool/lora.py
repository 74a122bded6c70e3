"""Experts in peft's LoRA format: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

What is not understood is refused: an adapter that is read half merges into wrong weights in silence.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamerge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from adamerge.checkpoints.clip_names import (
    TABLES,
    Completed,
    KeyTable,
    MappedCheckpoint,
    as_own,
    as_theirs,
    own_key,
    table_of,
)
from adamerge.checkpoints.hub import located
from adamerge.checkpoints.model_folder import open_model
from adamerge.errors import InputError, did_you_mean, shorten
from adamerge.pool.low_rank import LowRank, matrix_shape
from adamerge.system.files import combined_hash, sha256

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_PAIR = re.compile(
    r"^(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B)(?:\.default)?(?:\.(?P<kind>weight|bias))?$"
)
# Initialisations that leave the base as it is; the others move part of it into the adapter.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# Variants of LoRA that change more than the product of two matrices says, where set.
_VARIANTS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "megatron_config",
    "monteclora_config",
    "velora_config",
)


@dataclass
class _Pair:
    """Where one weight's factors are in the file."""

    module: str  # as the adapter calls it
    down: str = ""  # key of lora_A
    up: str = ""  # key of lora_B
    is_embedding: bool = False
    is_transposed: bool = False
    scale: float = 1.0


class AdapterCheckpoint:
    """A LoRA adapter on its base, seen as the checkpoint it would merge into.

    Tensors that the adapter does not touch are the base's; those of ``modules_to_save`` and trained biases are its
    own; adapted weights are the base's plus ``scale * B @ A``.

    Args:
        folder: The adapter's.
        base: The checkpoint that it was trained on.
        prefix: Of the encoder's keys in ``base``, tried where an adapter was trained on the encoder alone.

    Raises:
        FileNotFoundError: If a file is missing.
        InputError: If the adapter is of another kind, or does not fit the base; the message names file and key.
    """

    def __init__(self, folder: Path, base: Checkpoint, prefix: str = "") -> None:
        self.name = str(folder)
        self._base = base
        self._prefix = prefix
        self._config_file = folder / CONFIG
        self._config = _read_config(self._config_file)
        weights = _weights_file(folder)
        self._file = open_checkpoint(weights)
        self._base_keys = set(base.keys)
        self._pairs: dict[str, _Pair] = {}
        self._biases: dict[str, tuple[str, float]] = {}
        self._full: dict[str, str] = {}
        for key in self._file.keys:
            self._place(key)
        if not self._pairs:
            raise InputError(f"{weights}: no LoRA weights: expected keys such as '{_PREFIX}NAME.lora_A.weight'.")
        for key, pair in self._pairs.items():
            self._check_pair(key, pair)

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the base's tensor names, and those that only the adapter has."""
        return (*self._base.keys, *(key for key in self._full if key not in self._base_keys))

    def spec(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return shape and dtype of a tensor, from the headers; adapted weights are computed in at least float32."""
        return self._file.spec(self._full[key]) if key in self._full else self._base.spec(key)

    def get(self, key: str) -> Tensor:
        """Return a tensor of the adapted model."""
        tensor = self._file.get(self._full[key]) if key in self._full else self._base.get(key)
        if key not in self._pairs and key not in self._biases:
            return tensor
        product = self._product(key)
        value = tensor.to(product.up.dtype).reshape(matrix_shape(tensor.shape))
        return torch.addmm(value, product.up, product.down).view(tensor.shape)

    def change(self, key: str) -> Tensor | LowRank:
        """Return the task vector of a tensor as a product, or the tensor itself where the adapter replaces it."""
        return self.get(key) if key in self._full else self._product(key)

    def sha256(self) -> str:
        """Hash both files' bytes into one."""
        return combined_hash({CONFIG: sha256(self._config_file), "weights": self._file.sha256()})

    def _product(self, key: str) -> LowRank:
        """Read one tensor's factors, in at least float32, the scale in ``up``."""
        shape, stored = self._base.spec(key)
        dtype = torch.float64 if stored == torch.float64 else torch.float32
        if key in self._biases:
            name, scale = self._biases[key]
            return LowRank(self._file.get(name).to(dtype).unsqueeze(1) * scale, torch.ones(1, 1, dtype=dtype))
        pair = self._pairs.get(key)
        if pair is None:
            return LowRank.zero(shape, dtype)
        down, up = (self._file.get(name).to(dtype).flatten(1) for name in (pair.down, pair.up))
        up = up * pair.scale
        return LowRank(down.t().contiguous(), up.t().contiguous()) if pair.is_transposed else LowRank(up, down)

    def _place(self, key: str) -> None:
        """Sort one tensor of the file: a factor, the bias of one, or a tensor that replaces the base's."""
        name = _clean(key)
        if name is None:
            raise InputError(f"{self._file.name}: tensor {key!r}: expected a key that begins with {_PREFIX!r}.")
        match = _PAIR.match(name)
        if match is None:
            if "lora_" in name or "trainable_tokens" in name:
                raise InputError(
                    f"{self._file.name}: tensor {key!r} belongs to a variant of LoRA that is not supported. {_REMEDY}"
                )
            self._full[self._resolve(name.replace(".base_layer", ""), ()) or name] = key
            return
        module, part = match["module"], match["part"]
        plain = module.replace(".base_layer", "")
        if match["kind"] == "bias":
            target = self._resolve(plain, (".bias",))
            if part != "B" or target is None:
                raise self._unknown(key, f"{plain}.bias")
            self._biases[target] = (key, self._scale(module, key))
            return
        target = self._resolve(plain, (".weight", ".in_proj_weight"))
        if target is None:
            raise self._unknown(key, f"{plain}.weight")
        pair = self._pairs.setdefault(target, _Pair(module, is_embedding="embedding" in part))
        setattr(pair, "down" if part.endswith("A") else "up", key)

    def _resolve(self, name: str, endings: tuple[str, ...]) -> str | None:
        """Return the base's key of a name, or of a module's parameter."""
        candidates = (start + name + ending for start in ("", self._prefix) for ending in endings or ("",))
        return next((key for key in candidates if key in self._base_keys), None)

    def _unknown(self, key: str, wanted: str) -> InputError:
        return InputError(
            f"{self._file.name}: tensor {key!r} adapts {wanted!r}, which {self._base.name} lacks."
            f"{did_you_mean(wanted, self._base.keys)} Was the adapter trained on this base?"
        )

    def _check_pair(self, key: str, pair: _Pair) -> None:
        """Find scale and orientation of one product, and hold its shape against the base's."""
        where = f"{self._file.name}: tensor {pair.down or pair.up!r}"
        if not pair.down or not pair.up:
            raise InputError(f"{where}: its partner lora_{'A' if pair.up else 'B'} is missing. Save the adapter again.")
        (rank, width), (height, inner) = (matrix_shape(self._file.spec(name)[0]) for name in (pair.down, pair.up))
        shape, _ = self._base.spec(key)
        expected = matrix_shape(shape)
        straight = (height, width) == expected
        turned = (width, height) == expected and len(shape) == 2
        if inner != rank or not (straight or turned):
            raise InputError(
                f"{where}: expected factors of the base's {key!r} {shape}, found {self._file.spec(pair.down)[0]} and "
                f"{self._file.spec(pair.up)[0]}. Was the adapter trained on this base?"
            )
        pair.is_transposed = turned and (not straight or pair.is_embedding or bool(self._config.get("fan_in_fan_out")))
        pair.scale = self._scale(pair.module, pair.down, rank)

    def _scale(self, module: str, key: str, found: int | None = None) -> float:
        """Return alpha / r, or alpha / sqrt(r), of a module, by the patterns of the configuration."""
        # The output projection of an attention layer goes by the layer's name, and peft (up to 0.21.2 at least) adds
        # its product twice, in training as in merge_and_unload: the model that was trained has both.
        module, _, projection = module.partition(".base_layer")
        times = 2.0 if projection == ".out_proj" else 1.0
        rank = self._of_pattern("rank_pattern", module, self._config.get("r"))
        alpha = self._of_pattern("alpha_pattern", module, self._config.get("lora_alpha"))
        for option, value in (("r", rank), ("lora_alpha", alpha)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                raise InputError(f"{self._config_file}: {option}: expected a number above 0, found {value!r}.")
        if found is not None and found != rank:
            raise InputError(
                f"{self._file.name}: tensor {key!r} has rank {found}, but {self._config_file} says r = {rank}. Do both "
                "belong together, and is rank_pattern complete?"
            )
        return times * float(alpha) / (math.sqrt(rank) if self._config.get("use_rslora") else float(rank))

    def _of_pattern(self, option: str, module: str, default: Any) -> Any:
        patterns: Mapping[str, Any] = self._config.get(option) or {}
        matches = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
        return next(matches, default)


def open_expert(path: Path | str, base: Checkpoint, prefix: str = "") -> Checkpoint:
    """Open an expert: a checkpoint file, a model's folder, or the folder of a LoRA adapter.

    Args:
        path: The file or folder, or a reference to the Hub. One of another library is seen under open_clip's names,
            and takes from the base what its format may lack.
        base: Of the pool, under open_clip's names if it is a CLIP.
        prefix: Of the encoder's keys.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: See :func:`~adamerge.checkpoints.model_folder.open_model` and :class:`AdapterCheckpoint`.
    """
    path = located(path)
    if not (path / CONFIG).is_file():
        expert = open_model(path)
        table = table_of(expert.source) if isinstance(expert, MappedCheckpoint) else None
        return Completed(expert, base, table) if isinstance(expert, MappedCheckpoint) and table else expert
    table = _foreign_names(path)
    if table is None:
        return AdapterCheckpoint(path, base, prefix)
    start = next(iter(table.bare), "")
    return as_own(AdapterCheckpoint(path, as_theirs(base, table), start), table)


def _foreign_names(folder: Path) -> KeyTable | None:
    """Return the table of the names that an adapter uses, where it was trained on another library's model."""
    weights = _weights_file(folder)
    keys = open_checkpoint(weights).keys if weights.exists() else ()
    matches = [_PAIR.match(_clean(key) or "") for key in keys]
    names = [f"{match['module']}.weight" for match in matches if match]
    for table in TABLES:
        if any(own_key(start + name, table) for start in ("", *table.bare) for name in names):
            return table
    return None


def _weights_file(folder: Path) -> Path:
    return next((folder / name for name in _WEIGHTS if (folder / name).exists()), folder / _WEIGHTS[0])


def change_of(expert: Checkpoint, key: str) -> Tensor | LowRank:
    """Return what an expert says of a tensor: its own value, or its task vector as a product."""
    return expert.change(key) if isinstance(expert, AdapterCheckpoint) else expert.get(key)


_REMEDY = "Merge it into a full checkpoint with peft's merge_and_unload, and use that as the expert."


def _read_config(path: Path) -> Mapping[str, Any]:
    """Read and check ``adapter_config.json``."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}). Save the adapter again.") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise InputError(f"{path}: peft_type: expected 'LORA', found {kind!r}. {_REMEDY}")
    for option in _VARIANTS:
        if config.get(option):
            raise InputError(
                f"{path}: {option}: this variant of LoRA is not supported, found {config[option]!r}. {_REMEDY}"
            )
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise InputError(
            f"{path}: init_lora_weights: {init!r} moved part of the base into the adapter, expected one of "
            f"{shorten([str(kind) for kind in _PLAIN_INITS])}. {_REMEDY}"
        )
    for option in ("rank_pattern", "alpha_pattern"):
        _check_patterns(path, option, config.get(option))
    return config  # type: ignore[no-any-return]


def _check_patterns(path: Path, option: str, patterns: Any) -> None:
    try:
        for pattern in patterns or {}:
            re.compile(pattern)
    except (re.error, TypeError) as error:
        raise InputError(f"{path}: {option}: expected a mapping from patterns to numbers ({error}).") from error


def _clean(key: str) -> str | None:
    """Return a tensor's name in the adapted model; None where the key is not from peft."""
    if not key.startswith(_PREFIX):
        return None
    name = key.removeprefix(_PREFIX)
    return name.replace(".modules_to_save.default", "").replace(".modules_to_save", "")
