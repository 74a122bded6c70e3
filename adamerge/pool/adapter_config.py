"""``adapter_config.json``, as peft writes it: what is read of it, and which kinds are refused."""

import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from adamerge.errors import InputError, shorten
from adamerge.system.reading import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAMES_BEGIN = "base_model.model."  # of every name in the file of weights
PATTERNS = ("rank_pattern", "alpha_pattern")  # options from a regular expression of modules to a number
REMEDY = "Merge it into a full checkpoint with peft's merge_and_unload, and use that as the expert."
# Initialisations that leave the base as it is; the others move part of it into the adapter.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_FILES = ("model", "pytorch_model", "open_clip_model", "open_clip_pytorch_model")  # of models' folders
_NAMELESS = {"", "base", "model", "models", "pretrained", "weights", "checkpoint", "output", "out"}
# Variants of LoRA that change more than the product of two matrices says, where set.
_VARIANTS = (
    *("use_qalora", "use_bdlora", "layer_replication", "target_parameters", "trainable_token_indices"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "megatron_config", "monteclora_config"),
    "velora_config",
)


def read_config(path: Path) -> Mapping[str, Any]:
    """Read and check ``adapter_config.json``.

    Raises:
        InputError: If it is of another kind, or damaged.
    """
    try:
        config = read_json(path)
    except OSError as error:
        raise InputError(f"{path}: not readable as JSON ({error}). Save the adapter again.") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise InputError(f"{path}: peft_type: expected 'LORA', found {kind!r}. {REMEDY}")
    for option in _VARIANTS:
        if config.get(option):
            raise InputError(
                f"{path}: {option}: this variant of LoRA is not supported, found {config[option]!r}. {REMEDY}"
            )
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise InputError(
            f"{path}: init_lora_weights: {init!r} moved part of the base into the adapter, expected one of "
            f"{shorten([str(kind) for kind in _PLAIN_INITS])}. {REMEDY}"
        )
    for option in PATTERNS:
        if not isinstance(config.get(option) or {}, dict):
            raise InputError(
                f"{path}: {option}: expected a mapping from patterns to numbers, found {config[option]!r:.80}."
            )
    return config  # type: ignore[no-any-return]


def names_other_base(recorded: str, base: str) -> bool:
    """Whether a configuration's name of the base is plainly another than that of the pool's base.

    Paths move, so the last part of the name is looked for in the whole of the base's; a base whose file and folder are
    called after nothing, such as ``base/model.safetensors``, is not held against it.

    Args:
        recorded: As ``base_model_name_or_path`` has it: a path, or a name on the Hub.
        base: Path of the base's file or folder.

    >>> names_other_base("org/Small-Chat", "/models/small-chat-bf16/model.safetensors")
    False
    >>> names_other_base("org/small-chat", "/models/small/model.safetensors")
    True
    """
    path = Path(base)
    own = path.stem if path.suffix else path.name
    own = path.parent.name if own.partition(".")[0].partition("-")[0] in _FILES else own
    expected, found = _letters(PurePath(recorded.replace("\\", "/")).name), _letters(base)
    return bool(expected) and not {expected, _letters(own)} & _NAMELESS and expected not in found


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
