"""Heads of experts: a module of the network that each expert has its own values, and often classes, for."""

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from adamerge.errors import InputError, did_you_mean, shorten

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class HeadModule:
    """A module that is not merged.

    Attributes:
        path: Its path in the network.
        names: The names of its tensors there.
        reason: Why it is each expert's own.
    """

    path: str
    names: tuple[str, ...]
    reason: str


class ClassesLast(nn.Module):
    """A convolution on features whose last axis is F: (B, H, W, F) to logits (B, H, W, C), or (B, F) to (B, C).

    Args:
        head: (B, F, H, W) to (B, C, H, W).
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, H, W, C), or (B, C)."""
        dense = features if features.ndim == 4 else features[:, None, None]
        logits: Tensor = self.head(dense.movedim(-1, 1)).movedim(1, -1)
        return logits if features.ndim == 4 else logits[:, 0, 0]


def find_head(
    network: nn.Module, path: str | None, base: Shapes, experts: Mapping[str, Shapes], shared: Collection[str]
) -> HeadModule | None:
    """Return the module that the base lacks, or has in another shape, and experts have; None where there is none.

    Args:
        network: The whole network.
        path: The module that the user names; None to look for it.
        base: The base's shapes, by the network's names.
        experts: Those of each expert.
        shared: Names whose shapes may differ, as their rows are shared.

    Raises:
        InputError: If there is no such module, or the experts' own tensors are in several.
    """
    if path is not None:
        modules = dict(network.named_modules())
        if path not in modules or not path:
            raise InputError(
                f"backbone.head: {type(network).__name__} has no module {path!r}.{did_you_mean(path, modules)}"
            )
        return HeadModule(path, _names(network, path), "backbone.head names it")
    names = {
        name: f"the base lacks {name}" if name not in base else f"{name} is {shape} there, but {base[name]} in the base"
        for shapes in experts.values()
        for name, shape in shapes.items()
        if base.get(name) != shape and name not in shared and _is_parameter(network, name)
    }
    if not names:
        return None
    paths = _outermost(network, names)
    if len(paths) > 1:
        raise InputError(
            f"backbone.head: the experts' own tensors {shorten(names)} are in {len(paths)} modules of "
            f"{type(network).__name__}, {shorten(paths)}; expected one, whose input is the features. Take a base that "
            "has the others (save it once through the class that the experts have), or name the module that is each "
            "expert's own: backbone.head=MODULE."
        )
    return HeadModule(paths[0], _names(network, paths[0]), next(iter(names.values())))


def _is_parameter(network: nn.Module, name: str) -> bool:
    return name in dict(network.named_parameters(remove_duplicate=False))


def _names(network: nn.Module, path: str) -> tuple[str, ...]:
    return tuple(f"{path}.{name}" for name in network.get_submodule(path).state_dict())


def _outermost(network: nn.Module, names: Collection[str]) -> list[str]:
    """Return the largest modules all of whose parameters are among names."""
    whole = [
        path
        for path, module in network.named_modules()
        if path and (own := [f"{path}.{name}" for name, _ in module.named_parameters()]) and set(own) <= set(names)
    ]
    paths = [path for path in whole if not any(path.startswith(f"{container}.") for container in whole)]
    covered = {name for name in names if any(name.startswith(f"{path}.") for path in paths)}
    return [*paths, *(name for name in names if name not in covered)]


def head_of(
    head: HeadModule,
    tensors: Mapping[str, Tensor],
    source: str,
    network_of: Callable[[Any], nn.Module],
    config: Any,
) -> nn.Module:
    """Return an expert's head with its own values, in float32.

    Args:
        head: Which module it is.
        tensors: The expert's, by the network's names.
        source: The expert's file, for messages.
        network_of: Builds the network of a configuration, without weights.
        config: The base's, of which the number of classes is replaced by the expert's.

    Raises:
        InputError: If tensors are missing, or no number of classes gives their shapes.
    """
    missing = [name for name in head.names if name not in tensors]
    if missing:
        raise InputError(
            f"{source}: lacks {shorten(missing)} of the head {head.path}, each expert's own, as {head.reason}. "
            "Leave the expert out, or name another module: backbone.head=MODULE, or null for none."
        )
    values = {name.removeprefix(f"{head.path}."): tensors[name].float() for name in head.names}
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    for classes in sorted({shape[0] for shape in shapes.values() if shape} | {config.num_labels}):
        wanted = copy.deepcopy(config)
        wanted.num_labels = classes
        module = network_of(wanted).get_submodule(head.path)
        if {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()} == shapes:
            module.load_state_dict(values, assign=True)
            is_dense = any(len(shape) == 4 for shape in shapes.values())
            return (ClassesLast(module) if is_dense else module).eval().requires_grad_(False)
    raise InputError(
        f"{source}: the head {head.path} has the shapes {shapes}, which no number of classes gives. Was it made by the "
        "same class of transformers as the base's configuration names?"
    )
