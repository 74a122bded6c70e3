"""Files that hold pickled checkpoints: torch's zip archive, torch's format before 1.6, and plain pickles."""

import mmap
import re
import struct
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from adamerge.checkpoints.pickles.machine import Machine, Source
from adamerge.checkpoints.pickles.records import Budget, Damaged, Refused, Storage, StorageKind
from adamerge.errors import InputError

MAX_STEPS = 1_000_000  # a model of 5,000 tensors takes about 300,000
_MAX_DIRECTORY = 8 << 20  # bytes of a zip archive's directory: about 80,000 storages
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: magic, lengths of its name and extra field
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_NAME = re.compile(r"[^\x00-\x1f\x7f\\:]+")


@dataclass(frozen=True)
class Pickled:
    """What a file holds.

    Attributes:
        root: The pickled object, of plain containers and :mod:`adamerge.checkpoints.pickles.records`.
        inert: Classes and functions that the pickle names and that were not imported, with how many objects of each.
        format: In words.
        path: The file.
        size: Of the file, in bytes.
    """

    root: Any
    inert: Mapping[str, int]
    format: str
    path: Path
    size: int


def open_pickled(path: Path) -> Pickled:
    """Read a pickled checkpoint's structure; its tensors stay in the mapped file until asked for.

    Nothing that the file names is imported or called, see :mod:`adamerge.checkpoints.pickles.names`.

    Args:
        path: A file of ``torch.save``, in either of its formats, or a plain pickle of tensors or modules.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it is damaged, contradicts itself, or asks for what no checkpoint needs.
    """
    with path.open("rb") as file:
        head = file.read(4)
        if not head:
            raise InputError(f"{path}: empty file, expected a checkpoint.")
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        try:
            root, inert, kind = _read_zip(file, mapped) if head[:2] == b"PK" else _read_stream(mapped)
        except Refused as error:
            raise InputError(
                f"{path}: refused, nothing was run: {error}. Trust no such file; ask its author for safetensors."
            ) from error
        except Damaged as error:
            raise _damaged(path, error) from error
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError, struct.error) as error:
            raise _damaged(path, error) from error
    return Pickled(root, inert, kind, path, len(mapped))


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: truncated or damaged torch file ({error}). Copy or export it again.")


class _Checked:
    """A file that refuses to hand out a zip directory too large to be torch's."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size = file, size
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int = -1) -> bytes:
        left = self.size - self.file.tell()
        if (left if count < 0 else min(count, left)) > _MAX_DIRECTORY:
            raise Refused(f"its zip directory is larger than {_MAX_DIRECTORY >> 20} MB")
        return self.file.read(count)


def _read_zip(file: IO[bytes], mapped: memoryview) -> tuple[Any, Mapping[str, int], str]:
    with zipfile.ZipFile(_Checked(file, len(mapped))) as archive:
        members = _members(archive, mapped)
    roots = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise Damaged("a zip archive without one data.pkl")
    folder = roots[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in members:
        raise InputError(
            "a TorchScript archive, expected a state dict. Save its tensors where it was made: "
            "safetensors.torch.save_file(torch.jit.load(path).state_dict(), 'expert.safetensors')"
        )
    _check_byte_order(bytes(members.get(f"{folder}byteorder", b"little")[:8]) == b"little")
    storages: dict[tuple[str, Any, int], Storage] = {}

    def storage(kind: StorageKind, key: str, count: int) -> Storage:
        data = members.get(f"{folder}data/{key}")
        found = storages.setdefault((key, kind.dtype, count), Storage(kind.dtype, count, data))
        if data is None:
            raise Damaged(f"the storage {key[:80]!a} is not in the archive")
        if not 0 <= found.nbytes <= len(data):
            raise Damaged(f"the storage {key[:80]!a} has {len(data)} bytes, but its pickle claims more")
        return found

    budget = Budget(MAX_STEPS, len(mapped))
    machine = Machine(storage, lambda content: _read_nested(content, budget), budget)
    root = machine.read(Source(members[roots[0]]))
    return root, machine.inert, "torch zip archive"


def _members(archive: zipfile.ZipFile, mapped: memoryview) -> dict[str, memoryview]:
    """Return each member's bytes as a view of the file: nothing is unpacked."""
    members: dict[str, memoryview] = {}
    spans: list[tuple[int, int]] = []
    for info in archive.infolist():
        name = info.orig_filename
        shown = ascii(name[:80])
        parts = name.split("/")
        if not _NAME.fullmatch(name) or not parts[0] or ".." in parts or name in members:
            raise Refused(f"its zip member {shown} is named twice, or like a path that leaves the archive")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            raise Refused(f"its zip member {shown} is compressed or encrypted, which torch's never are")
        start = info.header_offset
        if not 0 <= start <= len(mapped) - _LOCAL_HEADER.size:
            raise Damaged(f"the zip member {shown} lies outside of the file")
        magic, name_length, extra_length = _LOCAL_HEADER.unpack_from(mapped, start)
        begin = start + _LOCAL_HEADER.size + name_length + extra_length
        end = begin + info.file_size
        own_name = bytes(mapped[start + _LOCAL_HEADER.size :][:name_length])
        if (
            magic != b"PK\x03\x04"
            or end > len(mapped)
            or own_name not in (name.encode(), name.encode("cp437", "replace"))
        ):
            raise Damaged(f"the zip member {shown} is not where the archive's directory says")
        members[name] = mapped[begin:end]
        spans.append((start, end))
    spans.sort()
    if any(end > start for (_, end), (start, _) in pairwise(spans)):
        raise Refused("its zip members overlap")
    return members


def _read_stream(mapped: memoryview) -> tuple[Any, Mapping[str, int], str]:
    """Read torch's legacy format, or a plain pickle."""
    budget = Budget(MAX_STEPS, len(mapped))
    stream = _Stream(mapped, budget, lambda content: _read_nested(content, budget))
    root, is_legacy = stream.read()
    return root, stream.machine.inert, "torch file, legacy format" if is_legacy else "plain pickle"


def _read_nested(content: Any, budget: Budget) -> Storage:
    """Read a storage that a plain pickle holds as the bytes of a legacy file."""

    def deeper(_: Any) -> Storage:
        raise Refused("its pickle holds a file inside of a file inside of a file")

    if not isinstance(content, bytes):
        raise Damaged("a storage made of something else than bytes")
    root, _ = _Stream(memoryview(content), budget, deeper).read()
    if not isinstance(root, Storage):
        raise Damaged("the bytes of a storage hold something else")
    return root


class _Stream:
    """Pickles one after the other, then the bytes of the storages that they name."""

    def __init__(self, data: memoryview, budget: Budget, nested: Any) -> None:
        self.source = Source(data)
        self.storages: dict[str, Storage] = {}
        self.machine = Machine(self._storage, nested, budget)

    def read(self) -> tuple[Any, bool]:
        """Return the object, and whether the format is torch's."""
        first = self.machine.read(self.source)
        if first != _LEGACY_MAGIC or type(first) is not int:
            if self.storages:
                raise Damaged("a plain pickle that names storages outside of it")
            return first, False
        version = self.machine.read(self.source)
        if type(version) is not int or version != _LEGACY_VERSION:
            raise Damaged("an unknown version of torch's legacy format")
        system = self.machine.read(self.source)
        _check_byte_order(isinstance(system, dict) and system.get("little_endian") is True)
        root = self.machine.read(self.source)
        keys = self.machine.read(self.source)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise Damaged("its list of storages is none")
        if sorted(keys) != sorted(self.storages):
            raise Damaged("its list of storages is not that of its tensors")
        for key in keys:
            self._fill(self.storages[key])
        return root, True

    def _storage(self, kind: StorageKind, key: str, count: int) -> Storage:
        found = self.storages.setdefault(key, Storage(kind.dtype, count))
        if (found.dtype, found.count) != (kind.dtype, count) or not 0 <= found.nbytes <= len(self.source.data):
            raise Damaged(f"the storage {key[:80]!a} claims more bytes than the file has, or two sizes")
        return found

    def _fill(self, storage: Storage) -> None:
        count = int.from_bytes(self.source.read(8), "little")
        start, end = self.source.position, self.source.position + storage.nbytes
        if count != storage.count or end > len(self.source.data):
            raise Damaged("a storage is cut off or has another size than its tensor says")
        storage.data = self.source.data[start:end]
        self.source.position = end


def _check_byte_order(is_little: bool) -> None:
    if not is_little or sys.byteorder != "little":
        raise Damaged(
            "its bytes, or this machine's, are not little-endian; load and save it with torch where it was made"
        )
