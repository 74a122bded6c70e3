"""The contract of transforms, and their application with bounded memory.

Legend: E experts, n entries of a flattened parameter, ``*S`` its shape.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from adamerge.errors import InputError, check_call
from adamerge.system.finite import is_finite

TransformFunction = Callable[[str, Tensor], Tensor]
_TILE = 1 << 16  # entries of a tile, of all experts together


class Transform(Protocol):
    """Changes the task vectors of one parameter.

    Either this call, or ``prepare(source: Source)`` that returns such a function. A class may set ``elementwise``
    to true where every entry of the result depends only on the E entries at its own position (and on statistics
    from ``prepare``): its rule is then given tiles (E, k) of flattened parameters, so that memory stays bounded.
    """

    def __call__(self, name: str, task_vectors: Tensor, /) -> Tensor:
        """Return the transformed task vectors of parameter ``name``, (E, *S) to (E, *S); may overwrite its input."""
        ...


class Source(Protocol):
    """Raw task vectors to take statistics of, such as an :class:`~adamerge.ExpertPool`; never to be changed."""

    expert_names: tuple[str, ...]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of the parameters by name."""
        ...

    def task_vectors(self, name: str) -> Tensor:
        """Return one parameter's task vectors, (E, *S)."""
        ...

    def tiles(self) -> Iterator[tuple[str, Tensor]]:
        """Pass over all task vectors once, in small tiles: name and (E, k), each valid until the next."""
        ...


class Prepared:
    """A transform with its statistics taken, ready to be applied parameter by parameter.

    Args:
        transform: A :class:`Transform`, or an object with ``prepare``.
        source: The task vectors that it takes statistics of.

    Raises:
        InputError: If the transform has not the right call, or does not fit the source.
    """

    def __init__(self, transform: Any, source: Source) -> None:
        check_transform(transform)
        self.name = type(transform).__name__
        self.elementwise = bool(getattr(transform, "elementwise", False))
        self._rule: TransformFunction = transform.prepare(source) if hasattr(transform, "prepare") else transform

    def __call__(self, name: str, task_vectors: Tensor) -> Tensor:
        """Return the transformed task vectors, (E, *S) to (E, *S), or tiles (E, k) of them where ``elementwise``.

        The input may be overwritten. Memory besides it: one tile where ``elementwise``, else one stack.

        Raises:
            InputError: If the result has another shape, or is not finite.
        """
        if not self.elementwise or not task_vectors.numel():
            return self._checked(name, task_vectors)
        flat = task_vectors.reshape(len(task_vectors), -1)
        width = max(1, _TILE // len(flat))
        for tile in flat.split(width, dim=1):
            tile.copy_(self._checked(name, tile))
        return flat.view(task_vectors.shape)

    def _checked(self, name: str, task_vectors: Tensor) -> Tensor:
        shape = tuple(task_vectors.shape)
        result = self._rule(name, task_vectors)
        finite = is_finite(result)
        if tuple(result.shape) != shape or not finite:
            raise InputError(
                f"transform {self.name}: parameter {name!r}: expected finite task vectors of shape {shape}, "
                f"found shape {tuple(result.shape)}{'' if finite else ' with NaN'}."
            )
        return result


class Stacks:
    """Task vectors in memory as a :class:`Source`."""

    def __init__(self, task_vectors: Mapping[str, Tensor], expert_names: Sequence[str]) -> None:
        self.expert_names = tuple(expert_names)
        self.shapes = {name: tuple(stack.shape[1:]) for name, stack in task_vectors.items()}
        self._stacks = task_vectors

    def task_vectors(self, name: str) -> Tensor:
        """Return one parameter's task vectors, (E, *S)."""
        return self._stacks[name]

    def tiles(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter as one tile (E, n)."""
        for name, stack in self._stacks.items():
            yield name, stack.reshape(len(stack), -1)


def apply(
    transform: Any, task_vectors: Mapping[str, Tensor], expert_names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Transform task vectors in memory; nothing passed in is modified.

    Args:
        transform: Any transform.
        task_vectors: Parameter name to task vectors, (E, *S).
        expert_names: Length E; default ``expert0`` and so on.

    Returns:
        Same names and shapes.

    Raises:
        InputError: If the transform does not fit.

    >>> from adamerge.transforms import Trim
    >>> apply(Trim(0.5), {"w": torch.tensor([[1.0, -3.0]])})
    {'w': tensor([[ 0., -3.]])}
    """
    count = len(next(iter(task_vectors.values()), torch.empty(0)))
    prepared = Prepared(transform, Stacks(task_vectors, expert_names or [f"expert{i}" for i in range(count)]))
    return {name: prepared(name, stack.clone()) for name, stack in task_vectors.items()}


def check_transform(transform: Any) -> None:
    """Check that a transform can be applied, without calling it.

    Raises:
        InputError: If it can not.
    """
    if hasattr(transform, "prepare"):
        return
    if not callable(transform) or isinstance(transform, type):
        raise InputError(f"transform: expected a callable (name, task_vectors), found {transform!r}.")
    check_call("transform", transform, ["name", "task_vectors"], "Change the transform's signature.")


def entries(source: Source) -> int:
    """Return the number of entries of one expert's whole task vector."""
    return sum(torch.Size(shape).numel() for shape in source.shapes.values())


def total(task_vectors: Tensor) -> Tensor:
    """Sum over the experts, (E, k) to (k,), always in their order: tiles and stacks give the same bits."""
    result = task_vectors[0].clone()
    for row in task_vectors[1:]:
        result += row
    return result


def per_expert(values: Tensor, like: Tensor) -> Tensor:
    """Return values (E,) shaped to scale ``like``, (E, *S), and in its dtype."""
    return values.to(like).view(-1, *[1] * (like.ndim - 1))
