"""The processes that share a run, and how they agree.

Outside of a process group there is one rank, and every function here gives back what it was given.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


def rank() -> int:
    """Return this process's number; the first, 0, is the one that writes."""
    return distributed.get_rank() if _is_joined() else 0


def count() -> int:
    """Return how many processes share the run."""
    return distributed.get_world_size() if _is_joined() else 1


def is_first() -> bool:
    """Whether this process writes files and talks to the user."""
    return rank() == 0


def total(values: Tensor) -> Tensor:
    """Return the sum over all ranks, the same bits on each; all must call, with one shape."""
    if count() == 1:
        return values
    values = values.detach().clone()
    distributed.all_reduce(values)
    return values


def everyones(value: T) -> list[T]:
    """Return what each rank has, in their order; for small things."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    distributed.all_gather_object(found, value)
    return found


def of_first(value: T) -> T:
    """Return what the first rank has."""
    if count() == 1:
        return value
    found = [value]
    distributed.broadcast_object_list(found, src=0)
    return found[0]


def largest(number: int, device: torch.device | str = "cpu") -> int:
    """Return the largest of the ranks' numbers."""
    if count() == 1:
        return number
    found = torch.tensor(number, device=device)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return int(found)


def wait() -> None:
    """Go on when all ranks have come here."""
    if count() > 1:
        distributed.barrier()


def _is_joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()
