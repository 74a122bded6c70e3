"""Records of texts in files: JSON lines, JSON, CSV, plain lines and Parquet."""

import csv
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from adamerge.errors import InputError

_LONGEST = 2**24  # characters of a line: what is longer is no text but a file of another kind
_PARQUET = "reading Parquet needs the package pyarrow: pip install 'adamerge[texts]'."

Record = Mapping[str, Any]


def read_records(path: Path) -> Iterator[tuple[int, Record]]:
    """Yield the records of a file, one after another, with the numbers of their lines (Parquet: of their rows) from 1.

    Args:
        path: ``.jsonl``, ``.json`` (a list, or JSON lines), ``.csv``, ``.tsv``, ``.txt`` (each line that is not
            empty is a record with the field ``text``) or ``.parquet``. Texts are UTF-8.

    Raises:
        InputError: If the file is not there, of another kind or encoding, or not what its name says.
    """
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise InputError(f"{path}: expected one of {', '.join(_READERS)}, found {suffix or 'no ending'}.")
    if not path.is_file():
        found = "a folder: name a file in it" if path.is_dir() else "nothing there: check the path"
        raise InputError(f"{path}: expected a file of texts, found {found}.")
    try:
        yield from _READERS[suffix](path)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InputError(
            f"{path}: expected UTF-8, found the byte 0x{byte:02x}, which is none of it. Convert the file, such as with "
            "iconv -f latin1 -t utf-8."
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _lines(path: Path, file: TextIO) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not empty, and their numbers."""
    for number in itertools.count(1):
        line = file.readline(_LONGEST)
        if not line:
            return
        if len(line) == _LONGEST:
            raise InputError(f"{path}, line {number}: longer than {_LONGEST} characters. Is it a file of texts?")
        if line.strip():
            yield number, line.rstrip("\r\n")


def _open(path: Path) -> TextIO:
    return path.open(encoding="utf-8-sig", newline="")  # some programs begin a file with a mark


def _json_lines(path: Path) -> Iterator[tuple[int, Record]]:
    with _open(path) as file:
        for number, line in _lines(path, file):
            yield number, _record(_parsed(line, f"{path}, line {number}"), f"{path}, line {number}")


def _json(path: Path) -> Iterator[tuple[int, Record]]:
    with _open(path) as file:
        first = next(_lines(path, file), (1, ""))[1].lstrip()
        if not first.startswith("["):
            yield from _json_lines(path)
            return
        file.seek(0)
        content = _parsed(file.read(), str(path))
    yield from ((number, _record(item, f"{path}, item {number}")) for number, item in enumerate(content, 1))


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}).") from error


def _record(item: Any, where: str) -> Record:
    if not isinstance(item, dict):
        raise InputError(f'{where}: expected an object such as {{"prompt": ".."}}, found {type(item).__name__}.')
    return item


def _delimited(path: Path, delimiter: str) -> Iterator[tuple[int, Record]]:
    limit = csv.field_size_limit(_LONGEST)
    try:
        with _open(path) as file:
            rows = csv.reader(file, delimiter=delimiter, strict=True)
            names = next(rows, [])
            for row in filter(None, rows):
                if len(row) != len(names):
                    raise InputError(
                        f"{path}, line {rows.line_num}: expected {len(names)} fields as in the first line, found "
                        f"{len(row)}. Are texts with commas or line breaks in quotes?"
                    )
                yield rows.line_num, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}: not a table with {delimiter!r} between fields ({error}).") from error
    finally:
        csv.field_size_limit(limit)


def _plain(path: Path) -> Iterator[tuple[int, Record]]:
    with _open(path) as file:
        yield from ((number, {"text": line}) for number, line in _lines(path, file))


def _parquet(path: Path) -> Iterator[tuple[int, Record]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InputError(f"{path}: {_PARQUET}") from error
    try:
        with ParquetFile(path) as file:
            records = itertools.chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(1024))
            yield from enumerate(records, 1)
    except ArrowException as error:
        raise InputError(f"{path}: not a Parquet file ({' '.join(str(error).split())}).") from error


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Record]]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": lambda path: _delimited(path, ","),
    ".tsv": lambda path: _delimited(path, "\t"),
    ".txt": _plain,
    ".parquet": _parquet,
}
