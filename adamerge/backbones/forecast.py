"""How large a network becomes that a file describes, before it is built."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from adamerge.errors import InputError
from adamerge.system.memory import free_memory

MAX_PARTS = 30_000  # parameters, buffers and modules of a network


@contextmanager
def forecast(where: str, parts: int = MAX_PARTS, *, weights: bool = True) -> Iterator[None]:
    """Build a network in a block without memory, on the device ``meta``, and refuse it as soon as it is too large.

    Args:
        where: What describes the network, for the message.
        parts: How many parameters, buffers and modules it may have at most.
        weights: Whether its parameters are to fit into the memory that is free; else its buffers alone are.

    Raises:
        InputError: If it has more, or would not fit.
    """
    with bounded(where, parts, free_memory(), weights=weights), torch.device("meta"):
        yield


@contextmanager
def bounded(where: str, parts: int = MAX_PARTS, free: float = math.inf, *, weights: bool = True) -> Iterator[None]:
    """Refuse the networks of a block as soon as they are too large.

    Args:
        where: What describes them, for the message.
        parts: How many parameters, buffers and modules they may have at most.
        free: How many bytes their parameters and buffers may take.
        weights: Whether parameters count among these bytes.

    Raises:
        InputError: If they have more.
    """
    count, size = 0, 0

    def add(_: nn.Module, name: str, part: nn.Module | Tensor | None) -> None:
        nonlocal count, size
        count += 1
        if isinstance(part, Tensor) and (weights or not isinstance(part, nn.Parameter)):
            size += part.numel() * part.itemsize
        if count > parts:
            raise InputError(f"{where}: describes a network of more than {parts} parts. Is it the right file?")
        if size > free:
            raise InputError(
                f"{where}: describes a network of more than {size / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free. Is "
                "it the right file?"
            )

    hooks = [
        register_module_parameter_registration_hook(add),
        register_module_buffer_registration_hook(add),
        register_module_module_registration_hook(add),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
