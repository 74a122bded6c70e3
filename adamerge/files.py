"""Writing that leaves no half files, and hashes of what was written."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adamerge.errors import InputError


def save_json(content: Any, path: Path) -> None:
    """Write JSON, atomically; floats keep their shortest exact form."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it once the block has succeeded.

    The temporary file is synced to disk before the rename, and removed if the block fails, so that
    a crash leaves either the previous file or the complete new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
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


def combined_hash(hashes: Mapping[str, str]) -> str:
    """Hash named hashes into one, independent of their order."""
    return hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()
