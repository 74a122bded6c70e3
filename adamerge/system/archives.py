"""Zip archives as torch writes them, checked before a reader trusts their directory."""

import re
import struct
import zipfile
from itertools import pairwise
from typing import IO

from adamerge.errors import InputError

_MAX_DIRECTORY = 8 << 20  # bytes of the archive's directory: about 80,000 members
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a member: magic, lengths of its name and extra field
_NAME = re.compile(r"[^\x00-\x1f\x7f\\:]+")
ZIP_MAGIC = b"PK"


class Refused(InputError):
    """The file asks for something that no checkpoint needs, or that would be run or overflow elsewhere."""


class Damaged(InputError):
    """The file contradicts itself or ends early."""


class _Bounded:
    """A file that refuses to hand out a zip directory too large to be torch's."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size = file, size
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int = -1) -> bytes:
        remaining = self.size - self.file.tell()
        if (remaining if count < 0 else min(count, remaining)) > _MAX_DIRECTORY:
            raise Refused(f"its zip directory is larger than {_MAX_DIRECTORY >> 20} MB")
        return self.file.read(count)


def stored_members(file: IO[bytes]) -> dict[str, slice]:
    """Return where the bytes of each member lie in an archive's file; nothing is unpacked.

    Raises:
        Refused: If a member is compressed, encrypted or named like a path, or members overlap or share a name.
        Damaged: If the directory does not agree with the file.
    """
    size = file.seek(0, 2)
    try:
        with zipfile.ZipFile(_Bounded(file, size)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError, struct.error) as error:
        raise Damaged(str(error)) from error
    members: dict[str, slice] = {}
    spans: list[tuple[int, int]] = []
    for entry in entries:
        name = entry.orig_filename
        if name in members:
            raise Refused(f"its zip member {name[:80]!a} is named twice")
        members[name] = _content(entry, file, size)
        spans.append((entry.header_offset, members[name].stop))
    spans.sort()
    if any(end > start for (_, end), (start, _) in pairwise(spans)):
        raise Refused("its zip members overlap")
    return members


def _content(entry: zipfile.ZipInfo, file: IO[bytes], size: int) -> slice:
    """Return where a member's content lies, once its name, its way of storage and its own header are found right."""
    name, start = entry.orig_filename, entry.header_offset
    shown, parts = ascii(name[:80]), name.split("/")
    if not _NAME.fullmatch(name) or not parts[0] or ".." in parts:
        raise Refused(f"its zip member {shown} is named like a path that leaves the archive")
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
        raise Refused(f"its zip member {shown} is compressed or encrypted, which torch's never are")
    if not 0 <= start <= size - _LOCAL_HEADER.size:
        raise Damaged(f"the zip member {shown} lies outside of the file")
    file.seek(start)
    magic, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    begin = start + _LOCAL_HEADER.size + name_length + extra_length
    is_there = magic == b"PK\x03\x04" and begin + entry.file_size <= size
    if not is_there or file.read(name_length) not in (name.encode(), name.encode("cp437", "replace")):
        raise Damaged(f"the zip member {shown} is not where the archive's directory says")
    return slice(begin, begin + entry.file_size)
