"""Records of texts in files: JSON lines, JSON, CSV, plain lines and Parquet."""

import csv
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from adamerge.errors import InputError
from adamerge.system.reading import check_regular, read_lines

_LARGEST = 2**30  # bytes of a file, whose records are kept in memory
_LONGEST = 2**24  # bytes of a line: what is longer is no text but a file of another kind
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
    if not path.exists() or path.is_dir():
        found = "a folder: name a file in it" if path.is_dir() else "nothing there: check the path"
        raise InputError(f"{path}: expected a file of texts, found {found}.")
    try:
        check_regular(path)
        yield from _READERS[suffix](path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not empty, and their numbers."""
    lines = enumerate(read_lines(path, _LARGEST, _LONGEST), 1)
    return ((number, line.rstrip("\r\n")) for number, line in lines if line.strip())


def _json_lines(path: Path) -> Iterator[tuple[int, Record]]:
    for number, line in _lines(path):
        yield number, _record(_parsed(line, f"{path}, line {number}"), f"{path}, line {number}")


def _json(path: Path) -> Iterator[tuple[int, Record]]:
    text = "".join(read_lines(path, _LARGEST, _LARGEST))
    if not text.lstrip().startswith("["):
        yield from _json_lines(path)
        return
    content = _parsed(text, str(path))
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
        rows = csv.reader(read_lines(path, _LARGEST, _LONGEST), delimiter=delimiter, strict=True)
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
    return ((number, {"text": line}) for number, line in _lines(path))


def _parquet(path: Path) -> Iterator[tuple[int, Record]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InputError(f"{path}: {_PARQUET}") from error
    try:
        with ParquetFile(path) as file:
            facts = file.metadata
            size = sum(facts.row_group(n).total_byte_size for n in range(facts.num_row_groups))
            if max(size, facts.num_rows * facts.num_columns) > _LARGEST:
                raise InputError(f"{path}: expected at most {_LARGEST >> 20} MB, found more once it is unpacked.")
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
