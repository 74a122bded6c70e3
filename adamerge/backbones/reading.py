"""What a transformers network returns, read as logits or features, and which of its positions count."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from adamerge.backbones.model_inputs import ANSWER
from adamerge.errors import InputError, shorten

FEATURES = ("auto", "pooler_output", "image_embeds", "text_embeds", "last_hidden_state", "mean", "first")


def rows_of(network: str, *, is_encoder_decoder: bool, features: str) -> str:
    """Return what a network's logits have rows of: ``next`` tokens, the ``decoder``'s, ``tokens`` or ``samples``.

    Args:
        network: Name of its class, which the library's own tables sort.
        is_encoder_decoder: As its configuration says.
        features: One of :data:`FEATURES`.
    """
    from transformers.models.auto import modeling_auto as auto

    kinds = {
        "next": (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
        "decoder": (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,),
        "tokens": (auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    }
    if is_encoder_decoder:
        del kinds["next"]
    named = (kind for kind, tables in kinds.items() if any(_has(table, network) for table in tables))
    return next(named, "tokens" if features == "last_hidden_state" else "samples")


def _has(table: Mapping[str, Any], name: str) -> bool:
    """Whether one of the library's tables of classes has a name; some entries have several."""
    return any(name == entry or (isinstance(entry, (tuple, list)) and name in entry) for entry in table.values())


def next_tokens(inputs: Mapping[str, Tensor], *, answers_only: bool) -> Tensor:
    """Return the positions whose next token is part of the text, bool (B, S - 1).

    Of answers only, (B, S): those whose next token is part of the answer; of a text without, the last, which an answer
    would follow.
    """
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    valid = mask[:, 1:] & mask[:, :-1]
    if not answers_only or ANSWER not in inputs:
        return valid
    answer = inputs[ANSWER].bool()
    ends = mask & ~functional.pad(mask[:, 1:], (0, 1)) & ~answer.any(1, keepdim=True)
    return functional.pad(valid & answer[:, 1:], (0, 1)) | ends


def pooled(output: Any, mask: Tensor | None, features: str, network: str) -> Tensor:
    """Return what stands for an output that has no logits, (B, F) or (B, S, F).

    Args:
        output: The network's result.
        mask: Which positions are no padding, (B, S).
        features: One of :data:`FEATURES`.
        network: Name of the network, for messages.

    Raises:
        InputError: If the output has no such part.
    """
    names = FEATURES[1:5] if features == "auto" else (features,)
    names = ("last_hidden_state",) if features in ("mean", "first") else names
    parts = (getattr(output, name, None) for name in names)
    tensor = next((part for part in parts if isinstance(part, Tensor)), None)
    if tensor is None:
        has = list(output.keys()) if isinstance(output, Mapping) else [type(output).__name__]
        raise InputError(
            f"backbone.features: expected logits or {', '.join(names)} in the result of {network}, found "
            f"{shorten(map(str, has))}. Set backbone.features, or choose another Auto class: backbone.auto."
        )
    if features == "first":
        return tensor[:, 0]
    if features != "mean":
        return tensor
    weight = torch.ones_like(tensor[..., :1]) if mask is None else mask.unsqueeze(-1).to(tensor)
    return (tensor * weight).sum(1) / weight.sum(1).clamp(min=1)
