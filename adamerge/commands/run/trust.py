"""Whose configuration a folder holds: a keyed hash in its last line says that a user with this key wrote it."""

import hashlib
import hmac
import logging
import os
import secrets
import stat
from pathlib import Path

log = logging.getLogger(__name__)

_MARK = b"# written by adamerge for the holder of its key: hmac-sha256 "
_USE = b"adamerge config.yaml\n"  # what the key is used for
_BYTES = 32


def key_file() -> Path | None:
    """Return where the key lies: ``adamerge/key`` in the user's folder of configurations; None without a home."""
    named = os.environ.get("XDG_CONFIG_HOME", "")
    try:
        home = Path(named) if os.path.isabs(named) else Path.home() / ".config"
    except RuntimeError:
        return None
    return home / "adamerge" / "key"


def signed(text: bytes) -> bytes:
    """Return the text of a yaml file with the keyed hash as its last line; without, where no key can be kept.

    The key is made on first need, readable by its user alone.
    """
    path = key_file()
    if path is None:
        return text
    try:
        key = _key(path) or _made(path)
    except OSError as error:
        log.info(
            "%s: no key can be kept there (%s), so that nothing will show who wrote this run.", path, error.strerror
        )
        return text
    text = text if text.endswith(b"\n") else text + b"\n"
    return text if key is None else text + _MARK + _hash(key, text) + b"\n"


def doubt(text: bytes) -> str | None:
    """Return why a yaml file is not taken for the user's own; None where its keyed hash says that it is."""
    body, mark, found = text.rpartition(_MARK)
    if not mark:
        return "nothing shows that you wrote it: it has no keyed hash"
    path = key_file()
    try:
        key = None if path is None else _key(path)
    except OSError:
        key = None
    if key is None:
        return f"nothing shows that you wrote it: there is no key of yours in {path or 'a home folder'}"
    if not hmac.compare_digest(_hash(key, body), found.strip()):
        return "its keyed hash is not yours, or the file has been edited since adamerge wrote it"
    return None


def _hash(key: bytes, text: bytes) -> bytes:
    return hmac.new(key, _USE + text, hashlib.sha256).hexdigest().encode()


def _key(path: Path) -> bytes | None:
    """Read the key; None where there is none, or others than its user may read or change it.

    Raises:
        OSError: If it cannot be read.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        facts = os.fstat(file)
        is_private = stat.S_ISREG(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & 0o077
        key = os.read(file, _BYTES + 1) if is_private else b""
    finally:
        os.close(file)
    if len(key) != _BYTES:
        log.warning("%s: expected %d bytes that its owner alone may read (mode 0600); it is not used.", path, _BYTES)
        return None
    return key


def _made(path: Path) -> bytes | None:
    """Make a key, or read the one that another process has just made; None where a file is there that is no key.

    Raises:
        OSError: If it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".key.{os.getpid()}.{secrets.token_hex(4)}")
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(file, secrets.token_bytes(_BYTES))
        os.fsync(file)
        os.link(temporary, path)  # whole, and by one process only
    except FileExistsError:
        pass
    finally:
        os.close(file)
        temporary.unlink()
    return _key(path)
