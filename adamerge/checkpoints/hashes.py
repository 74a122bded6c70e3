"""SHA-256 of large files, kept from run to run for as long as a file's size and times stay the same."""

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamerge.errors import InputError
from adamerge.system.files import save_json, sha256
from adamerge.system.reading import read_json

log = logging.getLogger(__name__)

_SETTLED = 2.0  # seconds


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, from the last time that it was read whole where it has not changed since.

    "Not changed" means: the same real path, inode, size, and times of change to the nanosecond. Hashes are kept in
    ``adamerge/hashes`` in the user's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``), left alone where that cannot
    be written to or is not known. What was changed within the last two seconds is not kept: it may change again within
    one tick.
    """
    real = path.resolve()
    entry, state = _entry(real), _state(real)
    if (kept := _read(entry, state)) is not None:
        return kept
    content_hash = sha256(real)
    if (
        entry is not None
        and _state(real) == state
        and time.time() - max(state["mtime_ns"], state["ctime_ns"]) / 1e9 > _SETTLED
    ):
        try:
            save_json({"path": str(real), **state, "sha256": content_hash}, entry)
        except OSError as error:
            log.debug("%s cannot be written (%s)", entry, error.strerror or error)
    return content_hash


def forget(path: Path) -> None:
    """Forget the hash of a file, or of every file in a folder, so that the next one is read from the disk."""
    with contextlib.suppress(OSError):
        for file in path.rglob("*") if path.is_dir() else (path,):
            if (entry := _entry(Path(os.path.realpath(file)))) is not None:
                entry.unlink(missing_ok=True)


def check_hash(where: object, name: str, expected: str | None, read_hash: Callable[[], str]) -> None:
    """Compare a checkpoint's hash, if a pool gives one, with that.

    Raises:
        InputError: If they differ.
    """
    if expected is not None and (actual := read_hash()) != expected.lower():
        raise InputError(
            f"{where}: expected the SHA-256 {expected} that the pool gives for {name}, found {actual}. "
            "It is another file, or damaged: get it again, or correct the pool."
        )


def _entry(real: Path) -> Path | None:
    """Return the file that keeps a file's hash; None for a user who has no home."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # no HOME, and no entry in the list of users, as in some containers
        return None
    return Path(home) / "adamerge" / "hashes" / f"{hashlib.sha256(os.fsencode(real)).hexdigest()}.json"


def _state(path: Path) -> dict[str, int]:
    status = path.stat()
    return {
        "size": status.st_size,
        "inode": status.st_ino,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
    }


def _read(entry: Path | None, state: dict[str, int]) -> str | None:
    """Return a kept hash; None where no hash is kept, or the file has changed."""
    if entry is None:
        return None
    try:
        content = read_json(entry)
        kept = str(content["sha256"])
        return kept if all(content[key] == value for key, value in state.items()) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def digest(content: Any) -> str:
    """Hash nested mappings and lists of texts, numbers and tensors; tensors by dtype, shape and bytes."""
    tensors: list[Tensor] = []

    def described(item: Any) -> Any:
        if isinstance(item, Tensor):
            tensors.append(item)
            return ["tensor", str(item.dtype), list(item.shape)]
        if isinstance(item, Mapping):
            return {str(key): described(item[key]) for key in sorted(item)}
        return [described(part) for part in item] if isinstance(item, (list, tuple)) else item

    result = hashlib.sha256(json.dumps(described(content)).encode())
    for tensor in tensors:
        result.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()
