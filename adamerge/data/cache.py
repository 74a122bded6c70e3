"""Decoded and preprocessed inputs in memory: of which streams, and how many.

Inputs are kept bit by bit, so that a batch is the same with and without the cache: a 224 x 224 image takes 0.6 MB.
"""

import logging
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adamerge.data.datasets import Unlabeled
from adamerge.errors import InputError
from adamerge.system.memory import free_memory

log = logging.getLogger(__name__)

Cache = Literal["auto", "ram", "off"]
CACHES = ("auto", "ram", "off")
_SHARE = 0.25  # of the free memory that `auto` may fill
_SHARED_MEMORY = "/dev/shm"  # where torch puts tensors that processes share


class InputCache:
    """Inputs by position, decoded once by whichever process needs them first.

    Args:
        positions: Those that are kept.
        example: An input (*S); inputs of another shape or dtype are not kept.
        shared: Whether processes that load data shall see one another's inputs.
    """

    def __init__(self, positions: Sequence[int], example: Tensor, shared: bool) -> None:
        shape = torch.Size((len(positions), *example.shape))
        if shared:  # not share_memory_(), which would fill the memory by copying
            storage = torch.UntypedStorage._new_shared(max(1, shape.numel() * example.element_size()))
            strides = torch.empty(shape, device="meta").stride()
            self._rows = torch.empty(0, dtype=example.dtype).set_(storage, 0, shape, strides)
        else:
            self._rows = torch.empty(shape, dtype=example.dtype)
        self._filled = torch.zeros(len(positions), dtype=torch.bool)
        if shared:
            self._filled.share_memory_()
        self._row_of = {position: row for row, position in enumerate(positions)}

    def get(self, position: int) -> Tensor | None:
        """Return the input, or None where it is not kept."""
        row = self._row_of.get(position)
        return self._rows[row].clone() if row is not None and self._filled[row] else None

    def put(self, position: int, inputs: Tensor) -> None:
        """Keep an input, if it can be kept."""
        row = self._row_of.get(position)
        if row is not None and (inputs.shape, inputs.dtype) == (self._rows.shape[1:], self._rows.dtype):
            self._rows[row] = inputs
            self._filled[row] = True  # last: whoever sees it finds the whole input


class Nature(NamedTuple):
    """How a stream's inputs come about: at random, from memory, or neither."""

    random: bool
    in_memory: bool
    example: Tensor


def nature_of(stream: Unlabeled) -> Nature:
    """Load the first readable input twice: does it differ or draw random numbers, and is it a view of a tensor?"""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        index, first = stream.readable.first(0, stream.load)
        second = stream.load(index)
        drawn = random.getstate() != states[0] or not torch.equal(torch.get_rng_state(), states[2])
        drawn = drawn or not all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[1], strict=True))
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
    same = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    return Nature(drawn or not torch.equal(first, second), same, first)


def keep_inputs(
    streams: Mapping[str, tuple[Unlabeled, Sequence[int]]],
    natures: Mapping[str, Nature],
    mode: Cache,
    *,
    workers: int,
    processes: int = 1,
) -> None:
    """Give streams a cache, where it gains and fits.

    Args:
        streams: Name to a stream and the positions of its inputs that a run visits.
        natures: Of the same streams.
        mode: ``auto``: what draws random numbers is left out, and a quarter of the free memory is the limit, beyond
            which a part of each stream is kept; ``ram``: everything is kept, or refused; ``off``: nothing.
        workers: Processes that load data, which share what they have decoded.
        processes: Trainers on this machine, each with a cache of its own.

    Raises:
        InputError: If ``ram`` cannot keep the inputs.
    """
    if mode == "off":
        return
    wanted = {name: entry for name, entry in streams.items() if not natures[name].in_memory}
    drawn = [name for name in wanted if natures[name].random]
    if drawn and mode == "ram":
        raise InputError(
            f"data.cache: 'ram' would freeze the images of task {drawn[0]!r}, whose transform draws random numbers. "
            "Set data.cache=auto, which leaves such tasks out, or take the random transform away."
        )
    if drawn:
        log.info("data.cache: not kept, because their transforms draw random numbers: %s.", ", ".join(drawn))
    kept = [name for name in wanted if not natures[name].random and wanted[name][0].cache is None]
    needed = sum(len(wanted[name][1]) * natures[name].example.nbytes for name in kept)
    if needed:
        share = min(1.0, _limit(mode, needed, workers) / processes / needed)
        for name in kept:
            stream, visited = wanted[name]
            chosen = visited[: int(share * len(visited))]
            stream.cache = InputCache(chosen, natures[name].example, shared=workers > 0)
        level = logging.DEBUG if share == 1 else logging.INFO
        log.log(level, "data.cache: %.0f %% of the images are decoded once and kept.", 100 * share)


def _limit(mode: Cache, needed: int, workers: int) -> float:
    """Return the bytes that may be kept; what ``ram`` needs must be there."""
    shared = float("inf")
    if workers and os.path.isdir(_SHARED_MEMORY):
        shared = 0.5 * shutil.disk_usage(_SHARED_MEMORY).free
    if mode == "auto":
        return min(_SHARE * free_memory(), shared)
    for available, kind in ((free_memory(), "free memory"), (shared, f"shared memory ({_SHARED_MEMORY})")):
        if needed > available:
            raise InputError(
                f"data.cache: 'ram' needs {needed / 1e9:.1f} GB of {kind}, and {available / 1e9:.1f} GB are there. Set "
                "data.cache=auto, which keeps what fits, data.limit for fewer images, or data.num_workers=0, which "
                "shares nothing."
            )
    return float("inf")
