"""Adapters of networks whose output layer is the table of embeddings: one weight, or two where trained apart."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.errors import InputError

_OUTPUTS = ("lm_head", "embed_out")  # what transformers calls them


def leave_out_tied(file: Checkpoint, base: Checkpoint, pairs: dict[str, Any], whole: dict[str, str]) -> None:
    """Leave out what an adapter says of an output layer that the base ties, where it says the same of the embeddings.

    Args:
        file: The adapter's weights.
        base: The checkpoint that it was trained on.
        pairs: Module to the keys ``down`` and ``up`` of its factors; changed.
        whole: Name of a tensor that replaces the base's to its key; changed.

    Raises:
        InputError: If the two differ: the adapted model has two weights there, the base one.
    """
    absent = [name for name in _OUTPUTS if not any(f".{key}".endswith(f".{name}.weight") for key in base.keys)]
    for name, pair in list(pairs.items()):
        if _layer(name) in absent and pair.down and pair.up:
            others = [_product(file, p).t() for p in pairs.values() if p.is_embedding and p.down and p.up]
            _check(_product(file, pair), others, name, file, base)
            del pairs[name]
    for name, key in list(whole.items()):
        if _layer(name.removesuffix(".weight")) in absent:
            others = [file.get(other) for other in whole.values() if other != key]
            _check(file.get(key), others, name, file, base)
            del whole[name]


def _layer(module: str) -> str:
    return module.removesuffix(".base_layer").rpartition(".")[2]


def _product(file: Checkpoint, pair: Any) -> Tensor:
    return file.get(pair.up).float() @ file.get(pair.down).float()


def _check(tensor: Tensor, others: Collection[Tensor], name: str, file: Checkpoint, base: Checkpoint) -> None:
    if not any(other.shape == tensor.shape and torch.allclose(other, tensor) for other in others):
        raise InputError(
            f"{file.name}: trains {name!r}, which {base.name} lacks. If the base ties it to its embeddings, the "
            "adapted model has two weights there: give the base two, and name that as the base "
            "(docs/language_models.md, Models: Tied weights)."
        )
