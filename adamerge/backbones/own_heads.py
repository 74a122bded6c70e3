"""Heads of experts: modules of the network that each expert has its own values, and often classes, for."""

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adamerge.errors import InputError, did_you_mean, shorten

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class HeadModule:
    """A module that is not merged; or all modules that follow the network's body.

    Attributes:
        path: Its path in the network; of several modules their paths, to be shown.
        names: The names of its tensors there.
        reason: Why it is each expert's own.
        body: Path of the body that the modules follow; None for one module, which may be anywhere.
    """

    path: str
    names: tuple[str, ...]
    reason: str
    body: str | None = None

    def of(self, network: nn.Module) -> nn.Module:
        """Return the head of a whole network, which is used up, from features (B, ..., F) to logits."""
        return network.get_submodule(self.path) if self.body is None else Tail(network, self.body)

    def without(self, network: nn.Module) -> nn.Module:
        """Return the network without the head; it is changed."""
        if self.body is not None:
            return Body(network, self.body)
        network.set_submodule(self.path, nn.Identity())
        return network

    def name_of(self, tensor: str) -> str:
        """Return what a tensor of the head's state dict is called in the network."""
        own = tensor.removeprefix("head.")  # of ClassesLast
        return own.removeprefix("network.") if self.body is not None else f"{self.path}.{own}"


class Body(nn.Module):
    """The body of a network, under the network's names.

    Args:
        network: The whole network.
        path: Of the body in it.
    """

    def __init__(self, network: nn.Module, path: str) -> None:
        super().__init__()
        self._path = path
        body = network.get_submodule(path)
        if hasattr(body, "pooler"):
            body.pooler = None  # type: ignore[assignment]
        self.add_module(path, body)

    def forward(self, **inputs: Tensor) -> Any:
        """Return the body's result."""
        return self.get_submodule(self._path)(**inputs)


class Tail(nn.Module):
    """All that follows the body of a network of texts: the first position (B, F) of what that gives, to logits (B, C).

    Args:
        network: The whole network, whose body is taken out.
        path: Of the body in it.
    """

    def __init__(self, network: nn.Module, path: str) -> None:
        super().__init__()
        self.network = network
        self._path = path
        network.set_submodule(path, _Given(getattr(network.get_submodule(path), "pooler", None)))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, C)."""
        return self.of_positions(features.unsqueeze(1))

    def of_positions(self, hidden: Tensor) -> Tensor:
        """Return logits (B, C) of what the body gives, (B, S, F)."""
        given = self.network.get_submodule(self._path)
        given.hidden = hidden  # no parameter of the module
        try:
            logits: Tensor = self.network(torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)).logits
        finally:
            given.hidden = None  # type: ignore[assignment]
        return logits

    def reads_more_than_the_first(self, width: int) -> bool:
        """Whether logits depend on other positions, of features as wide as ``width``."""
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, 3, width, generator=generator)
        with torch.no_grad():
            return not torch.allclose(self.of_positions(hidden), self(hidden[:, 0]), rtol=1e-4, atol=1e-5)


class _Given(nn.Module):
    """Stands in for a body: gives what it was given."""

    def __init__(self, pooler: nn.Module | None) -> None:
        super().__init__()
        self.pooler = pooler
        self.hidden: Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        pooled = None if self.pooler is None else self.pooler(self.hidden)
        return BaseModelOutputWithPooling(last_hidden_state=self.hidden, pooler_output=pooled)


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
    if len(paths) > 1 and (tail := _tail(network, names)) is not None:
        return HeadModule(", ".join(paths), tail, next(iter(names.values())), str(network.base_model_prefix))
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


def _tail(network: Any, names: Collection[str]) -> tuple[str, ...] | None:
    """Return the tensors of all modules that follow the body, its pooler among them if it is the experts' own.

    None where names are others than these.
    """
    body, prefix = getattr(network, "base_model", network), f"{network.base_model_prefix}."
    pooler = getattr(body, "pooler", None)
    if body is network or not (pooler is None or type(pooler).__name__.endswith("Pooler")):
        return None  # what is no such class gets one position, or is followed by an activation
    names_of_pooler = f"{prefix}pooler."
    tensors = [name for name in network.state_dict() if not name.startswith(prefix) or name.startswith(names_of_pooler)]
    own = {name for name, _ in network.named_parameters() if name in tensors}
    return tuple(tensors) if own == set(names) else None


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
        InputError: If tensors are missing, no number of classes gives their shapes, or modules after the network's body
            read more than the first position.
    """
    missing = [name for name in head.names if name not in tensors]
    if missing:
        raise InputError(
            f"{source}: lacks {shorten(missing)} of the head {head.path}, each expert's own, as {head.reason}. "
            "Leave the expert out, or name another module: backbone.head=MODULE, or null for none."
        )
    values = {name: tensors[name].float() for name in head.names}
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    for classes in sorted({shape[0] for shape in shapes.values() if shape} | {config.num_labels}):
        wanted = copy.deepcopy(config)
        wanted.num_labels = classes
        module = head.of(network_of(wanted))
        names = {name: head.name_of(name) for name in module.state_dict()}
        if {names[name]: tuple(tensor.shape) for name, tensor in module.state_dict().items()} != shapes:
            continue
        module.load_state_dict({name: values[key] for name, key in names.items()}, assign=True)
        if isinstance(module, Tail) and module.reads_more_than_the_first(config.hidden_size):
            raise InputError(
                f"backbone.head: {head.path} of {type(module.network).__name__} read other positions than the first, "
                "so that they cannot be each expert's own. Take a base that has all but the last of them: save it once "
                "through the class that the experts have."
            )
        is_dense = any(len(shape) == 4 for shape in shapes.values())
        return (ClassesLast(module) if is_dense else module).eval().requires_grad_(False)
    raise InputError(
        f"{source}: the head {head.path} has the shapes {shapes}, which no number of classes gives. Was it made by the "
        "same class of transformers as the base's configuration names?"
    )
