"""Cached outputs of the experts, so that they need not stay in memory."""

from collections.abc import Mapping

import torch
from torch import Tensor


class TeacherCache:
    """Teacher outputs by task and sample index.

    Rows live in tensors that grow by doubling, on the device of the outputs. Memory: per sample the
    logits, the features, and whatever hidden layers the objective asks for.
    """

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, Tensor]] = {}
        self._filled: dict[str, Tensor] = {}

    def get(self, task: str, indices: Tensor) -> dict[str, Tensor] | None:
        """Return outputs by name, (B, ...), or None if any of ``indices`` (B,) is missing."""
        filled = self._filled.get(task)
        positions = indices.cpu()
        if filled is None or int(positions.max()) >= len(filled) or not bool(filled[positions].all()):
            return None
        return {name: rows[indices.to(rows.device)] for name, rows in self._rows[task].items()}

    def put(self, task: str, indices: Tensor, outputs: Mapping[str, Tensor]) -> None:
        """Store outputs (B, ...) at ``indices`` (B,)."""
        positions = indices.cpu()
        filled = self._filled.get(task, torch.zeros(0, dtype=torch.bool))
        size = max(len(filled), 1)
        while size <= int(positions.max()):
            size *= 2
        self._filled[task] = _grown(filled, size)
        self._filled[task][positions] = True
        rows = self._rows.setdefault(task, {})
        for name, values in outputs.items():
            kept = _grown(rows.get(name, values.new_zeros(0, *values.shape[1:])), size)
            kept[indices.to(kept.device)] = values.detach()
            rows[name] = kept


def _grown(rows: Tensor, size: int) -> Tensor:
    if len(rows) == size:
        return rows
    grown = rows.new_zeros(size, *rows.shape[1:])
    grown[: len(rows)] = rows
    return grown
