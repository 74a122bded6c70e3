"""Pool files: a base, its experts and what is known about them, in one yaml beside the checkpoints.

    base: base.safetensors
    key_prefix: visual.
    experts:
      cars: cars.safetensors
      dtd: {file: dtd.safetensors, task: textures, licence: MIT, sha256: 1f0c...}

Paths start from the folder of the file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from adamerge.errors import InputError, did_you_mean
from adamerge.files import sha256

_KEYS = ("base", "experts", "key_prefix", "storage", "dtype", "include", "exclude")
_FILE_KEYS = ("file", "task", "licence", "sha256")


@dataclass(frozen=True)
class PoolFile:
    """One checkpoint of a pool.

    Attributes:
        file: Where it is.
        task: That the expert was trained on; None for the base, or where it is the expert's name.
        licence: Of the weights, if known.
        sha256: Of the file, if known; checked before the pool is opened.
    """

    file: Path
    task: str | None = None
    licence: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class PoolFiles:
    """What a pool file says; the options are those of ``ExpertPool.from_files``."""

    base: PoolFile
    experts: Mapping[str, PoolFile]
    key_prefix: str | None = None
    storage: str = "auto"
    dtype: str | None = None
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None

    def verify(self) -> None:
        """Compare the files with the hashes that are given.

        Raises:
            FileNotFoundError: If a file is not there.
            InputError: If one has another hash.
        """
        for name, entry in {"base": self.base, **self.experts}.items():
            if not entry.file.is_file():
                siblings = [p.name for p in entry.file.parent.iterdir()] if entry.file.parent.is_dir() else []
                raise FileNotFoundError(
                    f"{entry.file}: no such file, named for {name}; paths in a pool file start from its own folder."
                    f"{did_you_mean(entry.file.name, siblings)}"
                )
            if entry.sha256 is not None and (found := sha256(entry.file)) != entry.sha256.lower():
                raise InputError(
                    f"{entry.file}: expected the SHA-256 {entry.sha256} that the pool gives for {name}, found {found}. "
                    "It is another file, or damaged: get it again, or correct the pool."
                )


def load_pool_file(path: Path) -> PoolFiles:
    """Read a pool file; the checkpoints are not opened.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it is no pool file, or has a key that nothing reads.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such pool file.")
    try:
        content: Any = OmegaConf.to_container(OmegaConf.create(path.read_text(encoding="utf-8")), resolve=True)
    except Exception as error:  # whatever a yaml parser, a decoder or an interpolation finds wrong
        raise InputError(f"{path}: expected a yaml file, found: {' '.join(str(error).split())}.") from error
    return pool_files(content, str(path), path.parent)


def pool_files(content: Any, where: str, folder: Path) -> PoolFiles:
    """Read the content of a pool file.

    Args:
        content: Plain containers.
        where: What messages call it.
        folder: That its paths start from.

    Raises:
        InputError: If it is no pool file's.
    """
    _check_keys(content, _KEYS, where)
    for key in ("base", "experts"):
        if not content.get(key):
            raise InputError(f"{where}: {key}: must be given; such as {key}: {_EXAMPLES[key]}.")
    if not isinstance(content["experts"], Mapping):
        raise InputError(f"{where}: experts: expected {_EXAMPLES['experts']}, found {content['experts']!r}.")
    for key in ("key_prefix", "storage", "dtype"):
        if not isinstance(content.get(key) or "", str):
            raise InputError(f"{where}: {key}: expected a text, found {content[key]!r}.")
    return PoolFiles(
        base=_entry(content["base"], f"{where}: base", folder),
        experts={str(n): _entry(e, f"{where}: experts.{n}", folder) for n, e in content["experts"].items()},
        key_prefix=content.get("key_prefix"),
        storage=content.get("storage") or "auto",
        dtype=content.get("dtype"),
        include=_globs(content.get("include"), f"{where}: include"),
        exclude=_globs(content.get("exclude"), f"{where}: exclude"),
    )


_EXAMPLES = {"base": "FILE", "experts": "{name: FILE, ...}"}


def _entry(found: Any, where: str, folder: Path) -> PoolFile:
    """Read a file's entry: a path, or a mapping with more."""
    if isinstance(found, str) and found:
        return PoolFile(folder / found)
    if isinstance(found, Mapping):
        _check_keys(found, _FILE_KEYS, where)
    if not isinstance(found, Mapping) or not found.get("file"):
        raise InputError(f"{where}: expected a checkpoint FILE, or {{file: FILE, ...}}, found {found!r}.")
    for key, value in found.items():
        if value is not None and not isinstance(value, str):
            raise InputError(f"{where}.{key}: expected a text, found {value!r}; put it in quotes.")
    return PoolFile(folder / found["file"], found.get("task"), found.get("licence"), found.get("sha256"))


def _check_keys(content: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(content, Mapping):
        raise InputError(f"{where}: expected a mapping with {', '.join(known)}, found {content!r}.")
    for key in content:
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}.{did_you_mean(str(key), known)} Known: {', '.join(known)}.")


def _globs(found: Any, where: str) -> tuple[str, ...] | None:
    if found is None:
        return None
    if not isinstance(found, list) or not all(isinstance(glob, str) for glob in found):
        raise InputError(f"{where}: expected a list of globs, found {found!r}; write ['GLOB'].")
    return tuple(found)
