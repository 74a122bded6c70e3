"""Calling an encoder: which tasks share a forward pass, whose parameters it uses."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from adamerge.errors import InputError, did_you_mean, shorten
from adamerge.pool.pool import ExpertPool

MicroBatch = int | Literal["auto"] | None
_FUSED_ENTRIES = 1 << 22  # of the inputs of one fused pass on a CPU: 27 images of 224 x 224


def call_with(
    encoder: nn.Module, tensors: Mapping[str, Tensor], function: Callable[[nn.Module], Any], *, strict: bool = True
) -> Any:
    """Run ``function(encoder)`` with parameters and buffers swapped in for its duration; all of them, if ``strict``."""
    named = {f"encoder.{name}": tensor for name, tensor in tensors.items()}
    return functional_call(_Scope(encoder), named, (function,), strict=strict)


class _Scope(nn.Module):
    """Lets a function run inside ``functional_call``, with the swapped encoder as its argument."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, function: Callable[[nn.Module], Any]) -> Any:
        return function(self.encoder)


def fused(inputs: Mapping[str, Tensor], micro_batch: MicroBatch) -> list[list[str]]:
    """Group tasks whose inputs agree in shape and dtype, so that one forward pass serves each group.

    Small batches gain up to 3x from fusing. On a CPU large ones lose, once the activations of the
    whole group have left the cache: ``"auto"`` closes a group before its inputs exceed ``_FUSED_ENTRIES``.

    Args:
        inputs: Task to inputs (B, ...).
        micro_batch: Most inputs in a group, in whole tasks; ``"auto"`` for a rule by size; None for no limit.
    """
    kinds: dict[tuple[torch.Size, torch.dtype], list[list[str]]] = {}
    for task, batch in inputs.items():
        groups = kinds.setdefault((batch.shape[1:], batch.dtype), [[]])
        limit: float = float("inf")
        if micro_batch == "auto" and batch.device.type == "cpu":
            limit = _FUSED_ENTRIES // max(1, batch[:1].numel())
        elif isinstance(micro_batch, int):
            limit = micro_batch
        if groups[-1] and sum(len(inputs[other]) for other in (*groups[-1], task)) > limit:
            groups.append([])
        groups[-1].append(task)
    return [group for groups in kinds.values() for group in groups]


def check_names(encoder: nn.Module, pool: ExpertPool) -> None:
    """Check once, before training, that the encoder's parameters are the pool's."""
    wanted = dict(encoder.named_parameters())
    every = dict(encoder.named_parameters(remove_duplicate=False))
    fixed = {name: tuple(tensor.shape) for name, tensor in pool.fixed.items() if name in every}
    have = {**pool.shapes, **fixed}  # what is fixed and not the encoder's, such as a classifier, is left out
    tied_in_pool = [name for name in every if name not in wanted and name in have]
    if tied_in_pool:
        raise InputError(
            f"The encoder ties {tied_in_pool[0]!r} to another parameter, but the pool merges it separately. "
            "Build the pool with tied={alias: canonical}."
        )
    missing = [name for name in wanted if name not in have]
    extra = [name for name in have if name not in wanted]
    if missing or extra:
        hint = did_you_mean(missing[0], extra) if missing else ""
        raise InputError(
            f"Encoder and pool differ: the pool lacks {len(missing)} of the encoder's parameters "
            f"({shorten(missing)}) and has {len(extra)} that the encoder lacks ({shorten(extra)}).{hint} "
            "Is key_map the prefix of the encoder's keys, and are buffers excluded?"
        )
    for name, shape in have.items():
        if tuple(wanted[name].shape) != shape:
            raise InputError(f"Parameter {name!r}: the encoder has {tuple(wanted[name].shape)}, the pool {shape}.")
