"""Experts in peft's LoRA format: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

What is not understood is refused: an adapter that is read half merges into wrong weights in silence.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamerge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from adamerge.checkpoints.clip_names import PREFIX, as_own, as_theirs, own_key
from adamerge.checkpoints.composed import ComposedCheckpoint, aligned
from adamerge.checkpoints.hub import located
from adamerge.checkpoints.model_folder import open_model
from adamerge.errors import InputError, check_pattern, did_you_mean, shorten
from adamerge.pool.adapter_config import CONFIG, NAMES_BEGIN, PATTERNS, REMEDY, WEIGHTS, read_config
from adamerge.pool.low_rank import LowRank, matrix_shape
from adamerge.pool.places import BIAS, WEIGHT, Place, places_of
from adamerge.pool.tied_outputs import leave_out_tied
from adamerge.system.files import combined_hash, sha256
from adamerge.system.patterns import search_all

_WEIGHTS = (WEIGHTS, "adapter_model.bin")
_PAIR = re.compile(
    r"^(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)"
    r"(?:\.default)?(?:\.(?P<kind>weight|bias))?$"
)
# What a base has before the names of a model that an adapter was trained on, by the model's class.
_STARTS = {
    **dict.fromkeys(("CLIP", "CustomTextCLIP", "CLIPModel"), ""),
    **{"VisionTransformer": "visual.", "TextTransformer": "text.", "CLIPTextModel": "text_model."},
}


@dataclass
class _Pair:
    """Where one weight's factors are in the file."""

    module: str  # as the adapter calls it
    down: str = ""  # key of lora_A
    up: str = ""  # key of lora_B
    magnitude: str = ""  # key of DoRA's norms of the rows, or columns where the product is turned
    is_embedding: bool = False
    is_transposed: bool = False
    scale: float = 1.0


class AdapterCheckpoint:
    """A LoRA adapter on its base, seen as the checkpoint it would merge into.

    Tensors that the adapter does not touch are the base's; those of ``modules_to_save`` and trained biases are its
    own; adapted weights are the base's plus ``scale * B @ A``, of DoRA (arXiv:2402.09353) with its norms.

    Args:
        folder: The adapter's.
        base: The checkpoint that it was trained on.
        prefix: Prefix of the encoder's keys in ``base``: an adapter may have been trained on the encoder alone.

    Attributes:
        changed: The tensors that are not the base's.

    Raises:
        FileNotFoundError: If a file is missing.
        InputError: If the adapter is of another kind, or does not fit the base; the message names file and key.
    """

    def __init__(self, folder: Path, base: Checkpoint, prefix: str = "") -> None:
        self.name = str(folder)
        self._base, self._base_keys = base, frozenset(base.keys)
        self._config_file = folder / CONFIG
        self._config = read_config(self._config_file)
        self._file = open_checkpoint(_weights_file(folder))
        pairs: dict[str, _Pair] = {}  # by the adapter's own names, as the next two
        biases: dict[str, str] = {}
        whole: dict[str, str] = {}
        for key in self._file.keys:
            self._sort(key, pairs, biases, whole)
        leave_out_tied(self._file, base, pairs, whole)
        if not pairs:
            raise InputError(
                f"{self._file.name}: no LoRA weights: expected keys such as '{NAMES_BEGIN}NAME.lora_A.weight'."
            )
        self._matching = self._match_patterns({*pairs, *biases})
        place = self._place(pairs, biases, prefix)
        self._pairs = {str(place.key(name, WEIGHT)): pair for name, pair in pairs.items()}
        self._biases = {str(place.key(name, BIAS)): (key, self._scale(name, key)) for name, key in biases.items()}
        self._whole = {place.name(name): key for name, key in whole.items()}
        self._whole = {key: name for key, name in self._whole.items() if not self._is_copy(key, name)}
        self.changed = tuple(dict.fromkeys((*self._pairs, *self._biases, *self._whole)))
        for key, pair in self._pairs.items():
            self._complete(key, pair)

    def _is_copy(self, key: str, name: str) -> bool:
        """Whether a whole tensor is the base's: peft writes the embeddings beside an adapter of them."""
        if key not in self._pairs or self._file.spec(name)[0] != self._base.spec(key)[0]:
            return False
        tensor = self._file.get(name)
        return torch.equal(tensor, self._base.get(key).to(tensor.dtype))

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the base's tensor names, and those that only the adapter has."""
        return (*self._base.keys, *(key for key in self._whole if key not in self._base_keys))

    def spec(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return shape and dtype of a tensor, from the headers; adapted weights are computed in at least float32."""
        return self._file.spec(self._whole[key]) if key in self._whole else self._base.spec(key)

    def get(self, key: str) -> Tensor:
        """Return a tensor of the adapted model."""
        tensor = self._file.get(self._whole[key]) if key in self._whole else self._base.get(key)
        if key not in self._pairs and key not in self._biases:
            return tensor
        product = self._product(key)
        value = tensor.to(product.up.dtype).reshape(matrix_shape(tensor.shape))
        value = torch.addmm(value, product.up, product.down)
        pair = self._pairs.get(key)
        if pair is not None and pair.magnitude:
            axis = 0 if pair.is_transposed else 1
            norms = self._file.get(pair.magnitude).to(value.dtype).flatten().unsqueeze(axis)
            value = value * (norms / value.norm(dim=axis, keepdim=True))
        return value.view(tensor.shape)

    def change(self, key: str) -> Tensor | LowRank:
        """Return the task vector of a tensor as a product, or the tensor itself where its change is none."""
        return self._product(key) if self.is_product(key) else self.get(key)

    def is_product(self, key: str) -> bool:
        """Whether the change of a tensor is one of low rank; that of DoRA and of whole tensors is none."""
        pair = self._pairs.get(key)
        return key not in self._whole and (pair is None or not pair.magnitude)

    @property
    def base_name(self) -> str:
        """What the model was called that the adapter was trained on; empty where that is not known."""
        return str(self._config.get("base_model_name_or_path") or "")

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

    def _sort(self, key: str, pairs: dict[str, _Pair], biases: dict[str, str], whole: dict[str, str]) -> None:
        """Sort one tensor of the file: a factor, the bias of one, or a tensor that replaces the base's."""
        name = _clean(key)
        if name is None:
            raise InputError(f"{self._file.name}: tensor {key!r}: expected a key that begins with {NAMES_BEGIN!r}.")
        match = _PAIR.match(name)
        is_bias = match is not None and match["kind"] == "bias"
        if match is None and "lora_" not in name and "trainable_tokens" not in name:
            whole[name] = key
        elif match is None or (is_bias and match["part"] != "B"):
            raise InputError(
                f"{self._file.name}: tensor {key!r} belongs to a variant of LoRA that is not supported. {REMEDY}"
            )
        elif is_bias:
            biases[match["module"]] = key
        else:
            pair = pairs.setdefault(match["module"], _Pair(match["module"]))
            pair.is_embedding |= "embedding" in match["part"]
            setattr(pair, {"A": "down", "B": "up"}.get(match["part"][-1], "magnitude"), key)

    def _place(self, pairs: Mapping[str, _Pair], biases: Mapping[str, str], prefix: str) -> Place:
        """Find where the base has all names; of several places that of the class trained on, then the encoder's."""
        wanted = [(name, WEIGHT) for name in pairs] + [(name, BIAS) for name in biases]

        def fits(place: Place) -> bool:
            shapes = [(self._base.spec(str(place.key(name, WEIGHT)))[0], pair) for name, pair in pairs.items()]
            return all(sorted(matrix_shape(shape)) == sorted(self._product_shape(pair)) for shape, pair in shapes)

        places = places_of(wanted, self._base_keys, fits)
        mapping = self._config.get("auto_mapping")
        trained = str(mapping.get("base_model_class")) if isinstance(mapping, Mapping) else ""
        for start in (_STARTS.get(trained), None if "Text" in trained else prefix or None):
            places = [place for place in places if place.start == start] or places
        if not places:
            nowhere = [item for item in wanted if not places_of([item], self._base_keys, lambda _: True)]
            name, endings = (nowhere or wanted)[0]
            parameter = Place(()).name(name) + endings[0]
            raise InputError(
                f"{self._file.name}: tensor {NAMES_BEGIN + name!r} adapts {parameter!r}, which {self._base.name} lacks."
                f"{did_you_mean(prefix + parameter, self._base.keys)} Was the adapter trained on this base?"
            )
        if len(places) > 1:
            raise InputError(
                f"{self._file.name}: its names, such as {wanted[0][0]!r}, fit {self._base.name} behind "
                f"{shorten(place.start for place in places)}. Name the encoder's prefix, such as --key-prefix visual.; "
                f"or: {REMEDY}"
            )
        return places[0]

    def _product_shape(self, pair: _Pair) -> tuple[int, int]:
        """Return the rows and row length of a product; zeros where a factor is missing."""
        if not pair.down or not pair.up:
            return 0, 0
        down, up = (matrix_shape(self._file.spec(name)[0]) for name in (pair.down, pair.up))
        return up[0], down[1]

    def _complete(self, key: str, pair: _Pair) -> None:
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
        if bool(pair.magnitude) != bool(self._config.get("use_dora")):
            raise InputError(
                f"{where}: its module has {'' if pair.magnitude else 'no '}lora_magnitude_vector, but "
                f"{self._config_file} says use_dora = {bool(self._config.get('use_dora'))}. Do both belong together?"
            )
        outputs = expected[1 if pair.is_transposed else 0]
        if pair.magnitude and math.prod(self._file.spec(pair.magnitude)[0]) != outputs:
            raise InputError(
                f"{self._file.name}: tensor {pair.magnitude!r}: expected {outputs} numbers, one per output, found "
                f"shape {self._file.spec(pair.magnitude)[0]}."
            )

    def _scale(self, module: str, key: str, stored_rank: int | None = None) -> float:
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
        if stored_rank is not None and stored_rank != rank:
            raise InputError(
                f"{self._file.name}: tensor {key!r} has rank {stored_rank}, but {self._config_file} says r = {rank}. "
                "Do both belong together, and is rank_pattern complete?"
            )
        return times * float(alpha) / (math.sqrt(rank) if self._config.get("use_rslora") else float(rank))

    def _match_patterns(self, names: Iterable[str]) -> dict[tuple[str, str], Collection[str]]:
        """Return the modules that each pattern of the configuration matches, as peft matches them."""
        modules = sorted({name.partition(".base_layer")[0] for name in names})
        keys = [(option, str(key)) for option in PATTERNS for key in self._config.get(option) or {}]
        where = {(option, key): f"{self._config_file}: {option}[{key!r:.60}]" for option, key in keys}
        for key, option in where.items():
            check_pattern(option, key[1])
        found = search_all({where[option, key]: rf"(?:^|\.)(?:{key})$" for option, key in keys}, modules)
        return {key: found[text] for key, text in where.items()}

    def _of_pattern(self, option: str, module: str, default: Any) -> Any:
        patterns: Mapping[str, Any] = self._config.get(option) or {}
        return next((value for key, value in patterns.items() if module in self._matching[option, key]), default)


def open_expert(path: Path | str, base: Checkpoint, prefix: str = "") -> Checkpoint:
    """Open an expert: a checkpoint file, a model's folder, or the folder of a LoRA adapter.

    Args:
        path: The file or folder, or a reference to the Hub. One of another library is seen under open_clip's names,
            and takes from the base what its format may lack.
        base: The pool's base, under open_clip's names if it is a CLIP.
        prefix: Prefix of the encoder's keys.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: See :func:`~adamerge.checkpoints.model_folder.open_model` and :class:`AdapterCheckpoint`.
    """
    path = located(path)
    if not (path / CONFIG).is_file():
        encoder = {key for key in base.keys if key.startswith(prefix)}
        return aligned(open_model(path, base, lambda names: not encoder.isdisjoint(names)), base)
    if not _has_their_names(path):
        return AdapterCheckpoint(path, base, prefix)
    return as_own(AdapterCheckpoint(path, as_theirs(base), PREFIX))


def _has_their_names(folder: Path) -> bool:
    """Return whether an adapter was trained on a Hugging Face CLIP, or on its vision tower."""
    weights = _weights_file(folder)
    keys = open_checkpoint(weights).keys if weights.exists() else ()
    matches = [_PAIR.match(_clean(key) or "") for key in keys]
    names = [f"{match['module']}.weight" for match in matches if match]
    return any(own_key(start + name) is not None for start in ("", PREFIX) for name in names)


def _weights_file(folder: Path) -> Path:
    return next((folder / name for name in _WEIGHTS if (folder / name).exists()), folder / _WEIGHTS[0])


def change_of(expert: Checkpoint, key: str) -> Tensor | LowRank:
    """Return what an expert says of a tensor: its own value, or its task vector as a product."""
    return expert.change(key) if isinstance(expert, AdapterCheckpoint) else expert.get(key)


def is_product(expert: Checkpoint, key: str) -> bool:
    """Return whether :func:`change_of` gives a product, from the headers."""
    return isinstance(expert, AdapterCheckpoint) and expert.is_product(key)


def changed_by(expert: Checkpoint) -> tuple[str, ...] | None:
    """Return the tensors that an adapter changes or adds; None for a whole model."""
    if isinstance(expert, AdapterCheckpoint):
        return expert.changed
    if not isinstance(expert, ComposedCheckpoint):
        return None
    pieces = {key: piece for key, piece in expert.pieces.items() if isinstance(piece.checkpoint, AdapterCheckpoint)}
    return (
        tuple(key for key, p in pieces.items() if {*p.keys} & {*(changed_by(p.checkpoint) or ())}) if pieces else None
    )


def _clean(key: str) -> str | None:
    """Return a tensor's name in the adapted model; None where the key is not from peft."""
    if not key.startswith(NAMES_BEGIN):
        return None
    name = key.removeprefix(NAMES_BEGIN)
    return name.replace(".modules_to_save.default", "").replace(".modules_to_save", "")
