"""Which names a pickle may use: a table of stand-ins, classes that become records, and all else refused.

Nothing is imported either way; the policy decides what is read and what is refused with its name. In order:

1. The table below: torch's functions that rebuild tensors, storages, dtypes, a few containers. Each is a function
   of this package.
2. Names of the standard library are refused, except those of ``_PLAIN``: what training options are made of.
3. Names with a dot are refused (they walk attributes) unless each part is a class's: ``Outer.Inner``.
4. Any other name is inert: a record where it is a class's (CapWords) or in ``_PLAIN``, and a mere reference
   otherwise, such as ``torch._C._nn.gelu``. A pickle that calls a reference is refused.
"""

import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # Python 2's names, as pickle itself maps them
from collections.abc import Iterable
from typing import Any

import torch

from adamerge.checkpoints.pickles.records import (
    Damaged,
    Global,
    Rebuild,
    Record,
    Refused,
    StorageKind,
    TensorView,
    tensor_view,
)

_LONGEST_NAME = 512
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
_DTYPES = set(_STORAGES.values())

# Names whose call makes a record although they are the standard library's, or not written as classes are.
_PLAIN = {
    "argparse": ("Namespace",),
    "builtins": (
        *("object", "int", "float", "bool", "str", "bytes", "bytearray", "complex", "slice", "range"),
        *("list", "tuple", "dict"),
    ),
    "collections": ("Counter", "defaultdict", "deque"),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "functools": ("partial",),  # a record as well: what it would call has to be admitted by itself
    "pathlib": ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),
    "types": ("SimpleNamespace",),
    "torch": ("device", "Generator"),
    "numpy": ("dtype", "ndarray"),
    "numpy.core.multiarray": ("_reconstruct", "scalar"),
    "numpy._core.multiarray": ("_reconstruct", "scalar"),
    "numpy.core.numeric": ("_frombuffer",),
    "numpy._core.numeric": ("_frombuffer",),
}

type_of_key = (str, int, float, bool, bytes, type(None))


def check_key(key: Any) -> Any:
    """Return a dictionary's key, or refuse it.

    Nested tuples are refused because their hash takes exponential time and unbounded stack.
    """
    parts = key if type(key) is tuple else (key,)
    for part in parts:
        if isinstance(part, (Global, Record, TensorView, torch.dtype)) and len(parts) == 1:
            continue  # compared by identity
        if not isinstance(part, type_of_key) or (type(part) is int and abs(part) >= 2**63):
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


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> TensorView:
    return tensor_view(storage, offset, size, stride)


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> TensorView:
    return tensor_view(storage, offset, size, stride, dtype)


def _parameter(data: Any, *_: Any) -> TensorView:
    if not isinstance(data, TensorView):
        raise Damaged("a parameter without a tensor")
    return data


def _from_type(function: Any, _kind: Any, arguments: Any, _state: Any) -> Any:
    makes_tensor = isinstance(function, Rebuild) and function.function in (_tensor, _tensor_v3, _parameter)
    if not makes_tensor or not isinstance(arguments, tuple):
        raise Refused(f"the pickle calls {function if isinstance(function, Global) else 'something'} to make a tensor")
    return function.function(*arguments)


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


def _outside(*_: Any) -> None:
    raise Damaged("a storage inside of a tensor's own pickle")  # pragma: no cover - the machine handles it


LOAD_FROM_BYTES = Rebuild("torch.storage._load_from_bytes", _outside)

_TABLE: dict[str, Any] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Size": _size,
    "torch.storage._load_from_bytes": LOAD_FROM_BYTES,
    "collections.OrderedDict": pairs_to_dict,
    "builtins.set": items_to_set,
    "builtins.frozenset": items_to_set,
    "copyreg._reconstructor": _object,
    "_codecs.encode": _encode,
    **{f"torch.{str(dtype).removeprefix('torch.')}": dtype for dtype in _DTYPES},
    **{
        f"{module}.{name}": StorageKind(dtype)
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
    if len(full) > _LONGEST_NAME or not full.isascii() or not all(part.isidentifier() for part in parts):
        raise Refused(f"the pickle asks for {full[:80]!a}, which is no name of a class")
    found = _TABLE.get(full)
    if found is not None:
        return Rebuild(full, found) if callable(found) and not isinstance(found, Rebuild) else found
    plain = name in _PLAIN.get(module, ())
    result = Global(module, name, plain)
    known = plain or parts[0] not in sys.stdlib_module_names
    if not known or ("." in name and not result.makes_records):
        raise Refused(f"the pickle asks for {full}, which no checkpoint needs and which unpickling it would run")
    return result
