"""The processes that share a run, and how they agree.

Outside of a process group there is one rank, and every function here gives back what it was given. Importing this
module does not import torch, which takes seconds: a process that has not, has joined no group.
"""

import sys
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")


def rank() -> int:
    """Return this process's number; the first, 0, is the one that writes."""
    group = _group()
    return group.get_rank() if group else 0


def count() -> int:
    """Return how many processes share the run."""
    group = _group()
    return group.get_world_size() if group else 1


def is_first() -> bool:
    """Whether this process writes files and talks to the user."""
    return rank() == 0


def total(values: "Tensor") -> "Tensor":
    """Return the sum over all ranks, the same bits on each; all must call, with one shape."""
    if count() == 1:
        return values
    values = values.detach().clone()
    _group().all_reduce(values)
    return values


def everyones(value: T) -> list[T]:
    """Return every rank's value, in the ranks' order; for small values."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    _group().all_gather_object(values, value)
    return values


def of_first(value: T) -> T:
    """Return the first rank's value."""
    if count() == 1:
        return value
    values = [value]
    _group().broadcast_object_list(values, src=0)
    return values[0]


def largest(number: int, device: "torch.device | str" = "cpu") -> int:
    """Return the largest of the ranks' numbers."""
    if count() == 1:
        return number
    import torch

    result = torch.tensor(number, device=device)
    _group().all_reduce(result, _group().ReduceOp.MAX)
    return int(result)


def is_lost(error: Exception) -> bool:
    """Whether an error says that another of the processes has ended, so that they can no longer agree."""
    return count() > 1 and any(words in str(error) for words in _LOST)


def wait() -> None:
    """Go on when all ranks have come here."""
    if count() > 1:
        _group().barrier()


def _group() -> Any:
    """Return ``torch.distributed`` if this process has joined a group, else None."""
    distributed = sys.modules.get("torch.distributed")
    is_joined = getattr(distributed, "is_initialized", None)  # absent while a signal interrupts torch's import
    return distributed if is_joined is not None and is_joined() else None
