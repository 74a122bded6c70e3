"""Batches of texts of similar length."""

from collections.abc import Mapping

import torch
from torch import Tensor

from adamerge.data.batch import Inputs
from adamerge.data.datasets import Unlabeled, length_of
from adamerge.errors import InputError

BATCHES = 16  # that are sorted together: among more, each batch would be too much like the one before


def lengths_of(streams: Mapping[str, Unlabeled]) -> dict[str, Tensor]:
    """Return the tokens of each input of each stream, of encoder and decoder together, (N,) by task.

    Every text is read and tokenized once for it.

    Raises:
        InputError: If inputs are no tokens.
    """
    return {
        task: torch.tensor([_length(stream[i].inputs, task) for i in range(length_of(stream.source))])
        for task, stream in streams.items()
    }


def grouped(order: Tensor, lengths: Tensor, batch_size: int) -> Tensor:
    """Return an order (N,) in which every so many batches are sorted, long texts first.

    >>> grouped(torch.tensor([2, 0, 1]), torch.tensor([5, 9, 7]), batch_size=1)
    tensor([1, 2, 0])
    """
    return torch.cat([p[lengths[p].argsort(descending=True, stable=True)] for p in order.split(BATCHES * batch_size)])


def _length(inputs: Inputs, task: str) -> int:
    if isinstance(inputs, Mapping) and "input_ids" in inputs:
        return sum(len(inputs[name]) for name in ("input_ids", "decoder_input_ids") if name in inputs)
    raise InputError(
        f"data.group_by_length: data.tasks.{task}: expected texts, found {type(inputs).__name__}. Set false."
    )
