"""Which streams keep decoded and preprocessed inputs in memory, and how many.

Inputs are kept bit by bit, so that a batch is the same with and without the cache: a 224 x 224 image takes 0.6 MB.
Mappings, whose lengths may differ, are kept where one process loads the data.
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

from adamerge.data.batch import Inputs
from adamerge.data.datasets import InputCache, MappingCache, Unlabeled
from adamerge.data.random_states import seeded
from adamerge.errors import InputError
from adamerge.system.memory import free_memory

log = logging.getLogger(__name__)

Cache = Literal["auto", "ram", "off"]
CACHES = ("auto", "ram", "off")
_SHARE = 0.25  # of the free memory that `auto` may fill
_SHARED_MEMORY = "/dev/shm"  # where torch puts tensors that processes share


class Nature(NamedTuple):
    """How a stream's inputs come about: at random, from memory, or neither."""

    random: bool
    in_memory: bool
    example: Inputs

    @property
    def nbytes(self) -> int:
        """Bytes of the example."""
        return sum(tensor.nbytes for tensor in _tensors(self.example).values())


class Visits(NamedTuple):
    """A stream, the positions of its inputs that a run visits, and how these come about."""

    name: str
    stream: Unlabeled
    positions: Sequence[int]
    nature: Nature


def nature_of(stream: Unlabeled) -> Nature:
    """Load the first readable input twice: does it differ or draw random numbers, and is it a view of a tensor?"""
    with seeded("nature"):
        undisturbed = _next_numbers()
    with seeded("nature"):
        index, first = stream.readable.first(0, stream.load)
        second = stream.load(index)
        drawn = _next_numbers() != undisturbed
    ones, others = _tensors(first), _tensors(second)
    pairs = [(tensor, others[key]) for key, tensor in ones.items() if key in others]
    same = all(one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr() for one, two in pairs)
    equal = len(pairs) == len(ones) == len(others) and all(torch.equal(one, two) for one, two in pairs)
    return Nature(drawn or not equal, same, first)


def _tensors(inputs: Inputs) -> Mapping[str, Tensor]:
    return {"": inputs} if isinstance(inputs, Tensor) else inputs


def _next_numbers() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), float(torch.rand((), dtype=torch.float64))


def keep_inputs(visits: Sequence[Visits], mode: Cache, workers: int, processes: int) -> None:
    """Give streams a cache, where it gains and fits.

    Args:
        visits: What a run visits.
        mode: ``auto``: what fits into a share of the free memory is kept; ``ram``: everything is kept, or refused;
            ``off``: nothing.
        workers: Processes that load data, which share what they have decoded.
        processes: Trainers on this machine, each with a cache of its own.

    Raises:
        InputError: If ``ram`` cannot keep the inputs.
    """
    if mode == "off":
        return
    wanted = [visit for visit in visits if not visit.nature.in_memory]
    drawn = [visit.name for visit in wanted if visit.nature.random]
    if drawn and mode == "ram":
        raise InputError(
            f"data.cache: 'ram' would freeze the inputs of task {drawn[0]!r}, whose transform draws random numbers. "
            "Set data.cache=auto, which leaves such tasks out, or take the random transform away."
        )
    if drawn:
        log.info("data.cache: not kept, because their transforms draw random numbers: %s.", ", ".join(drawn))
    kept = [visit for visit in wanted if not visit.nature.random and visit.stream.cache is None]
    if workers:
        kept = [visit for visit in kept if isinstance(visit.nature.example, Tensor)]
    needed = sum(len(visit.positions) * visit.nature.nbytes for visit in kept)
    if needed:
        share = min(1.0, _limit(mode, needed, workers) / processes / needed)
        for visit in kept:
            chosen = visit.positions[: int(share * len(visit.positions))]
            example = visit.nature.example
            if isinstance(example, Tensor):
                visit.stream.cache = InputCache(chosen, example, workers > 0)
            else:
                visit.stream.cache = MappingCache(chosen)
        level = logging.DEBUG if share == 1 else logging.INFO
        log.log(level, "data.cache: %.0f %% of the inputs are made once and kept.", 100 * share)


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
                "data.cache=auto, which keeps what fits, data.limit for fewer inputs, or data.num_workers=0, which "
                "shares nothing."
            )
    return float("inf")
