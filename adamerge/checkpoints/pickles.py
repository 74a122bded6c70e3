"""Pickled checkpoints read without unpickling them: torch's zip archive, its format before 1.6, and plain pickles."""

import io
import mmap
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from adamerge.checkpoints.inert import Budget, Record, Storage
from adamerge.checkpoints.unpickler import InertUnpickler, Stream
from adamerge.errors import InputError, shorten
from adamerge.system.archives import ZIP_MAGIC, Damaged, Refused, stored_members
from adamerge.system.memory import free_memory
from adamerge.system.reading import open_regular

MAX_STEPS = 2_000_000  # 5,000 tensors take 330,000 as a state dict, 900,000 as a module, 1,500,000 in a plain pickle
# Classes that a state dict may hold values of, beside its tensors, as torch's own safe reader allows.
HARMLESS = {"builtins.bytearray", "builtins.complex", "collections.Counter", "torch.device"}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_NESTS = ("state_dict", "model_state_dict", "model")
_MAX_DEPTH = 100  # modules inside of modules
_MAX_NAMES = 100_000
_MAX_GROWTH = 4  # bytes written over bytes read: weights that share memory are written in full
_MAX_NAME = 1000  # characters
_SMALL = 1 << 24  # bytes that may be written whatever the file's size

_Nested = Callable[[Any], Storage]  # what reads a file inside of a pickle


@dataclass(frozen=True)
class PickledTensors:
    """The tensors of a pickled checkpoint.

    Attributes:
        tensors: Name to tensor; those of a zip archive stay in the mapped file.
        holder: What held them, in words.
        is_module: Whether that is a module, not a dictionary.
        left_out: Names beside them that hold something else.
        beside: Names, in the file, of other dictionaries or modules with tensors, such as averaged weights.
        inert: Classes and functions that the pickle names and that were not imported.
        format: In words.
    """

    tensors: Mapping[str, Tensor]
    holder: str
    is_module: bool
    left_out: tuple[str, ...]
    beside: tuple[str, ...]
    inert: tuple[str, ...]
    format: str


def read_pickle(path: Path, entry: str | None = None) -> PickledTensors:
    """Read a pickled checkpoint's state dict: a dictionary or a module, or either under ``state_dict`` or ``model``.

    Nothing that the file names is imported or called, see :mod:`adamerge.checkpoints.inert`.

    Args:
        path: A file of ``torch.save``, in either of its formats, or a plain pickle of tensors or modules.
        entry: The name in the file that the state dict is under, instead of these.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it is damaged, contradicts itself, asks for what no checkpoint needs, holds no tensors, or would
            be many times larger once written.
    """
    with naming(path), mapped_file(path) as (file, mapped):
        root, inert, form = _root(file, mapped)
        holder, entries, is_module, beside = _state_dict(root, entry)
    tensors = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    _check(path, tensors, holder, beside, len(mapped))
    others = [name for name in entries if name not in tensors]
    left_out = tuple(str(name)[:80] if isinstance(name, (str, int)) else type(name).__name__ for name in others)
    return PickledTensors(tensors, holder, is_module, left_out, beside, tuple(sorted(inert)), form)


def check_archive(path: Path) -> None:
    """Check a file of ``torch.save`` before torch's own reader gets it, which takes as much memory as a file asks for.

    Raises:
        OSError: If it cannot be read.
        InputError: If it is no regular file or no zip archive, holds other objects than tensors and plain containers,
            or see :func:`read_pickle`; the message is a reason, without the file's name.
    """
    with mapped_file(path) as (file, mapped):
        if bytes(mapped[: len(ZIP_MAGIC)]) != ZIP_MAGIC:
            raise Damaged("no zip archive")
        if len(mapped) > free_memory() // 2:
            raise InputError(f"its {len(mapped) / 1e9:.1f} GB do not fit into the memory that is free")
        _, inert, _ = _root(file, mapped)
        if objects := inert - HARMLESS:
            raise Refused(f"it holds objects of {shorten(sorted(objects))}")


def read_object(path: Path) -> Any:
    """Read what a pickle holds as inert records, see :mod:`adamerge.checkpoints.inert`.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: See :func:`read_pickle`.
    """
    with naming(path), mapped_file(path) as (file, mapped):
        return _root(file, mapped, len(mapped))[0]  # the more processes, the more parts


def tensor_in(data: memoryview) -> Tensor:
    """Return the one tensor that a part of a file holds, as ``torch.save`` wrote it there.

    Raises:
        InputError: See :func:`check_archive`.
    """
    root, _, _ = _root(io.BytesIO(data), data)  # whose copy lasts while the archive's directory is read
    if not isinstance(root, Tensor):
        raise Damaged("no tensor")
    return root


@contextmanager
def mapped_file(path: Path) -> Iterator[tuple[IO[bytes], memoryview]]:
    """Open a file and map it; the mapping outlives the block.

    Raises:
        InputError: If the file is empty, or no regular one.
    """
    with open_regular(path) as file:
        if not file.read(1):
            raise InputError("empty file, expected a checkpoint.")
        yield file, memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Say what the block finds wrong with the file's name."""
    try:
        yield
    except Refused as error:
        raise InputError(
            f"{path}: refused, nothing was run: {error}. Trust no such file; ask its author for safetensors."
        ) from error
    except Damaged as error:
        raise InputError(f"{path}: truncated or damaged torch file ({error}). Copy or export it again.") from error
    except InputError as error:
        raise InputError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error


def _root(file: IO[bytes], mapped: memoryview, steps: int = 0) -> tuple[Any, set[str], str]:
    """Return what a file holds, the classes and functions it names beside ours, and its format in words."""
    budget = Budget(max(steps, MAX_STEPS), 2 * len(mapped))
    read = partial(_read_zip, file) if bytes(mapped[: len(ZIP_MAGIC)]) == ZIP_MAGIC else _read_stream
    return read(mapped, budget, partial(_read_nested, budget))


def _read_zip(file: IO[bytes], mapped: memoryview, budget: Budget, nested: _Nested) -> tuple[Any, set[str], str]:
    members = stored_members(file)
    roots = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise Damaged("a zip archive without one data.pkl")
    folder = roots[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in members:
        raise InputError(
            "a TorchScript archive, expected a state dict. Save its tensors where it was made: "
            "safetensors.torch.save_file(torch.jit.load(path).state_dict(), 'expert.safetensors')"
        )
    order = members.get(f"{folder}byteorder")
    _check_byte_order(order is None or bytes(mapped[order]) == b"little")
    storages: dict[tuple[str, torch.dtype, int], Storage] = {}

    def storage(dtype: torch.dtype, key: str, count: int) -> Storage:
        if (place := members.get(f"{folder}data/{key}")) is None:
            raise Damaged(f"the storage {key[:80]!a} is not in the archive")
        if not 0 <= count * dtype.itemsize <= place.stop - place.start:
            size = place.stop - place.start
            raise Damaged(f"the storage {key[:80]!a} has {size} bytes, but its pickle claims more")
        if (key, dtype, count) not in storages:
            content = mapped[place][: count * dtype.itemsize]
            data = torch.frombuffer(content, dtype=torch.uint8) if count else torch.empty(0, dtype=torch.uint8)
            storages[key, dtype, count] = Storage(dtype, data, budget)
        return storages[key, dtype, count]

    reader = InertUnpickler(Stream(mapped[members[roots[0]]], budget), storage, nested)
    return reader.next(), reader.inert, "torch zip archive"


def _read_stream(data: memoryview, budget: Budget, nested: _Nested) -> tuple[Any, set[str], str]:
    """Read a plain pickle, or torch's legacy format: pickles one after the other, then the bytes of their storages."""
    storages: dict[str, Storage] = {}

    def storage(dtype: torch.dtype, key: str, count: int) -> Storage:
        nbytes = count * dtype.itemsize
        if key not in storages:
            if not 0 <= nbytes <= len(data):
                raise Damaged(f"the storage {key[:80]!a} claims more bytes than the file has")
            budget.spend(0, nbytes)
            storages[key] = Storage(dtype, torch.empty(nbytes, dtype=torch.uint8), budget)
        if (storages[key].dtype, storages[key].nbytes) != (dtype, nbytes):
            raise Damaged(f"the storage {key[:80]!a} has two sizes")
        return storages[key]

    stream = Stream(data, budget)
    reader = InertUnpickler(stream, storage, nested)
    first = reader.next()
    if type(first) is not int or first != _LEGACY_MAGIC:
        if storages:
            raise Damaged("a plain pickle that names storages outside of it")
        return first, reader.inert, "plain pickle"
    version = reader.next()
    if type(version) is not int or version != _LEGACY_VERSION:
        raise Damaged("an unknown version of torch's legacy format")
    system = reader.next()
    _check_byte_order(isinstance(system, dict) and system.get("little_endian") is True)
    root, keys = reader.next(), reader.next()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(storages):
        raise Damaged("its list of storages is not that of its tensors")
    for key in keys:
        _fill(storages[key], stream)
    return root, reader.inert, "torch file, legacy format"


def _fill(storage: Storage, stream: Stream) -> None:
    """Copy the bytes of a storage, and their count before them, from the end of a legacy file."""
    size = stream.read(8)
    count, start = int.from_bytes(size, "little"), stream.position
    end = start + storage.nbytes
    if len(size) < 8 or count * storage.dtype.itemsize != storage.nbytes or end > len(stream.data):
        raise Damaged("a storage is cut off or has another size than its tensor says")
    if storage.nbytes:
        storage.data.numpy().data[:] = stream.data[start:end]
    storage.mend_bools()
    stream.position = end


def _read_nested(budget: Budget, content: Any) -> Storage:
    """Read a storage that a plain pickle holds as the bytes of a legacy file."""

    def refuse(_: Any) -> Storage:
        raise Refused("its pickle holds a file inside of a file inside of a file")

    if not isinstance(content, bytes):
        raise Damaged("a storage made of something else than bytes")
    root, _, _ = _read_stream(memoryview(content), budget, refuse)
    if not isinstance(root, Storage):
        raise Damaged("the bytes of a storage hold something else")
    return root


def _check_byte_order(is_little: bool) -> None:
    if not is_little or sys.byteorder != "little":
        raise Damaged(
            "its bytes, or this machine's, are not little-endian; load and save it with torch where it was made"
        )


def _state_dict(root: Any, entry: str | None) -> tuple[str, Mapping[Any, Any], bool, tuple[str, ...]]:
    """Return what holds the tensors, name to tensor among others, whether it is a module, and what else has any."""
    beside: list[str] = []
    for nest in _NESTS if entry is None else (entry,):
        if isinstance(root, dict) and (isinstance(root.get(nest), dict) or _is_module(root.get(nest))):
            beside += [str(name)[:80] for name, value in root.items() if name != nest and _has_tensors(value)]
            root = root[nest]
        elif entry is not None:
            raise InputError(f"no entry {entry!r} with tensors; there are {shorten(map(str, _entries(root)))}.")
    if _is_module(root):
        return f"module {root.kind}", dict(_of_module(root)), True, tuple(beside)
    entries = _entries(root)
    if isinstance(entries, dict) and any(isinstance(value, Tensor) for value in entries.values()):
        return "state dict", entries, False, tuple(beside)
    if isinstance(entries, dict):
        beside += [str(name)[:80] for name, value in entries.items() if _has_tensors(value)]
    return str(root.kind) if isinstance(root, Record) else type(root).__name__, {}, False, tuple(beside)


def _has_tensors(value: Any) -> bool:
    """Return whether an entry is a state dict or module itself."""
    named = isinstance(value, dict) and any(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    return named or _is_module(value)


def _check(path: Path, tensors: Mapping[Any, Tensor], holder: str, beside: Sequence[str], size: int) -> None:
    """Refuse tensors without a printable name, and tensors that repeat the same memory too often."""
    if not tensors:
        remedy = f"adamerge convert {path} --entry {beside[0]} --out NAME.safetensors" if beside else ""
        hint = f" There are tensors under {shorten(beside)}: {remedy}." if beside else ""
        raise InputError(
            f"{path}: expected a state dict (name to tensor) or a module, found {holder} without tensors.{hint}"
        )
    bad = [ascii(name)[:80] for name in tensors if not isinstance(name, str) or not name or not name.isprintable()]
    if bad:
        raise InputError(f"{path}: expected tensors with printable names, found {shorten(bad)}.")
    total = sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())
    if total > _MAX_GROWTH * size + _SMALL:
        raise InputError(
            f"{path}: refused: its tensors take {total:.3g} bytes, more than {_MAX_GROWTH} times the file's {size}, "
            "as they repeat the same memory. Save clones of them."
        )


def _is_module(value: Any) -> bool:
    """Return whether a record is that of an ``nn.Module``: it has its three dictionaries."""
    return isinstance(value, Record) and all(
        isinstance(_entries(value.get(name)), dict) for name in ("_parameters", "_buffers", "_modules")
    )


def _entries(value: Any) -> Any:
    return value.entries if isinstance(value, Record) else value


def _of_module(root: Record) -> Iterator[tuple[str, Tensor]]:
    """Yield what ``root.state_dict()`` would hold, in its order."""
    pending: list[tuple[str, Record]] = [("", root)]
    steps = 0
    while pending:
        prefix, module = pending.pop()
        steps += 1
        if prefix.count(".") > _MAX_DEPTH or steps > _MAX_NAMES:
            raise Refused(f"its modules are nested more than {_MAX_DEPTH} deep, or are more than {_MAX_NAMES}")
        volatile = module.get("_non_persistent_buffers_set")
        skipped = volatile if isinstance(volatile, (set, frozenset)) else ()
        for kind in ("_parameters", "_buffers"):
            for name, value in _entries(module.get(kind)).items():
                steps += 1
                if isinstance(value, Tensor) and not (kind == "_buffers" and name in skipped):
                    yield _joined(prefix, name), value
        children = _entries(module.get("_modules")).items()
        steps += len(children)
        pending += [(f"{_joined(prefix, name)}.", child) for name, child in reversed(children) if _is_module(child)]


def _joined(prefix: str, name: Any) -> str:
    if not isinstance(name, str) or len(prefix) + len(name) > _MAX_NAME:
        raise Refused(f"its modules have names that are no texts, or of more than {_MAX_NAME} characters")
    return prefix + name
