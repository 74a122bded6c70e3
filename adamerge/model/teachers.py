"""A cache of the experts' outputs, so that the experts need not stay in memory."""

from collections.abc import Mapping

import torch
from torch import Tensor

from adamerge.data.batch import Outputs

_HIDDEN = "hidden/"


def tensors_of(outputs: Outputs) -> dict[str, Tensor]:
    """Return outputs as tensors (B, ...) by name."""
    hidden = {f"{_HIDDEN}{name}": value for name, value in outputs.hidden.items()}
    return {"logits": outputs.logits, "features": outputs.features, **hidden}


def outputs_of(tensors: Mapping[str, Tensor]) -> Outputs:
    """Return what :func:`tensors_of` made tensors of."""
    hidden = {name.removeprefix(_HIDDEN): value for name, value in tensors.items() if name.startswith(_HIDDEN)}
    return Outputs(tensors["logits"], tensors["features"], hidden)


class TeacherCache:
    """The experts' outputs by task and sample index.

    Rows live in tensors that grow by doubling, on the device of the outputs. Memory: per sample that was put the
    logits, the features, and whatever hidden layers the objective asks for; per position in the stream a number.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything: positions mean other samples in another data set."""
        self._rows: dict[str, dict[str, Tensor]] = {}
        self._row_of: dict[str, Tensor] = {}  # position to row, -1 where there is none
        self._counts: dict[str, int] = {}

    def get(self, task: str, indices: Tensor) -> Outputs | None:
        """Return the outputs at ``indices`` (B,), or None if any of them is missing."""
        row_of, positions = self._row_of.get(task), indices.cpu()
        if row_of is None or int(positions.max()) >= len(row_of) or bool((row_of[positions] < 0).any()):
            return None
        at = row_of[positions]
        return outputs_of({name: rows[at.to(rows.device)] for name, rows in self._rows[task].items()})

    def put(self, task: str, indices: Tensor, outputs: Outputs) -> None:
        """Store outputs (B, ...) at ``indices`` (B,)."""
        positions, tensors = indices.cpu(), tensors_of(outputs)
        if self._rows.get(task, tensors).keys() != tensors.keys():
            del self._rows[task], self._row_of[task], self._counts[task]  # another objective wants other layers
        row_of = _grown(self._row_of.get(task, torch.zeros(0, dtype=torch.long)), int(positions.max()) + 1, -1)
        new, count = positions[row_of[positions] < 0].unique(), self._counts.get(task, 0)
        row_of[new] = torch.arange(count, count + len(new))
        self._row_of[task], self._counts[task] = row_of, count + len(new)
        stored = self._rows.setdefault(task, {})
        for name, value in tensors.items():
            rows = _grown(stored.get(name, value.new_zeros(0, *value.shape[1:])), self._counts[task])
            rows[row_of[positions].to(rows.device)] = value.detach()
            stored[name] = rows


def _grown(rows: Tensor, size: int, fill: int = 0) -> Tensor:
    """Return rows with room for ``size``, at least doubled where there was less."""
    if len(rows) >= size:
        return rows
    grown = rows.new_full((max(size, 2 * len(rows)), *rows.shape[1:]), fill)
    grown[: len(rows)] = rows
    return grown
