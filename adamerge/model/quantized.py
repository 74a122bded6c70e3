"""Weights of linear layers held in 8 or 4 bits, activations as they are.

``int8`` by torchao: one scale per output neuron. ``nf4`` by bitsandbytes: NormalFloat, one scale per 64 entries.

Reference:
    Dettmers et al., QLoRA, arXiv:2305.14314, for nf4.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from adamerge.errors import InputError

PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}  # of each dtype; the extra has the dtype's name


def check_quantized(dtype: str, engine: str) -> None:
    """Raise :class:`~adamerge.InputError` where the package is not installed, or the engine merges into the base."""
    if engine != "beside":
        raise InputError(
            f"encoder.base_dtype: {dtype} needs a base that nothing merges into, found encoder.engine={engine}. "
            "Set encoder.engine=beside."
        )
    if find_spec(PACKAGES[dtype]) is None:
        raise InputError(
            f"encoder.base_dtype: {dtype} needs the package {PACKAGES[dtype]}: pip install 'adamerge[{dtype}]'."
        )


def quantized(weight: Tensor, dtype: str) -> Tensor:
    """Return the weight (d, w) of a linear layer, which takes the layer's call and has ``dequantize()``.

    Passes to inputs are differentiable, the weight is not. Memory per entry: one byte in int8, 4.5 bits in nf4.

    Args:
        weight: In float32.
        dtype: ``int8`` or ``nf4``.
    """
    if dtype == "nf4":
        return Nf4(weight.detach())
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    with torch.no_grad():
        quantize_(layer, Int8WeightOnlyConfig())
    return layer.weight


class Nf4(Tensor):
    """A weight (d, w) in bitsandbytes' NormalFloat of 4 bits.

    The library's own tensor has neither shape nor dtype of the weight. Linear layers multiply by this one as the
    library does; all else sees the dequantised values.
    """

    def __new__(cls, weight: Tensor) -> "Nf4":
        """Return a tensor of the weight's shape, dtype and device."""
        return Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)

    def __init__(self, weight: Tensor) -> None:
        from bitsandbytes.functional import quantize_4bit

        self.qdata, self.state = quantize_4bit(weight.contiguous(), quant_type="nf4")

    def dequantize(self) -> Tensor:
        """Return the values (d, w)."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.qdata, self.state)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the product with inputs (..., w), differentiable in these."""
        from bitsandbytes import matmul_4bit  # type: ignore[attr-defined]

        device = x.device.type
        if torch.is_autocast_enabled(device):  # which does not know the library's product
            x = x.to(torch.get_autocast_dtype(device))
        bias = None if bias is None else bias.to(x.dtype)
        product: Tensor = matmul_4bit(x, self.qdata.t(), quant_state=self.state, bias=bias)
        return product

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear and isinstance(args[1], cls):
            return args[1].linear(args[0], *args[2:], **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(cls, cls.dequantize, (args, kwargs or {}))
        return func(*args, **kwargs)
