"""A cache of the experts' outputs, so that the experts need not stay in memory."""

from collections.abc import Mapping

import torch
from torch import Tensor

from adamerge.data.batch import HIDDEN, Outputs
from adamerge.errors import check_choice, check_number
from adamerge.model.answers import shorten_answers

_LENGTHS = "rows of "  # begins the name of the tensor that says how many rows each sample has


def tensors_of(outputs: Outputs) -> dict[str, Tensor]:
    """Return what is kept of outputs, as tensors by name: compact, so that padding takes no room.

    A tensor has a row for each sample, (B, ...), or several, (N, ...); then another tensor (B,) says how many.
    """
    tensors = {}
    for name, (rows, lengths) in outputs.ragged().items():
        tensors[name] = rows
        if lengths is not None:
            tensors[f"{_LENGTHS}{name}"] = lengths
    return tensors


_CLASSES = "classes"


def outputs_of(tensors: Mapping[str, Tensor]) -> Outputs:
    """Return the compact outputs that :func:`tensors_of` made tensors of."""
    tensors = {name: _single(tensor) for name, tensor in tensors.items()}
    hidden = {name.removeprefix(HIDDEN): value for name, value in tensors.items() if name.startswith(HIDDEN)}
    return Outputs(tensors["logits"], tensors.get("features"), hidden, classes=tensors.get(_CLASSES))


def _single(tensor: Tensor) -> Tensor:
    """Return what was kept in half precision in single precision again."""
    return tensor.float() if tensor.dtype in _HALVES.values() else tensor


_HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class TeacherCache:
    """The experts' outputs by task and sample index.

    Rows live in a tensor for each batch that was put, on the device of the outputs. Memory: per sample that was put the
    logits of its rows that count, the features where a head makes the logits of them, and whatever hidden layers the
    objective asks for, and nothing else but a few numbers; per position in the stream a number.

    Args:
        top_k: Likeliest classes whose log-probabilities are kept of each row, beside the mass of all others; None for
            the logits of all classes. A divergence from the expert is then a lower bound of the whole one, as what
            happens among the others is not seen; temperatures other than 1 are refused.
        dtype: ``"float16"`` or ``"bfloat16"`` keeps everything in half precision, logits as log-probabilities; None as
            it was computed.

    Raises:
        InputError: If an option is something else.
    """

    def __init__(self, top_k: int | None = None, dtype: str | None = None) -> None:
        if top_k is not None:
            check_number("teachers.top_k", top_k, 1, whole=True)
        check_choice("teachers.dtype", dtype, (None, *_HALVES))
        self.top_k, self.dtype = top_k, dtype
        self.clear()

    @property
    def is_exact(self) -> bool:
        """Whether outputs are kept as they were computed."""
        return self.top_k is None and self.dtype is None

    def kept(self, outputs: Outputs) -> dict[str, Tensor]:
        """Return what is kept of outputs of B samples, as tensors by name."""
        tensors = tensors_of(outputs)
        if self.is_exact:
            return tensors
        answers = shorten_answers(tensors["logits"].flatten(0, -2), self.top_k)
        shape = tensors["logits"].shape[:-1]
        tensors["logits"] = answers.log_probabilities.unflatten(0, shape)
        if answers.classes is not None:
            tensors[_CLASSES] = answers.classes.unflatten(0, shape)
            if (lengths := tensors.get(f"{_LENGTHS}logits")) is not None:
                tensors[f"{_LENGTHS}{_CLASSES}"] = lengths
        half = _HALVES.get(self.dtype or "")
        return {name: t.to(half) if half and t.is_floating_point() else t for name, t in tensors.items()}

    def bytes_per_row(self, classes: int) -> int:
        """Return the bytes that the answer of one row takes, of so many classes."""
        width = 2 if self.dtype else 4
        if self.top_k is None or self.top_k >= classes - 1:
            return width * classes
        return width * (self.top_k + 1) + 4 * self.top_k

    def clear(self) -> None:
        """Forget everything: positions mean other samples in another data set."""
        self._rows: dict[str, dict[str, _RowStore]] = {}
        self._row_of: dict[str, Tensor] = {}  # position to the number of its sample here, -1 where there is none
        self._counts: dict[str, int] = {}

    def get(self, task: str, indices: Tensor) -> Outputs | None:
        """Return the compact outputs at ``indices`` (B,), or None if any of them is missing."""
        row_of, positions = self._row_of.get(task), indices.cpu()
        if row_of is None or int(positions.max()) >= len(row_of) or bool((row_of[positions] < 0).any()):
            return None
        at = row_of[positions]
        return outputs_of({name: rows.get(at) for name, rows in self._rows[task].items()})

    def put(self, task: str, indices: Tensor, outputs: Outputs) -> None:
        """Store outputs of B samples at ``indices`` (B,)."""
        self.put_tensors(task, indices, self.kept(outputs))

    def put_tensors(self, task: str, indices: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Store what :func:`tensors_of` made of the outputs of B samples at ``indices`` (B,)."""
        positions = indices.cpu()
        values = {name: value for name, value in tensors.items() if not name.startswith(_LENGTHS)}
        if self._rows.get(task, values).keys() != values.keys():
            del self._rows[task], self._row_of[task], self._counts[task]  # another objective wants other layers
        row_of = _grown(self._row_of.get(task, torch.zeros(0, dtype=torch.long)), int(positions.max()) + 1, -1)
        new, count = positions[row_of[positions] < 0].unique(), self._counts.get(task, 0)
        row_of[new] = torch.arange(count, count + len(new))
        self._row_of[task], self._counts[task] = row_of, count + len(new)
        stored = self._rows.setdefault(task, {})
        for name, value in values.items():
            store = stored.setdefault(name, _RowStore())
            store.put(row_of[positions], self._counts[task], value.detach(), tensors.get(f"{_LENGTHS}{name}"))


class _RowStore:
    """One tensor's rows of many samples, each with one or with any number of them, in a block for each batch put."""

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []
        self._spans = torch.zeros(0, 3, dtype=torch.long)  # block, first row and number of rows of each sample

    def get(self, samples: Tensor) -> Tensor:
        """Return the rows of samples (B,), one sample after the other."""
        return torch.cat([self.blocks[block][first:end] for block, first, end in self._bounds(samples)])

    def put(self, samples: Tensor, count: int, value: Tensor, lengths: Tensor | None) -> None:
        """Write the rows of samples (B,), of which there are ``count`` now."""
        lengths = torch.ones_like(samples) if lengths is None else lengths.cpu()
        self._spans = _grown(self._spans, count, -1)
        new = self._spans[samples, 2] != lengths  # a sample that is put again keeps its rows
        if bool(new.any()):
            sizes = lengths[new]
            block = torch.full_like(sizes, len(self.blocks))
            self._spans[samples[new]] = torch.stack([block, sizes.cumsum(0) - sizes, sizes], 1)
            self.blocks.append(value.new_empty(int(sizes.sum()), *value.shape[1:]))
        for (number, first, end), rows in zip(self._bounds(samples), value.split(lengths.tolist()), strict=True):
            self.blocks[number][first:end] = rows

    def _bounds(self, samples: Tensor) -> list[tuple[int, int, int]]:
        """Return block, first row and end of the rows of samples (B,)."""
        return [(block, first, first + size) for block, first, size in self._spans[samples].tolist()]


def _grown(rows: Tensor, size: int, fill: int = 0) -> Tensor:
    """Return rows with room for ``size``, at least doubled where there was less."""
    if len(rows) >= size:
        return rows
    grown = rows.new_full((max(size, 2 * len(rows)), *rows.shape[1:]), fill)
    grown[: len(rows)] = rows
    return grown
