"""Batches, and a network's outputs for them: plain values that streams, backbones and the engine share.

Legend: B samples, S positions, C classes, F features, N rows that count.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate

from adamerge.errors import InputError

# What a network is called with: a tensor as network(inputs), a mapping as network(**inputs). The first axis of every
# tensor is the sample. Keys that begin with an underscore do not go to the network, only to what reads its output.
Inputs = Tensor | Mapping[str, Tensor]


class TaskBatch(NamedTuple):
    """One task's unlabeled batch: inputs (B, ...) and positions in the task's stream (B,)."""

    inputs: Inputs
    indices: Tensor

    def to(self, device: torch.device | str) -> "TaskBatch":
        """Return the batch on another device."""
        return TaskBatch(to(self.inputs, device), self.indices.to(device))


@dataclass
class Outputs:
    """A model's outputs for a batch.

    Attributes:
        logits: (B, ..., C), the class axis last: one row (C,) per sample, or per position of a sample.
        features: What the task's head takes, (B, ..., F); None where the network's own logits count.
        hidden: Name of a module to its output (B, ...).
        valid: Boolean (B, ...), the axes of the logits between sample and class, or fewer positions from the first on:
            the rows that count, padding not among them; None for all.
        padding: Boolean (B, S), False at padding, for hidden states whose positions are not those of the logits.
        classes: Of an expert's shortened answers the classes (N, K) that the logits (N, K + 1) are of, the last one
            being that of all others; None where logits are of all classes.
    """

    logits: Tensor
    features: Tensor | None = None
    hidden: dict[str, Tensor] = field(default_factory=dict)
    valid: Tensor | None = None
    padding: Tensor | None = field(default=None, repr=False)
    classes: Tensor | None = None

    def rows(self) -> Tensor:
        """Return the logits of the rows that count, (N, C): sample after sample, position after position.

        >>> Outputs(torch.eye(2).unsqueeze(0), valid=torch.tensor([[True, False]])).rows()
        tensor([[1., 0.]])
        """
        return self.logits.flatten(0, -2) if self.valid is None else select_valid(self.logits, self.valid)

    def single(self) -> "Outputs":
        """Return the same in single precision."""
        logits, hidden = self.logits.float(), {name: value.float() for name, value in self.hidden.items()}
        features = logits if self.features is self.logits else self.features
        return replace(self, logits=logits, features=None if features is None else features.float(), hidden=hidden)

    def compact(self) -> "Outputs":
        """Return what counts alone: logits (N, C), and features and hidden states without padding.

        Those (B, S, ...) become (M, ...): the positions whose rows count or, where a hidden state has other positions,
        those that are no padding; for modules inside an ``encoder`` the latter.
        """
        if self.valid is None and self.padding is None:
            return self
        hidden = {name: self._compact(value, name)[0] for name, value in self.hidden.items()}
        features = None if self.features is None else self._compact(self.features)[0]
        logits = self.logits if self.valid is None else self.rows()
        return Outputs(logits, features, hidden)

    def ragged(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Return the tensors of :meth:`compact` by name, each with the number of rows of every sample, (B,).

        That number is None for a tensor (B, ...) that has one row per sample.
        """
        tensors = {"logits": self._compact(self.logits)}
        if self.features is not None:
            tensors["features"] = self._compact(self.features)
        return tensors | {f"{HIDDEN}{name}": self._compact(value, name) for name, value in self.hidden.items()}

    def _compact(self, value: Tensor, module: str | None = None) -> tuple[Tensor, Tensor | None]:
        masks = (self.valid,) if module is None else (self.valid, self.padding)
        for mask in masks[::-1] if module is not None and "encoder" in module.split(".") else masks:
            if mask is not None and fits(mask, value):
                return select_valid(value, mask), mask.flatten(1).sum(1) if mask.ndim > 1 else mask.long()
        return value, None

    def to(self, device: torch.device) -> "Outputs":
        """Return the batch on another device."""
        return self._changed(lambda tensor: (tensor.to(device),))[0]

    def __getitem__(self, rows: slice | Tensor) -> "Outputs":
        """Return the outputs for some samples of the batch."""
        return self._changed(lambda tensor: (tensor[rows],))[0]

    def split(self, sizes: Sequence[int]) -> list["Outputs"]:
        """Return the outputs of consecutive batches of the given sizes."""
        return [self] if len(sizes) == 1 else self._changed(lambda tensor: tensor.split(list(sizes)))

    def _changed(self, change: Callable[[Tensor], Sequence[Tensor]]) -> list["Outputs"]:
        """Return one or more outputs, each with one of the tensors that ``change`` makes of every tensor."""
        logits = change(self.logits)
        others = [
            logits if part is self.logits else [None] * len(logits) if part is None else change(part)
            for part in (self.features, self.valid, self.padding, self.classes)
        ]
        hidden = {name: change(value) for name, value in self.hidden.items()}
        return [
            Outputs(part, features, {name: values[i] for name, values in hidden.items()}, valid, padding, classes)
            for i, (part, features, valid, padding, classes) in enumerate(zip(logits, *others, strict=True))
        ]


HIDDEN = "hidden/"  # begins the names of hidden layers among the tensors of outputs
PADDING = "attention_mask"  # the key of inputs that tells a network of padding, by transformers' convention

Read = Callable[[Any, Inputs], Outputs]  # a network's result and its inputs, to outputs
Valid = Callable[[Inputs], Tensor | None]  # inputs to the rows that count, see Outputs.valid
Collate = Callable[[Sequence[Any]], Inputs]  # samples without batch axis to a batch


def fits(mask: Tensor, value: Tensor) -> bool:
    """Whether a mask (B, T, ...) covers the positions of a tensor (B, S, ...), all or all but the last (T = S - 1)."""
    positions = value.shape[: mask.ndim]
    if value.ndim <= mask.ndim or positions[:1] != mask.shape[:1]:
        return False
    return positions == mask.shape or (mask.ndim == 2 and positions[1] == mask.shape[1] + 1)


def select_valid(value: Tensor, valid: Tensor) -> Tensor:
    """Return the rows (N, ...) of a tensor (B, S, ...) where a mask (B, T, ...) is True.

    Raises:
        InputError: If the mask has other axes.
    """
    if not fits(valid, value):
        raise InputError(
            f"Outputs.valid: expected the shape {tuple(value.shape[:-1])} of the logits without classes, found "
            f"{tuple(valid.shape)}. The class axis of logits is the last."
        )
    return (value if value.shape[1:2] == valid.shape[1:2] or valid.ndim == 1 else value[:, : valid.shape[1]])[valid]


def read_output(output: Any, inputs: Inputs, names: Sequence[str] = (), class_axis: int | None = None) -> Outputs:
    """Read a network's result: a tensor as it is, of anything else the first that it has of some names.

    Args:
        output: A tensor, or an object or mapping such as transformers' ``ModelOutput``.
        inputs: What the network was called with.
        names: Names to look for; default ``logits``, ``pooler_output``, ``image_embeds``, ``last_hidden_state``.
        class_axis: Axis of the classes in the tensor, such as 1 of (B, C, H, W); it is moved to the end. Default the
            last.

    Returns:
        The tensor, as features and, for networks without a head, as logits.

    Raises:
        InputError: If the result has none of the names.
    """
    wanted = tuple(names) or READ_NAMES
    values = (output.get(name) if isinstance(output, Mapping) else getattr(output, name, None) for name in wanted)
    tensor = output if isinstance(output, Tensor) else next((v for v in values if isinstance(v, Tensor)), None)
    if tensor is None:
        keys = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        raise InputError(
            f"The network returned {type(output).__name__}{keys}: expected a tensor, or one of {', '.join(wanted)}. "
            "Give the backbone a method read(output, inputs) that returns Outputs."
        )
    tensor = tensor if class_axis is None else tensor.movedim(class_axis, -1)
    return Outputs(tensor, tensor)


READ_NAMES = ("logits", "pooler_output", "image_embeds", "last_hidden_state")


def size(inputs: Inputs) -> int:
    """Return B."""
    return len(inputs if isinstance(inputs, Tensor) else next(iter(inputs.values())))


def to(inputs: Inputs, device: torch.device | str) -> Inputs:
    """Return inputs on another device."""
    return _each(inputs, lambda tensor: tensor.to(device))


def take(inputs: Inputs, rows: slice | Tensor) -> Inputs:
    """Return some samples of a batch."""
    return _each(inputs, lambda tensor: tensor[rows])


def split(inputs: Inputs, sizes: Sequence[int]) -> list[Inputs]:
    """Return a batch as consecutive ones of the given sizes."""
    if isinstance(inputs, Tensor):
        return list(inputs.split(list(sizes)))
    pieces = {key: tensor.split(list(sizes)) for key, tensor in inputs.items()}
    return [{key: parts[i] for key, parts in pieces.items()} for i in range(len(sizes))]


def join(batches: Sequence[Inputs]) -> Inputs:
    """Return batches of one :func:`kind` as one."""
    first = batches[0]
    if len(batches) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(batches))  # type: ignore[arg-type]  # tensors, as the first is
    return {key: torch.cat([batch[key] for batch in batches]) for key in first}  # type: ignore[index]


def kind(inputs: Inputs) -> Hashable:
    """Return what batches that are joined have in common: dtypes, and shapes without the sample axis."""
    if isinstance(inputs, Tensor):
        return inputs.shape[1:], inputs.dtype
    return tuple(sorted((key, tuple(tensor.shape[1:]), str(tensor.dtype)) for key, tensor in inputs.items()))


def stack(samples: Sequence[Any]) -> Inputs:
    """Return samples of one shape as a batch.

    Raises:
        InputError: If shapes or keys differ.
    """
    first = samples[0]
    for sample in samples[1:]:
        if isinstance(sample, Mapping) != isinstance(first, Mapping) or (
            isinstance(first, Mapping) and sample.keys() != first.keys()
        ):
            raise InputError(f"inputs of one batch differ: {described(first)} and {described(sample)}.")
        shapes = [_shapes(first), _shapes(sample)]
        if shapes[0] != shapes[1]:
            key = next(key for key in shapes[0] if shapes[0][key] != shapes[1][key])
            where, one, two = key and f" as {key}", shapes[0][key], shapes[1][key]
            remedy = (
                "Give the backbone a method collate(samples) that pads them (adamerge.data.batch.pad)."
                if key
                else "Give images, which the backbone's preprocessing resizes, or resize and crop in the data set's "
                "transform."
            )
            raise InputError(f"inputs of one batch have the shapes {one} and {two}{where}. {remedy}")
    batch: Inputs = default_collate([dict(s) for s in samples] if isinstance(first, Mapping) else list(samples))
    return batch


def pad(
    samples: Sequence[Mapping[str, Tensor]],
    values: Mapping[str, float] | None = None,
    side: Literal["right", "left"] = "right",
) -> dict[str, Tensor]:
    """Return samples of unequal length as a batch.

    Args:
        samples: Key to tensor (S, ...), whose S differs between samples, or to one without axes.
        values: What a key's tensors are filled up with, default 0.
        side: Where padding goes.

    Returns:
        Key to (B, S, ...), S the largest.

    Raises:
        InputError: If keys, or further axes, differ.

    Example:
        >>> pad([{"input_ids": torch.tensor([5, 6])}, {"input_ids": torch.tensor([7])}], {"input_ids": 9})
        {'input_ids': tensor([[5, 6],
                [7, 9]])}
    """
    batch = {}
    for sample in samples:
        if sample.keys() != samples[0].keys():
            raise InputError(f"inputs of one batch differ: {described(samples[0])} and {described(sample)}.")
    for key, first in samples[0].items():
        tensors = [sample[key] for sample in samples]
        if all(tensor.shape == first.shape for tensor in tensors):
            batch[key] = torch.stack(tensors)
            continue
        if any(tensor.shape[1:] != first.shape[1:] or not tensor.ndim for tensor in tensors):
            raise InputError(
                f"inputs of one batch have the shapes {', '.join(str(tuple(t.shape)) for t in tensors[:3])} as {key}: "
                "only the first axis can be padded."
            )
        length = max(map(len, tensors))
        batch[key] = first.new_full((len(tensors), length, *first.shape[1:]), (values or {}).get(key, 0))
        for row, tensor in zip(batch[key], tensors, strict=True):
            row[length - len(tensor) if side == "left" else 0 :][: len(tensor)] = tensor
    return batch


def described(inputs: Any) -> str:
    """Say in messages what inputs are."""
    if isinstance(inputs, Tensor):
        return f"a tensor {tuple(inputs.shape)}"
    return f"a mapping with {', '.join(map(str, inputs))}" if isinstance(inputs, Mapping) else type(inputs).__name__


def of_network(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what of a mapping the network is called with."""
    return {key: tensor for key, tensor in inputs.items() if not key.startswith("_")}


def _each(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    return change(inputs) if isinstance(inputs, Tensor) else {key: change(tensor) for key, tensor in inputs.items()}


def _shapes(sample: Any) -> dict[str, tuple[int, ...]]:
    tensors = sample if isinstance(sample, Mapping) else {"": sample}
    return {key: tuple(getattr(tensor, "shape", ())) for key, tensor in tensors.items()}
