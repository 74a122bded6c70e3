"""A cache of the experts' outputs, so that the experts need not stay in memory."""

import torch
from torch import Tensor

from adamerge.data.batch import Outputs


class TeacherCache:
    """The experts' outputs by task and sample index.

    Rows live in tensors that grow by doubling, on the device of the outputs. Memory: per sample that was put the
    logits, the features, and whatever hidden layers the objective asks for; per position in the stream a number.
    """

    def __init__(self) -> None:
        self._rows: dict[str, Outputs] = {}
        self._row_of: dict[str, Tensor] = {}  # position to row, -1 where there is none
        self._counts: dict[str, int] = {}

    def clear(self) -> None:
        """Forget everything: positions mean other samples in another data set."""
        self._rows, self._row_of, self._counts = {}, {}, {}

    def get(self, task: str, indices: Tensor) -> Outputs | None:
        """Return the outputs at ``indices`` (B,), or None if any of them is missing."""
        row_of, positions = self._row_of.get(task), indices.cpu()
        if row_of is None or int(positions.max()) >= len(row_of) or bool((row_of[positions] < 0).any()):
            return None
        rows = self._rows[task]
        return rows[row_of[positions].to(rows.logits.device)]

    def put(self, task: str, indices: Tensor, outputs: Outputs) -> None:
        """Store outputs (B, ...) at ``indices`` (B,)."""
        positions = indices.cpu()
        if task in self._rows and set(self._rows[task].hidden) != set(outputs.hidden):
            del self._rows[task], self._row_of[task], self._counts[task]  # another objective wants other layers
        row_of = _grown(self._row_of.get(task, torch.zeros(0, dtype=torch.long)), int(positions.max()) + 1, -1)
        new, count = positions[row_of[positions] < 0].unique(), self._counts.get(task, 0)
        row_of[new] = torch.arange(count, count + len(new))
        self._row_of[task], self._counts[task] = row_of, count + len(new)
        rows, size = self._rows.get(task, _empty(outputs)), count + len(new)
        kept = Outputs(
            _grown(rows.logits, size),
            _grown(rows.features, size),
            {name: _grown(value, size) for name, value in rows.hidden.items()},
        )
        at = row_of[positions].to(kept.logits.device)
        kept.logits[at] = outputs.logits.detach()
        kept.features[at] = outputs.features.detach()
        for name, value in kept.hidden.items():
            value[at] = outputs.hidden[name].detach()
        self._rows[task] = kept


def _empty(outputs: Outputs) -> Outputs:
    hidden = {name: value.new_zeros(0, *value.shape[1:]) for name, value in outputs.hidden.items()}
    logits, features = (value.new_zeros(0, *value.shape[1:]) for value in (outputs.logits, outputs.features))
    return Outputs(logits, features, hidden)


def _grown(rows: Tensor, size: int, fill: int = 0) -> Tensor:
    """Return rows with room for ``size``, at least doubled where there was less."""
    if len(rows) >= size:
        return rows
    grown = rows.new_full((max(size, 2 * len(rows)), *rows.shape[1:]), fill)
    grown[: len(rows)] = rows
    return grown
