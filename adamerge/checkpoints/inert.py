"""What a pickle is read into: inert names and records, views of stored bytes; and which names it may use.

Nothing that a pickle names is imported. In order:

1. Names of ``_TABLE``: torch's functions that rebuild tensors, storages, dtypes, a few containers. A function of this
   module stands in for each.
2. Names of the standard library are refused, except those of ``_PLAIN``: what training options are made of.
3. Names with a dot are refused (they walk attributes) unless each part is a class's: ``Outer.Inner``.
4. Any other name is inert: a record where it is a class's (CapWords) or in ``_PLAIN``, and a mere reference
   otherwise, such as ``torch._C._nn.gelu``. A pickle that calls a reference is refused.
"""

import math
import re
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # Python 2's names, as pickle itself maps them
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adamerge.system.archives import Damaged, Refused

_CLASS = re.compile(r"_*[A-Z]")
_MAX_DIMENSIONS = 64
_MAX_NAME = 512  # characters of an import path
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
# Names whose call makes a record although they are the standard library's, or not written as classes are.
_PLAIN = {
    f"{module}.{name}"
    for modules, names in {
        "argparse": "Namespace",
        "builtins": "object int float bool str bytes bytearray complex slice range list tuple dict",
        "collections": "Counter defaultdict deque",
        "datetime": "date datetime time timedelta timezone",
        "functools": "partial",  # a record as well: what it would call has to be admitted by itself
        "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
        "types": "SimpleNamespace",
        "torch": "device Generator",
        "numpy": "dtype ndarray",
        "numpy.core.multiarray numpy._core.multiarray": "_reconstruct scalar",
        "numpy.core.numeric numpy._core.numeric": "_frombuffer",
    }.items()
    for module in modules.split()
    for name in names.split()
}


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Global:
    """A class or function that a pickle names; it is never imported.

    Attributes:
        name: Its import path.
        makes_records: Whether a call of it is taken for the making of an object.
        stand_in: The function of this module that is called in its place.
        dtype: Dtype of the elements, where it is a class of storages.
    """

    name: str
    makes_records: bool = False
    stand_in: Callable[..., Any] | None = None
    dtype: torch.dtype | None = None

    def __str__(self) -> str:
        return self.name


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
        steps: Reads from the stream, and items that are copied.
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
        dtype: Dtype of its elements.
        data: The bytes (n,), mapped from a zip archive, or memory that the end of a legacy file is copied to.
        budget: The budget of the file.
        holds_bools: Whether a view reads the bytes as truth values.
    """

    dtype: torch.dtype
    data: Tensor
    budget: Budget
    holds_bools: bool = False

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.data.nbytes

    def flat(self, dtype: torch.dtype) -> Tensor:
        """Return all bytes as a flat tensor of a dtype; no copy where the alignment allows."""
        if self.data.data_ptr() % dtype.itemsize:
            self.budget.spend(0, self.nbytes)
            self.data = self.data.clone()
        if dtype == torch.bool and not self.holds_bools:
            self.budget.spend(0, self.nbytes)
            self.holds_bools = True
            self.mend_bools()
        return self.data[: len(self.data) // dtype.itemsize * dtype.itemsize].view(dtype)

    def mend_bools(self) -> None:
        """Turn bytes that are read as truth values into 0 and 1: any other would be undefined behaviour."""
        if self.holds_bools:
            self.data.clamp_(max=1)


def is_whole(value: Any) -> bool:
    """Return whether a value is a number that torch takes for a size: not negative, below 2**63, no bool."""
    return type(value) is int and 0 <= value < 2**63


def tensor_view(storage: Any, offset: Any, size: Any, stride: Any, dtype: Any = None) -> Tensor:
    """Make a tensor that is a view of a storage, once it is found to lie inside.

    Raises:
        Damaged: If the arguments do not describe a view, or it reaches beyond the storage's bytes.
    """
    if not isinstance(storage, Storage):
        raise Damaged("a tensor without a storage")
    dtype = storage.dtype if dtype is None else dtype
    if not isinstance(dtype, torch.dtype):
        raise Damaged("a tensor whose dtype is not one of torch's")
    sizes, strides = (tuple(part) if isinstance(part, (tuple, list)) else (None,) for part in (size, stride))
    fits = len(sizes) == len(strides) <= _MAX_DIMENSIONS
    if not fits or not all(map(is_whole, (offset, *sizes, *strides))):
        raise Damaged("a tensor whose offset, size or stride is not made of whole numbers from 0 to 2**63 - 1")
    if 0 in sizes:
        if any(n >= 2**31 for n in sizes):
            raise Damaged(f"a tensor of no elements has the size {sizes}")
        return torch.empty(sizes, dtype=dtype)
    last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    if (last + 1) * dtype.itemsize > storage.nbytes or math.prod(sizes) * dtype.itemsize >= 2**63:
        raise Damaged(
            f"a tensor of size {sizes}, stride {strides} and offset {offset} reaches beyond its storage of "
            f"{storage.nbytes} bytes"
        )
    return storage.flat(dtype).as_strided(sizes, strides, offset)


def check_key(key: Any) -> Any:
    """Return a dictionary's key, or refuse it.

    Nested tuples are refused because their hash takes exponential time and unbounded stack.
    """
    parts = key if type(key) is tuple else (key,)
    for part in parts:
        if isinstance(part, (Global, Record, Tensor, torch.dtype)) and len(parts) == 1:
            continue  # compared by identity
        if not isinstance(part, (str, int, float, bytes, type(None))) or (type(part) is int and abs(part) >= 2**63):
            raise Refused("a dictionary or set of the pickle has keys that are neither texts nor numbers")
    return key


def pairs_to_dict(pairs: Iterable[Any] = ()) -> dict[Any, Any]:
    """Make a dictionary of pairs, as OrderedDict does."""
    if isinstance(pairs, dict):
        return dict(pairs)
    if not isinstance(pairs, (list, tuple)) or any(not isinstance(p, (list, tuple)) or len(p) != 2 for p in pairs):
        raise Damaged("an OrderedDict of other things than pairs")
    return {check_key(key): value for key, value in pairs}


def items_to_set(items: Any = ()) -> set[Any]:
    """Make a set."""
    if not isinstance(items, (list, tuple, set, frozenset)):
        raise Damaged("a set of something else than items")
    return {check_key(item) for item in items}


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    return tensor_view(storage, offset, size, stride)


def _tensor_v3(storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, *dtype: Any) -> Tensor:
    return tensor_view(storage, offset, size, stride, dtype[0])


def _parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise Damaged("a parameter without a tensor")
    return data


def _from_type(function: Any, _kind: Any, arguments: Any, _state: Any) -> Tensor:
    stand_in = function.stand_in if isinstance(function, Global) else None
    if stand_in not in (_tensor, _tensor_v3, _parameter) or not isinstance(arguments, tuple):
        raise Refused(f"the pickle calls {function if isinstance(function, Global) else 'something'} to make a tensor")
    tensor: Tensor = stand_in(*arguments)
    return tensor


def _object(kind: Any, _base: Any, _state: Any) -> Record:
    if not isinstance(kind, Global) or not kind.makes_records:
        raise Refused(f"the pickle makes an object of {kind if isinstance(kind, Global) else 'something'}, no class")
    return Record(kind)


def _encode(text: Any, codec: Any = "latin1") -> bytes:
    if not isinstance(text, str) or codec not in ("latin1", "latin-1"):
        raise Damaged("bytes written as a text of another encoding than latin1")
    return text.encode("latin1")


def _size(items: Any = ()) -> tuple[Any, ...]:
    if not isinstance(items, (list, tuple)):
        raise Damaged("a torch.Size of something else than numbers")
    return tuple(items)


def _layout(*_: Any) -> None:
    """Stand in for the layout of tensors, which all are strided here."""


def inner_file(*_: Any) -> None:
    """Stand in for the reading of a file inside of the pickle, which the unpickler does itself."""
    raise Damaged("a storage inside of a tensor's own pickle")  # pragma: no cover


_STAND_INS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Size": _size,
    "torch.serialization._get_layout": _layout,
    "torch.storage._load_from_bytes": inner_file,
    "collections.OrderedDict": pairs_to_dict,
    "builtins.set": items_to_set,
    "builtins.frozenset": items_to_set,
    "copyreg._reconstructor": _object,
    "_codecs.encode": _encode,
}
_TABLE: dict[str, Any] = {
    **{name: Global(name, stand_in=function) for name, function in _STAND_INS.items()},
    **{str(dtype): dtype for dtype in _STORAGES.values()},
    **{
        f"{module}.{name}": Global(f"{module}.{name}", dtype=dtype)
        for module in ("torch", "torch.cuda", "torch.storage")
        for name, dtype in _STORAGES.items()
    },
}


def resolve(module: str, name: str) -> Any:
    """Return what stands in for a name of the pickle.

    Raises:
        Refused: If the policy admits no such name.
    """
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    full = f"{module}.{name}"
    parts = full.split(".")
    if len(full) > _MAX_NAME or not full.isascii() or not all(part.isidentifier() for part in parts):
        raise Refused(f"the pickle asks for {full[:80]!a}, which is no name of a class")
    if full in _TABLE:
        return _TABLE[full]
    is_plain, is_class = full in _PLAIN, all(map(_CLASS.match, name.split(".")))
    is_admitted = is_plain or parts[0] not in sys.stdlib_module_names
    if not is_admitted or ("." in name and not is_class):
        raise Refused(f"the pickle asks for {full}, which no checkpoint needs and which unpickling it would run")
    return Global(full, makes_records=is_plain or is_class)
