"""Reading files of others: regular files only, no more of them than is sensible, and no bombs.

A folder may come from a stranger. What lies where a file is expected may be a pipe that never ends; a text may be
endless, nested deeper than any reader goes, or double with each line that refers to the one before.
"""

import codecs
import io
import itertools
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent

from adamerge.errors import InputError

MAX_JSON = 24 << 20  # bytes; a list of empty lists takes 20 times as many once it is read
MAX_TEXT = 4 << 20  # bytes of other texts
MAX_LINES = 128 << 20  # bytes of a text that is read line by line
MAX_YAML = 1 << 20  # bytes; yaml's reader takes seconds for as many
_TEXTS = frozenset({".json", ".jinja", ".model", ".tiktoken", ".txt", ".vocab"})
_TAGS = frozenset({"bool", "float", "int", "map", "null", "seq", "str"})
_MAX_NODES = 20_000  # of yaml, aliases counted as often as they stand for what they name
_MAX_DEPTH = 50
_MAX_LINE = 1 << 20  # bytes
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is ten times as fast


def open_regular(path: Path) -> io.BufferedReader:
    """Open a file to read its bytes; never waits for a pipe's other end, as opening it would.

    Raises:
        OSError: If it cannot be opened.
        InputError: If it is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        check_regular(path, os.fstat(descriptor))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(path: Path, status: os.stat_result | None = None) -> None:
    """Check that a path leads to a regular file.

    Args:
        path: Links are followed.
        status: Of the file, where it is known.

    Raises:
        OSError: If there is nothing, or it may not be looked at.
        InputError: If it is something else.
    """
    kind = stat.S_IFMT((status or path.stat()).st_mode)
    if kind != stat.S_IFREG:
        raise InputError(f"{path}: expected a file, found {_KINDS.get(kind, 'something else')}.")


def check_texts(folder: Path) -> None:
    """Check that a library can read the texts of a folder, such as a tokenizer's: regular files of up to 128 MB.

    Raises:
        OSError: If the folder cannot be read.
        InputError: If one is something else.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in _TEXTS and path.exists():
            check_regular(path)
            if path.stat().st_size > MAX_LINES:
                raise InputError(f"{path}: expected at most {MAX_LINES >> 20} MB, found more.")


def read_bytes(path: Path, limit: int = MAX_TEXT) -> bytes:
    """Read a file whole, up to a limit.

    Args:
        path: The file.
        limit: Bytes.

    Raises:
        OSError: If it cannot be read.
        InputError: If it is no regular file, or larger.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise InputError(f"{path}: expected at most {limit >> 20} MB, found more.")
    return content


def read_text(path: Path, limit: int = MAX_TEXT) -> str:
    """Read a text in UTF-8, its lines ended as in Unix; see :func:`read_bytes`.

    Raises:
        InputError: Also if it is no such text.
    """
    text = _decoded(read_bytes(path, limit), str(path))
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path, limit: int = MAX_LINES, longest: int = _MAX_LINE) -> Iterator[str]:
    """Yield the lines of a text in UTF-8, with their ends, each read when asked for; see :func:`read_bytes`.

    Args:
        path: The file; a mark of UTF-8 at its beginning is left out.
        limit: Bytes, of all lines.
        longest: Bytes of a line.

    Raises:
        OSError: If it cannot be read.
        InputError: If it is no regular file, no such text, or larger.
    """
    with open_regular(path) as file:
        for number in itertools.count(1):
            line = file.readline(longest + 1)
            limit -= len(line)
            if not line:
                return
            if limit < 0:
                raise InputError(f"{path}: expected less text. Make several files of it.")
            if len(line) > longest:
                raise InputError(
                    f"{path}: expected lines of up to {longest} bytes, found line {number} longer. Is it a text?"
                )
            if b"\r" in line.rstrip(b"\r\n"):
                raise InputError(
                    f"{path}, line {number}: expected lines that end as in Unix or Windows, found a bare CR."
                )
            yield _decoded(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, f"{path}, line {number}")


def _decoded(text: bytes, where: str) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: expected UTF-8, found the byte 0x{text[error.start]:02x}, which is none of it. Convert the "
            "file, such as with iconv -f latin1 -t utf-8."
        ) from error


def read_json(path: Path) -> Any:
    """Read a file of JSON; see :func:`read_bytes`.

    Raises:
        InputError: Also if it is not JSON.
    """
    content = read_bytes(path, MAX_JSON)
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}). Copy it again.") from error


def read_json_mapping(path: Path) -> dict[str, Any]:
    """Read a file of JSON that holds a mapping.

    Raises:
        OSError: If it cannot be read.
        InputError: If it holds anything else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping, found {type(content).__name__}. Copy it again.")
    return content


@contextmanager
def as_written(path: Path) -> Iterator[None]:
    """Refuse a record of adamerge's whose content is not of its kind: whatever the block, which uses it, stumbles over.

    Raises:
        InputError: If the block fails as code does on content of another kind.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(f"{path}: not as adamerge writes it ({reason}). Put a copy back.") from error


def read_yaml_text(path: Path) -> str:
    """Read a text of yaml that is safe to load: neither deep nor, once its aliases are followed, large.

    Raises:
        OSError: If it cannot be read.
        InputError: If it is not yaml, or not safe.
    """
    text = read_text(path, MAX_YAML)
    try:
        _check_events(text)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path}: not readable as yaml ({' '.join(str(error).split())}).") from error
    return text


def _check_events(text: str) -> None:
    """Count the nodes of a text as yaml's parser meets them; nothing is built.

    Raises:
        ValueError: If there are too many, too deep, one that holds itself, or one of Python's or another kind.
        yaml.YAMLError: If the text is not yaml.
    """
    sizes: dict[str, int] = {}
    pending: list[tuple[str | None, int]] = []  # of the collections that are open: their name, and the nodes before
    count = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"the alias *{event.anchor} names nothing that ends before it")
            count += sizes[event.anchor]
        elif isinstance(event, CollectionEndEvent):
            name, before = pending.pop()
            if name is not None:
                sizes[name] = count - before
        elif isinstance(event, NodeEvent):
            count += 1
            _check_tag(getattr(event, "tag", None))
            if isinstance(event, CollectionStartEvent):
                pending.append((event.anchor, count - 1))
            elif event.anchor is not None:
                sizes[event.anchor] = 1
        if count > _MAX_NODES or len(pending) > _MAX_DEPTH:
            raise ValueError(f"more than {_MAX_NODES} values, or nested deeper than {_MAX_DEPTH}")


def _check_tag(tag: str | None) -> None:
    """Refuse a tag of values that JSON has not, such as bytes and sets.

    Raises:
        ValueError: If it is one.
    """
    if tag not in (None, "!") and tag.removeprefix("tag:yaml.org,2002:") not in _TAGS:
        raise ValueError(f"the tag {tag[:100]!r}")
