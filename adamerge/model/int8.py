"""Weights of linear layers in int8, weight-only, by torchao: one scale per output neuron, activations as they are."""

from importlib.util import find_spec

import torch
from torch import Tensor, nn

from adamerge.errors import InputError


def check_int8(engine: str) -> None:
    """Raise :class:`~adamerge.InputError` where torchao is not installed, or the engine merges into the base."""
    if engine != "beside":
        raise InputError(
            f"encoder.base_dtype: int8 needs a base that nothing merges into, found encoder.engine={engine}. "
            "Set encoder.engine=beside."
        )
    if find_spec("torchao") is None:
        raise InputError("encoder.base_dtype: int8 needs the package torchao: pip install 'adamerge[int8]'.")


def in_int8(weight: Tensor) -> Tensor:
    """Return the weight (d, w) of a linear layer as torchao's tensor of int8, which takes the layer's call as it is.

    Passes to inputs are differentiable, the weight is not. Memory: one byte per entry.
    """
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    with torch.no_grad():
        quantize_(layer, Int8WeightOnlyConfig())
    return layer.weight
