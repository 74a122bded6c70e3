"""What processes that hold parts of a model agree on: the tasks of a step, and a sample where one lacks a batch."""

from collections.abc import Mapping
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from adamerge.data.batch import Inputs
from adamerge.errors import InputError
from adamerge.model.encoder import BatchFacts, facts_of
from adamerge.system import ranks


class SharedBatch(NamedTuple):
    """What processes tell one another of a batch: its facts, and one sample of it.

    Of the sample, whole numbers (token ids and masks, which must go together) have their values; other tensors are told
    of as shape and dtype.
    """

    facts: BatchFacts
    sample: Mapping[str, Tensor | tuple[tuple[int, ...], torch.dtype]]
    is_mapping: bool

    def stand_in(self, device: torch.device) -> Inputs:
        """Return one sample that stands in for a batch: zeros, but for the whole numbers of a mapping."""
        tensors = {
            key: value.to(device)
            if isinstance(value, Tensor)
            else torch.zeros(1, *value[0], dtype=value[1], device=device)
            for key, value in self.sample.items()
        }
        return tensors if self.is_mapping else tensors[""]


def _shared(inputs: Inputs, width: int) -> SharedBatch:
    is_mapping = not isinstance(inputs, Tensor)
    tensors = {"": inputs} if isinstance(inputs, Tensor) else inputs
    sample = {
        key: tensor[:1].cpu()
        if is_mapping and not tensor.is_floating_point()
        else (tuple(tensor.shape[1:]), tensor.dtype)
        for key, tensor in tensors.items()
    }
    return SharedBatch(facts_of(inputs, width), sample, is_mapping)


def agreed(inputs: Mapping[str, Inputs], width: int) -> dict[str, SharedBatch]:
    """Return every process's tasks, in the same order on each, with the facts of their batches on all processes.

    Tasks are of one kind where they are on every process; a process that lacks a task has another's sample of it.
    """
    by_rank = ranks.everyones({task: _shared(batch, width) for task, batch in inputs.items()})
    shared: dict[str, SharedBatch] = {}
    for task in dict.fromkeys(chain.from_iterable(by_rank)):
        first = next(part[task] for part in by_rank if task in part)
        batches = [part.get(task, first) for part in by_rank]
        for batch in batches:
            if not _alike(first, batch):
                raise InputError(
                    f"Task {task!r}: a sharded model needs inputs of one shape and dtype on all devices, found "
                    f"{first.facts.kind} and {batch.facts.kind}. Give inputs of one shape."
                )
        kinds = tuple(batch.facts.kind for batch in batches)
        sizes, entries = zip(*((batch.facts.size, batch.facts.entries) for batch in batches), strict=True)
        shared[task] = first._replace(facts=BatchFacts(kinds, max(sizes), max(entries)))
    return shared


def _alike(one: SharedBatch, two: SharedBatch) -> bool:
    """Whether two processes' batches are of one shape; those of mappings may differ in length, as texts do."""
    if one.is_mapping and two.is_mapping:
        return one.sample.keys() == two.sample.keys()
    return one.facts.kind == two.facts.kind
