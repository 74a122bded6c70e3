"""Writing that leaves no half files, and hashes of what was written."""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adamerge.errors import InputError
from adamerge.system.reading import check_regular, open_regular

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


def save_json(content: Any, path: Path) -> None:
    """Write JSON, atomically; floats keep their shortest exact form."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it once the block has succeeded.

    The temporary file is synced to disk before the rename, and removed if the block fails, so that
    a crash leaves either the previous file or the complete new one.

    Raises:
        OSError: If the disk is full or the file cannot be written, with the final name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:  # a failing write or sync does not say which file it was
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` that takes its place once the block has succeeded.

    Its files are synced to disk before the rename; the folder is removed if the block fails.

    Raises:
        OSError: If a file cannot be written, or ``path`` is a folder with files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in (*temporary.rglob("*"), temporary):
            _sync(file)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    """Let a file or folder reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """Return a name beside ``path`` to write it under, which no other process takes, on other machines neither."""
    return path.with_name(f".{path.name}.{os.getpid()}{secrets.randbelow(10**9):09d}.tmp")


def remove_temporaries(folder: Path) -> None:
    """Remove what killed processes left behind in a folder that no other process writes to."""
    for path in list(folder.rglob(".*.tmp")):
        if _TEMPORARY.fullmatch(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def open_own(path: Path, flags: int = os.O_RDWR) -> int:
    """Open a file of a folder that may be a stranger's, to write to it, and return its descriptor; made if needed.

    Raises:
        OSError: If it cannot be opened.
        InputError: If it is a link, which could lead to any file, or no regular file.
    """
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise InputError(f"{path}: expected a file to write to, found a link. Remove it.") from error
        if error.errno in (errno.ENXIO, errno.EISDIR):
            raise InputError(f"{path}: expected a file to write to, found something else. Remove it.") from error
        raise
    try:
        check_regular(path, os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check_inside(folder: Path) -> None:
    """Check that no link in a folder leads out of it, so that what is written below stays there.

    Raises:
        InputError: If one does.
    """
    home = folder.resolve()
    for parent, folders, files in os.walk(folder):  # does not follow links
        for path in (Path(parent, name) for name in (*folders, *files)):
            if path.is_symlink() and not path.resolve().is_relative_to(home):
                raise InputError(
                    f"{path}: a link that leads out of {folder}, where files are to be written. Remove it, or put what "
                    "it leads to in its place."
                )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def ensure_writable(folder: Path) -> None:
    """Create a folder and check that files can be written there.

    Raises:
        InputError: If the folder cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".adamerge.{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"Output folder {folder} is not writable ({error.strerror or error}). "
            "Choose another one or change its permissions."
        ) from error


def check_space(path: Path, needed: int) -> None:
    """Refuse to begin what the disk has no place for.

    Args:
        path: The file or folder to be written; it need not exist.
        needed: Bytes that it will take.

    Raises:
        OSError: If fewer are free, as if the disk had become full.
    """
    place = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        found = f"it takes {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {found}", str(path))


def combined_hash(hashes: Mapping[str, str]) -> str:
    """Hash named hashes into one, independent of their order."""
    return hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()
