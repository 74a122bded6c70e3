"""What a pickle is read into: names, records of objects that are never made, and views of stored bytes."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adamerge.errors import InputError

_CLASS = re.compile(r"_*[A-Z]")
_MAX_DIMENSIONS = 64


class Refused(InputError):
    """The file asks for something that no checkpoint needs, or that would be run or overflow elsewhere."""


class Damaged(InputError):
    """The file contradicts itself or ends early."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Global:
    """A class or function that a pickle names; it is never imported."""

    module: str
    name: str
    is_callable: bool = False  # may make records though its name is no class's

    @property
    def makes_records(self) -> bool:
        """Whether a call of it is taken for the making of an object (classes are written in CapWords)."""
        return self.is_callable or all(_CLASS.match(part) for part in self.name.split("."))

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Rebuild:
    """A function of ours that stands in for one of torch's or Python's, by the name that the pickle uses."""

    name: str
    function: Callable[..., Any]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class StorageKind:
    """A storage class: the dtype of its elements."""

    dtype: torch.dtype


@dataclass(slots=True, eq=False, repr=False)
class Record:
    """An object as the pickle describes it, without behaviour.

    Attributes:
        kind: Its class.
        states: What it was given as attributes, in order; not copied, as one dictionary may serve many objects.
        entries: What it was given as items by key.
    """

    kind: Global
    states: list[dict[Any, Any]] = field(default_factory=list)
    entries: dict[Any, Any] = field(default_factory=dict)

    def get(self, name: str) -> Any:
        """Return an attribute, or None."""
        return next((state[name] for state in reversed(self.states) if name in state), None)


@dataclass(slots=True, eq=False, repr=False)
class Budget:
    """What reading one file may still cost, however its parts repeat each other.

    Attributes:
        steps: Opcodes, and items that are copied.
        nbytes: Bytes that are copied.
    """

    steps: int
    nbytes: int

    def spend(self, steps: int, nbytes: int = 0) -> None:
        """Take from what is left.

        Raises:
            Refused: If nothing is left.
        """
        self.steps -= steps
        self.nbytes -= nbytes
        if self.steps < 0 or self.nbytes < 0:
            raise Refused("its pickle takes more steps, or repeats more bytes, than any checkpoint of its size needs")


@dataclass(slots=True, eq=False, repr=False)
class Storage:
    """A run of stored bytes.

    Attributes:
        dtype: Of its elements.
        count: How many elements.
        data: The bytes; None until a legacy file's end has been read.
    """

    dtype: torch.dtype
    count: int
    data: memoryview | None = None
    _flat: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.count * self.dtype.itemsize

    def tensor(self, dtype: torch.dtype) -> Tensor:
        """Return all bytes as a flat tensor of a dtype; no copy where the alignment allows."""
        if self.data is None or len(self.data) < self.nbytes:
            raise Damaged("the bytes of a tensor are missing")
        if self._flat is None:
            content = self.data[: self.nbytes]
            writable = bytearray(content) if content.readonly else content
            self._flat = torch.frombuffer(writable, dtype=torch.uint8) if self.nbytes else torch.empty(0).byte()
        if self._flat.data_ptr() % dtype.itemsize:
            self._flat = self._flat.clone()
        return self._flat[: len(self._flat) // dtype.itemsize * dtype.itemsize].view(dtype)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class TensorView:
    """A tensor as a view of a storage, checked to lie inside it."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes once written in full."""
        return math.prod(self.size) * self.dtype.itemsize

    def tensor(self) -> Tensor:
        """Return the tensor, a view of the file where possible."""
        if 0 in self.size:
            return torch.empty(self.size, dtype=self.dtype)
        is_bool = self.dtype == torch.bool
        flat = self.storage.tensor(torch.uint8 if is_bool else self.dtype)
        view = flat.as_strided(self.size, self.stride, self.offset)
        return view.ne(0) if is_bool else view  # any byte but 0 and 1 would be undefined behaviour


def is_whole(value: Any) -> bool:
    """Return whether a value is a number that torch takes for a size: not negative, below 2**63, no bool."""
    return type(value) is int and 0 <= value < 2**63


def tensor_view(storage: Any, offset: Any, size: Any, stride: Any, dtype: Any = None) -> TensorView:
    """Check a tensor's geometry against its storage.

    Raises:
        Damaged: If it is none, or reaches beyond the storage's bytes.
    """
    if not isinstance(storage, Storage):
        raise Damaged("a tensor without a storage")
    dtype = storage.dtype if dtype is None else dtype
    if not isinstance(dtype, torch.dtype):
        raise Damaged("a tensor whose dtype is none")
    sizes, strides = (tuple(part) if isinstance(part, (tuple, list)) else (None,) for part in (size, stride))
    fits = len(sizes) == len(strides) <= _MAX_DIMENSIONS
    if not fits or not all(map(is_whole, (offset, *sizes, *strides))):
        raise Damaged("a tensor whose offset, size or stride is not made of whole numbers from 0 to 2**63 - 1")
    last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    if 0 not in sizes and (last + 1) * dtype.itemsize > storage.nbytes:
        raise Damaged(
            f"a tensor of size {sizes}, stride {strides} and offset {offset} reaches beyond its storage of "
            f"{storage.nbytes} bytes"
        )
    if 0 in sizes and any(n >= 2**31 for n in sizes):
        raise Damaged(f"a tensor of no elements has the size {sizes}")
    return TensorView(storage, dtype, offset, sizes, strides)
