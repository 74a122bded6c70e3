"""Batches of texts of similar length."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adamerge.data.datasets import Unlabeled, length_of, split_item
from adamerge.data.texts import Text
from adamerge.errors import InputError

BATCHES = 16  # that are sorted together: among more, each batch would be too much like the one before


def lengths_of(streams: Mapping[str, Unlabeled]) -> dict[str, Tensor]:
    """Return how long each text of each stream is, (N,) by task: in characters, or the tokens of inputs themselves.

    Raises:
        InputError: If items are no texts.
    """
    return {
        task: torch.tensor([_length(split_item(stream.source[i])[0], task) for i in range(length_of(stream.source))])
        for task, stream in streams.items()
    }


def grouped(order: Tensor, lengths: Tensor, batch_size: int) -> Tensor:
    """Return an order (N,) in which every so many batches are sorted, long texts first.

    >>> grouped(torch.tensor([2, 0, 1]), torch.tensor([5, 9, 7]), batch_size=1)
    tensor([1, 2, 0])
    """
    return torch.cat([p[lengths[p].argsort(descending=True, stable=True)] for p in order.split(BATCHES * batch_size)])


def _length(item: Any, task: str) -> int:
    if isinstance(item, Text):
        prompt: Any = item.prompt
        said = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        return sum(map(len, said)) + len(item.answer or "")
    if isinstance(item, str):
        return len(item)
    if isinstance(item, Mapping) and isinstance(ids := item.get("input_ids"), Tensor):
        return len(ids)
    raise InputError(
        f"data.group_by_length: data.tasks.{task}: expected texts, found {type(item).__name__}. Set false."
    )
