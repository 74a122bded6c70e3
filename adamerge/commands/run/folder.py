"""A run's folder: what lies where, and whether a run may start, or go on, in it."""

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from adamerge.commands.run import imports, trust
from adamerge.commands.run.stages import STAGE, START, fold_folder
from adamerge.errors import InputError
from adamerge.results.recipes import PLACES, flat
from adamerge.system.files import atomic_path, check_inside, ensure_writable, open_own, remove_temporaries
from adamerge.system.reading import read_yaml_text

log = logging.getLogger(__name__)

LOCK = ".lock"
CONFIG_FILE = "config.yaml"
LAST = Path("checkpoints") / "last.ckpt"
START_MERGE = Path("start") / "merged.safetensors"  # the merge of the rule that a run starts from
_LOGGERS_OF_FILES = ("lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.loggers.TensorBoardLogger")
LAST_GOOD = "last_good.json"  # coefficients before a step that was not finite


@contextlib.contextmanager
def held(folder: Path, *, unused: bool = False, option: str = "run_dir") -> Iterator[None]:
    """Lock a run's folder for this process, and remove files that a killed one left half-written there.

    A record lock on a file in the folder, which the kernel releases when this process ends, however it ends. Unlike
    ``flock``'s it is not inherited by the processes that load data, which outlive a killed run by seconds, and it works
    on NFS. For the first of a run's processes, and not for use twice in one.

    Args:
        folder: Made if needed.
        unused: Whether it must not hold a run already, see :func:`check_unused`.
        option: What the user names the folder with, for the message.

    Raises:
        InputError: If the folder cannot be written to, has links that lead out of it, another process holds it, or it
            is used.
    """
    ensure_writable(folder)
    check_inside(folder)
    path = folder / LOCK
    file = _locked(path, option)
    try:
        if unused:
            check_unused(folder)
        remove_temporaries(folder)
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock is released with the file
        os.close(file)


def _locked(path: Path, option: str) -> int:
    """Open and lock a file; return its descriptor."""
    while True:
        file = open_own(path)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(file, 200).decode(errors="replace").strip()
            os.close(file)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise InputError(
                    f"{path.parent} is in use by another run ({holder or 'just started'}). Wait for it or stop it, or "
                    f"choose another {option}."
                ) from error
            log.warning("%s cannot be locked (%s): start no second run there.", path.parent, error.strerror)
            return open_own(path)
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(file).st_ino == path.stat().st_ino:
                os.ftruncate(file, 0)
                os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return file
        os.close(file)  # its holder has just ended and removed it


def save_config(config: DictConfig, path: Path) -> None:
    """Write the resolved configuration, atomically, and in its last line that this user wrote it."""
    text = OmegaConf.to_yaml(config, resolve=True).encode()
    with atomic_path(path) as temporary:
        temporary.write_bytes(trust.signed(text))


def load_config(folder: Path, *, trust_code: bool = False) -> DictConfig:
    """Read a run's configuration, to build what it names; the folder may have moved since.

    Relative paths in it start from the folder that the run was launched in, so this process moves there.

    Args:
        folder: The run's, absolute.
        trust_code: Whether it may import names beyond the list though nothing shows that this user wrote it.

    Raises:
        InputError: If the folder is not a run's, or its configuration imports what it may not.
    """
    path = folder / CONFIG_FILE
    config, doubt = _read(folder)
    if doubt is not None and not trust_code:
        _check_strangers(config, path, doubt)
    imports.announce(config)
    return _moved(config, folder)


def _check_strangers(config: DictConfig, path: Path, why: str) -> None:
    """Refuse names beyond the list, and options that let a run write elsewhere than into its folder.

    Loggers get that folder as ``save_dir``.

    Raises:
        InputError: If there are such names, or a logger is a service's, or one or a cache names a path.
    """
    imports.check_listed(config, str(path), why)
    for option, value in flat(config).items():
        head, _, last = option.rpartition(".")
        is_place = isinstance(value, str) and ("/" in value or value == "..")
        if head == "backbone" and last == "_args_":  # among which a cache may be
            is_wrong = True
        elif last in ("head_cache", "teacher_cache"):
            is_wrong = value not in (None, False, "off", "auto")
        elif not head.startswith("logger.") or last == "save_dir":
            is_wrong = False
        else:
            is_wrong = value not in _LOGGERS_OF_FILES if last == "_target_" else is_place or last == "_args_"
        if is_wrong:
            raise InputError(
                f"{path}: {option}: {str(value)[:100]!r} may write elsewhere than into the run's folder, and {why}. "
                f"Read the file; if you trust it, say {imports.TRUST}."
            )


def look_at_config(folder: Path) -> DictConfig:
    """Read a run's configuration as :func:`load_config` does, to look at: nothing that it names may be built."""
    return _moved(_read(folder)[0], folder)


def resume_command(folder: Path) -> str:
    """Return the command that goes on with a run, with what it needs on this machine."""
    path, flag = folder / CONFIG_FILE, ""
    if path.is_file():
        config, doubt = _read(folder)
        try:
            if doubt is not None:
                _check_strangers(config, path, doubt)
        except InputError:
            flag = f" {imports.TRUST}"
    return f"adamerge adapt resume={folder}{flag}"


def _read(folder: Path) -> tuple[DictConfig, str | None]:
    """Return a run's configuration as it stands in its file, and why it may be another's; None if it is not.

    Raises:
        InputError: If the folder is not a run's.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        remedy = "Name a folder that `adamerge adapt` made."
        if (merged := folder / "merged.safetensors").is_file() and (folder / "merge.json").is_file():
            remedy = (
                f"`adamerge merge` made it. To score it on the tasks of a run: adamerge evaluate RUN_DIR --checkpoint "
                f"{merged}; or beside others: adamerge compare --rows RULE --out DIR."
            )
        raise InputError(f"{folder}: not a run folder: it has no {CONFIG_FILE}. {remedy}")
    text = read_yaml_text(path)
    return _parsed(text, path), trust.doubt(text.encode())


def _moved(config: DictConfig, folder: Path) -> DictConfig:
    """Return a configuration with the folder where its run is now, and move to where the run was launched."""
    config.run_dir = str(folder)
    for parent in (folder, folder.parent):  # the run's own, or that of the run whose stage it is
        if OmegaConf.select(config, "start.merged") and (parent / START_MERGE).is_file():
            config.pool.base = str(parent / START_MERGE)
            break
    go_to(config.get("cwd"))
    loggers = config.get("logger")
    for logger in loggers.values() if isinstance(loggers, DictConfig) else ():
        if isinstance(logger, DictConfig) and "save_dir" in logger:
            logger.save_dir = str(folder)
    return config


def go_to(folder: Any) -> None:
    """Move to where a run was launched, if that is a folder here; it may be a stranger's: nothing is imported there."""
    if isinstance(folder, str) and Path(folder).is_dir():
        sys.path[:] = [os.path.abspath(entry) for entry in sys.path]  # "", of a notebook, would be that folder then
        os.chdir(folder)


def _parsed(text: str, path: Path) -> DictConfig:
    """Read a configuration that :func:`save_config` wrote, in which every interpolation is resolved.

    Raises:
        InputError: If it is something else.
    """
    if "${" in text:  # nested ones double the text with each
        raise InputError(f"{path}: expected values, found an interpolation, ${{...}}, which no run writes there.")
    try:
        config = OmegaConf.create(text)
    except Exception as error:  # whatever a yaml parser or OmegaConf finds wrong
        raise InputError(f"{path}: not a run's configuration: {' '.join(str(error).split())[:200]}.") from error
    if not isinstance(config, DictConfig):
        raise InputError(f"{path}: not a run's configuration: expected a mapping, found a list.")
    return config


def check_unused(folder: Path) -> None:
    """Refuse to start in the folder of another run, whose files would mix with the new ones.

    Raises:
        InputError: If the folder holds a run.
    """
    files = [name for name in (CONFIG_FILE, "merged.safetensors", str(LAST)) if (folder / name).exists()]
    if files:
        raise InputError(
            f"{folder} holds a run already ({files[0]}). Choose another run_dir, or go on with it: resume={folder}."
        )


def is_of_job(folder: Path, job: str | None) -> bool:
    """Whether a folder holds the run of a scheduler's job."""
    path = folder / CONFIG_FILE
    return job is not None and path.is_file() and bool(_parsed(read_yaml_text(path), path).get("job") == job)


def remove_unstarted(folder: Path) -> None:
    """Remove the folder of a run that failed before its first step; a folder with anything else in it is left alone."""
    replaceable = {folder / "adapt.log", folder / LOCK, folder / CONFIG_FILE, folder / STAGE / CONFIG_FILE}
    replaceable.add(folder / START_MERGE)
    if any(path.is_file() for path in folder.rglob("*") if path not in replaceable):
        return
    shutil.rmtree(folder, ignore_errors=True)
    parents = folder.absolute().parents
    if len(parents) > 1 and parents[1].name == "runs":  # runs/<name>/<time>: its parents go too, where empty
        for path in parents[:2]:
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()


def differing(config: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """Return the dotted options in which two plain configurations of one run differ, leaving out where it runs."""
    first, second = flat(config), flat(stored)
    keys = [key for key in {**first, **second} if not key.startswith(PLACES)]
    return sorted(key for key in keys if first.get(key) != second.get(key))


def is_started(folder: Path) -> bool:
    """Whether a run has saved something in its folder that it can go on from."""
    checkpoints = (last_checkpoint(path) for path in (folder, folder / STAGE, fold_folder(folder, 1)))
    return any(path is not None for path in checkpoints) or (folder / START).is_file()


def last_checkpoint(folder: Path) -> Path | None:
    """Return the latest checkpoint of a run or stage, its own or what Lightning wrote before a requeue; or None."""
    checkpoints = [path for path in (folder / LAST, *folder.glob("hpc_ckpt_*.ckpt")) if path.is_file()]
    return max(checkpoints, key=lambda path: path.stat().st_mtime, default=None)


def plain(config: DictConfig) -> dict[str, Any]:
    """Return the resolved configuration as plain containers."""
    content = OmegaConf.to_container(config, resolve=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}
