"""Which modules take an update beside their weight, how each of them adds it, and who else uses the weight.

Legend: R ranks of all experts; a weight is a matrix (d, w), d its first dimension.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from adamerge.errors import InputError, shorten
from adamerge.model.groups import GroupIndex
from adamerge.model.merge_low_rank import is_expressible


class Term(NamedTuple):
    """The factors of one parameter's update under the coefficients of now.

    Attributes:
        up: (d, R), with coefficients per row in it.
        down: (R, w), with coefficients per column in it.
        scale: One coefficient per rank (R,) where they are neither; None where they are.
    """

    up: Tensor
    down: Tensor
    scale: Tensor | None

    def between(self, ranks: Tensor) -> Tensor:
        """Scale what comes out of the first factor, (..., R)."""
        return ranks if self.scale is None else ranks * self.scale.to(ranks.dtype)


Form = Callable[[nn.Module, Tensor, Tensor, Term], Tensor]  # module, its input and output; returns the new output


def _linear(_: nn.Module, x: Tensor, y: Tensor, term: Term) -> Tensor:
    ranks = term.between(functional.linear(x, term.down))
    if y.ndim == 1:
        return y + functional.linear(ranks, term.up)
    return torch.addmm(y.flatten(0, -2), ranks.flatten(0, -2), term.up.t()).view(y.shape)  # one pass over the output


def _transposed_linear(_: nn.Module, x: Tensor, y: Tensor, term: Term) -> Tensor:
    return y + term.between(x @ term.up) @ term.down


def _embedding(module: Any, x: Tensor, y: Tensor, term: Term) -> Tensor:
    change = term.between(functional.embedding(x, term.up)) @ term.down
    if module.padding_idx is not None:  # to which torch gives no gradient
        change = torch.where((x == module.padding_idx).unsqueeze(-1), change.detach(), change)
    return y + change


def _convolution(module: Any, x: Tensor, y: Tensor, term: Term) -> Tensor:
    ones = (1,) * (module.weight.ndim - 2)
    ranks = module._conv_forward(x, term.down.view(-1, *module.weight.shape[1:]), None)
    ranks = ranks if term.scale is None else ranks * term.scale.to(ranks.dtype).view(-1, *ones)
    convolve = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[len(ones)]
    return y + convolve(ranks, term.up.view(*term.up.shape, *ones))


def _form_of(module: nn.Module, parent: nn.Module) -> Form | None:
    """Return how an update of a module's weight acts on its output; None where that is not known."""
    if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):  # which take the weights by themselves
        return None
    if type(module) is nn.Linear:
        return _linear
    if is_transposed(module):
        return _transposed_linear
    if type(module) is nn.Embedding and module.max_norm is None:
        return _embedding
    if type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and module.groups == 1:
        return _convolution
    return None


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, whose weight is (inputs, outputs)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def updated_modules(
    encoder: nn.Module, shapes: Mapping[str, Sequence[int]], products: Collection[str], index: GroupIndex | None
) -> dict[str, list[tuple[nn.Module, Form]]]:
    """Return, for each weight whose update can be added beside it, the modules that use it, and how they add it.

    Args:
        encoder: The network that lends its code.
        shapes: Name to shape (*S), of the parameters that merge.
        products: Parameters whose updates are products of thin matrices, of all experts.
        index: The groups of the coefficients; None for any.

    Raises:
        InputError: If there is none, or the groups divide rows of one.
    """
    places, updated, divided = _places(encoder), dict[str, list[tuple[nn.Module, Form]]](), list[str]()
    for name in [name for name in shapes if name in products]:
        forms = [(module, _form_of(module, parent)) for module, parent, at in places[name] if at == "weight"]
        if len(forms) < len(places[name]) or any(form is None for _, form in forms):
            continue
        if index is not None and not is_expressible(index.segments[name], shapes[name]):
            divided.append(name)
        updated[name] = [(module, form) for module, form in forms if form is not None]
    if divided:
        raise InputError(
            f"encoder.engine: beside takes whole rows or columns of a weight per coefficient, and the granularity "
            f"divides rows of {shorten(divided)}. Set encoder.engine=merged, or granularity=row."
        )
    if not updated:
        raise InputError(
            "encoder.engine: beside needs weights of Linear, Conv or Embedding modules that all experts change by "
            "LoRA (DoRA is none), or granularity=rank, and this pool has none. Set encoder.engine=merged."
        )
    return updated


def _places(encoder: nn.Module) -> dict[str, list[tuple[nn.Module, nn.Module, str]]]:
    """Return, for each parameter by its first name, the modules that hold it, their parents and its names there."""
    first = {id(parameter): name for name, parameter in encoder.named_parameters()}
    places: dict[str, list[tuple[nn.Module, nn.Module, str]]] = {name: [] for name in first.values()}
    for path, module in encoder.named_modules():
        parent = encoder.get_submodule(path.rpartition(".")[0])
        for at, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places[first[id(parameter)]].append((module, parent, at))
    return places


class Watch(TorchFunctionMode):
    """Refuses to go on where a network uses a weight without calling its module, as the hook would not see that.

    Args:
        modules: Name of a weight to the modules that may use it, which have it.
    """

    def __init__(self, modules: Mapping[str, Sequence[nn.Module]]) -> None:
        super().__init__()
        self._modules = modules
        self._inside = dict.fromkeys(modules, 0)
        self._names: dict[int, str] = {}
        self.look()
        self._handles = [
            handle
            for name, users in modules.items()
            for module in users
            for handle in (
                module.register_forward_pre_hook(partial(self._count, name, 1)),
                module.register_forward_hook(partial(self._count, name, -1), always_call=True),
            )
        ]

    def look(self) -> None:
        """See which tensors the weights are now."""
        self._names |= {id(users[0].weight): name for name, users in self._modules.items()}

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _count(self, name: str, by: int, *_: Any) -> None:
        self._inside[name] += by

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, (tuple, list)) else [result]
        if any(isinstance(value, Tensor) for value in results):  # not where a network asks for a dtype or a shape
            for value in (*args, *(kwargs or {}).values()):
                for tensor in value if isinstance(value, (tuple, list)) else (value,):  # cat and einsum take lists
                    name = self._names.get(id(tensor))
                    if name is not None and self._inside[name] == 0:
                        raise InputError(
                            f"encoder.engine: beside cannot follow {name!r}: the network uses it without a call of its "
                            "module. Set encoder.engine=merged."
                        )
        return result
