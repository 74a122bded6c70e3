"""Counting what processes exchange, at the dispatcher that every collective of torch goes through."""

from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Where the larger side of each collective's tensors is: what is gathered, what is reduced.
_LARGER = {
    "allreduce_": 0,
    "broadcast_": 0,
    "allgather_": 0,
    "_allgather_base_": 0,
    "reduce_scatter_": 1,
    "_reduce_scatter_base_": 1,
}


class Traffic(TorchDispatchMode):
    """Counts the collectives that this process takes part in while the mode is on.

    Attributes:
        bytes: Of the gathered, reduced or broadcast tensors, by the collective's name in torch.
        calls: Number of calls, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1]
            if name not in ("barrier", "monitored_barrier_"):
                self.calls[name] += 1
                self.bytes[name] += sum(tensor.nbytes for tensor in _tensors(args[_LARGER[name]]))
        return func(*args, **(kwargs or {}))


def wire_bytes(traffic: Traffic, world: int) -> float:
    """Bytes that each process sends in ring algorithms: those of a reduction twice, all but its own share."""
    share = (world - 1) / world
    return sum(size * share * (2 if name == "allreduce_" else 1) for name, size in traffic.bytes.items())


def _tensors(argument: object) -> list[Tensor]:
    if isinstance(argument, torch.Tensor):
        return [argument]
    return [tensor for part in argument for tensor in _tensors(part)]
