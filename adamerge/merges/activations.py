"""The inputs of Linear layers, attention included.

``nn.MultiheadAttention`` (open_clip, torchvision) never calls its parts as modules: its input projection is a raw
parameter, and hooks on its output projection do not fire. So the input projection's inputs are taken where the
attention is called, and the output projection is taken out of it (an identity takes its place) and applied behind.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from adamerge.data.batch import Inputs


class Rows(NamedTuple):
    """Rows ``start : stop`` of a weight (out, in) that see the same inputs."""

    name: str
    start: int
    stop: int


Take = Callable[[Rows, Tensor], None]


@contextmanager
def linear_inputs(module: nn.Module, params: Mapping[str, Tensor], take: Take) -> Iterator[dict[str, Tensor]]:
    """Hand each Linear layer's inputs to ``take`` while the block runs.

    Args:
        module: The module that will be called, functionally.
        params: Its parameters by name.
        take: Called with the rows of a weight and their inputs (..., in), in each forward pass.

    Yields:
        The parameters to call the module with; its outputs are those under ``params``, to rounding.
    """
    swapped = dict(params)
    with ExitStack() as hooks:
        for path, part in module.named_modules():
            prefix = f"{path}." if path else ""
            if isinstance(part, nn.MultiheadAttention):
                for handle in _watch_attention(part, prefix, swapped, take):
                    hooks.callback(handle.remove)
            elif isinstance(part, nn.Linear) and not _inside_attention(module, path):
                hooks.callback(_watch_linear(part, f"{prefix}weight", take).remove)
        yield swapped


def _watch_linear(part: nn.Linear, name: str, take: Take) -> Any:
    rows = Rows(name, 0, part.out_features)
    return part.register_forward_pre_hook(lambda _, inputs: take(rows, inputs[0]))


def _watch_attention(part: nn.MultiheadAttention, prefix: str, params: dict[str, Tensor], take: Take) -> Iterator[Any]:
    """Register the hooks of an attention, and put an identity in the place of its output projection."""
    weight_name, bias_name = f"{prefix}out_proj.weight", f"{prefix}out_proj.bias"
    weight, bias = params[weight_name], params.get(bias_name)
    params[weight_name] = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    if bias is not None:
        params[bias_name] = torch.zeros_like(bias)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        query, key, value = (
            args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("query", "key", "value"))
        )
        width = part.embed_dim
        if part.in_proj_weight is None:  # keys and values have widths of their own
            for name, inputs in (("q", query), ("k", key), ("v", value)):
                take(Rows(f"{prefix}{name}_proj_weight", 0, width), inputs)
        elif query is key and key is value:
            take(Rows(f"{prefix}in_proj_weight", 0, 3 * width), query)
        else:
            for i, inputs in enumerate((query, key, value)):
                take(Rows(f"{prefix}in_proj_weight", i * width, (i + 1) * width), inputs)

    def after(_: nn.Module, __: Any, outputs: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        take(Rows(weight_name, 0, len(weight)), outputs[0])
        return functional.linear(outputs[0], weight, bias), *outputs[1:]

    yield part.register_forward_pre_hook(before, with_kwargs=True)
    yield part.register_forward_hook(after)


def _inside_attention(module: nn.Module, path: str) -> bool:
    """Whether a Linear layer is a part of an ``nn.MultiheadAttention``."""
    parent = path.rpartition(".")[0]
    return path != "" and isinstance(module.get_submodule(parent), nn.MultiheadAttention)


def without_padding(inputs: Tensor, of_network: Inputs, name: str) -> Tensor:
    """Return a layer's inputs (N, in) without those at padding.

    Args:
        inputs: (..., in), with the axes of a mask before the last, or these flattened to one.
        of_network: What the network was called with. Its masks are (B, S), False or 0 at padding, and their names end
            with ``mask``, as transformers' do.
        name: Of the layer's weight: in a decoder the decoder's own mask comes first.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    masks = {} if isinstance(of_network, Tensor) else {k: m for k, m in of_network.items() if k.endswith("mask")}
    is_decoder = "decoder" in name
    for _, mask in sorted(masks.items(), key=lambda item: ("decoder" in item[0]) != is_decoder):
        if mask.ndim == 2 and inputs.shape[:-1] in (mask.shape, torch.Size((mask.numel(),))):
            return rows[mask.reshape(-1).bool()]
    return rows
