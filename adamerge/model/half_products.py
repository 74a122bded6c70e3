"""Products in bfloat16 on processors without units for it, where torch's own take up to 150 times those in float32."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_PRODUCTS = (_aten.mm, _aten.addmm, _aten.mv, _aten.bmm, _aten.baddbmm, _aten.convolution, _aten.convolution_backward)


def has_bfloat16_units() -> bool:
    """Return whether the processor multiplies matrices in bfloat16 (AVX-512 BF16 or AMX)."""
    units = torch.cpu.get_capabilities()
    return bool(units.get("avx512_bf16") or units.get("amx_bf16"))


def half_products(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    """Return what forward and backward passes on weights of a dtype run under.

    On a processor without units, products of bfloat16 are computed by way of float32 copies, which live for one
    product: the memory of the largest weight. Results are as with units, to the order of the sums. None is no dtype.
    """
    if dtype is not torch.bfloat16 or device.type != "cpu" or has_bfloat16_units():
        return nullcontext()
    return _ThroughFloat32()  # type: ignore[no-untyped-call]


class _ThroughFloat32(TorchDispatchMode):
    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_product = function.overloadpacket in _PRODUCTS and "out" not in kwargs
        if not is_product or not any(_is_in(torch.bfloat16, value) for value in args):
            return function(*args, **kwargs)
        result = function(*(_cast(value, torch.bfloat16, torch.float32) for value in args), **kwargs)
        if isinstance(result, Tensor):
            return result.bfloat16()
        return tuple(_cast(value, torch.float32, torch.bfloat16) for value in result)  # of convolution_backward


def _is_in(dtype: torch.dtype, value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype is dtype


def _cast(value: Any, source: torch.dtype, target: torch.dtype) -> Any:
    """Return a tensor of one dtype in another, and all else as it is."""
    return value.to(target) if _is_in(source, value) else value
