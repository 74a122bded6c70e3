"""Batches, and a model's outputs for them: plain values that streams, backbones and the engine share."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class TaskBatch(NamedTuple):
    """One task's unlabeled batch: inputs (B, ...) and positions in the task's stream (B,)."""

    inputs: Tensor
    indices: Tensor


@dataclass
class Outputs:
    """A model's outputs for a batch: logits (B, C), features (B, F), hidden name to (B, ...)."""

    logits: Tensor
    features: Tensor
    hidden: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Outputs":
        """Return the batch on another device."""
        hidden = {name: value.to(device) for name, value in self.hidden.items()}
        return Outputs(self.logits.to(device), self.features.to(device), hidden)

    def __getitem__(self, rows: slice | Tensor) -> "Outputs":
        """Return the outputs for some samples of the batch."""
        hidden = {name: value[rows] for name, value in self.hidden.items()}
        return Outputs(self.logits[rows], self.features[rows], hidden)
