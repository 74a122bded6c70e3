"""What a run was made with, as its last checkpoint or its export says, beside what its folder and files hold now."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from adamerge.callbacks.checkpoint_io import AtomicCheckpointIO
from adamerge.commands.run.folder import CONFIG_FILE, differing, last_checkpoint, plain
from adamerge.commands.run.stages import STAGE, fold_folder
from adamerge.errors import InputError, shorten
from adamerge.results.recipes import flat
from adamerge.system.reading import read_json_mapping

_BY_HASH = ("pool.base", "pool.experts.", "pool.file")  # whose content is compared: files may lie elsewhere now
_OF_BOTH_STAGES = ("pool.", "data.", "backbone.", "transform.", "encoder.", "batch_norm.", "seed")
_RECIPE = "merge.json"


@dataclass(frozen=True)
class RunRecord:
    """What a run was made with.

    Attributes:
        source: The file that says it.
        options: The run's options, plain; empty where the file does not say them.
        hashes: SHA-256 of base and experts by name.
        start: File and hash of the coefficients that it started from, if it started from any.
    """

    source: Path
    options: Mapping[str, Any]
    hashes: Mapping[str, str]
    start: Mapping[str, Any]


def record_of(folder: Path) -> RunRecord | None:
    """Read the record of a run or stage: its last checkpoint's, or first fold's, else its export's; None without any.

    Raises:
        InputError: If the checkpoint is damaged.
    """
    checkpoint, recipe = last_checkpoint(folder) or last_checkpoint(fold_folder(folder, 1)), folder / _RECIPE
    if checkpoint is not None:
        content = AtomicCheckpointIO().load_checkpoint(checkpoint, weights_only=True)
        options = dict(_mapping(content, "recipe"))
        return RunRecord(checkpoint, options, _mapping(content, "pool"), _mapping(content, "start"))
    if recipe.is_file():
        content = read_json_mapping(recipe)
        return RunRecord(recipe, _mapping(content, "config"), _mapping(content, "hashes"), _mapping(content, "start"))
    return None


def _mapping(content: Any, key: str) -> Mapping[str, Any]:
    value = content.get(key) if isinstance(content, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def check_config(config: DictConfig, folder: Path) -> None:
    """Refuse a configuration that is not the one that its run was begun with.

    Where base and experts lie may change; their content is compared by :func:`check_pool`.

    Args:
        config: What is stored in the folder of a run or stage, or given for it.
        folder: Where the run has left its record, and that of its first stage, if any.

    Raises:
        InputError: If an option has another value; the message names it.
    """
    record, is_stage = record_of(folder), False
    if record is None or not record.options:
        record, is_stage = record_of(folder / STAGE), True
    if record is None or not record.options:
        return
    then, now = flat(record.options), flat(plain(config))
    changed = [key for key in differing(plain(config), record.options) if not _is_place(key, then, now)]
    if is_stage:
        changed = [key for key in changed if key.startswith(_OF_BOTH_STAGES)]
    if not changed:
        return
    option = changed[0]
    others = f" So have {shorten(changed[1:])}." if len(changed) > 1 else ""
    raise InputError(
        f"{folder / CONFIG_FILE}: {option} has changed since the run was begun: {_shown(then, option)} then "
        f"({record.source.name}), {_shown(now, option)} now.{others} Write back what was there; with other options "
        f"start another run, and to start it from what this one has learned, init=FILE names its coefficients.json."
    )


def _is_place(option: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether an option says where a file lies whose content is compared."""
    files = [str(options.get(option)).endswith(".json") for options in (then, now)]
    return option.startswith(_BY_HASH) or (option == "init" and all(files))


def _shown(options: Mapping[str, Any], option: str) -> str:
    return repr(options[option])[:100] if option in options else "nothing"


def check_pool(hashes: Mapping[str, str], folder: Path) -> None:
    """Refuse base or experts whose content is not what a run was made with.

    Args:
        hashes: SHA-256 by name, of the files as they are now.
        folder: The run's.

    Raises:
        InputError: If one has changed; the message names its option.
    """
    record = record_of(folder)
    if record is None or not record.hashes:
        return
    if list(record.hashes) != list(hashes):
        then, now = (shorten([name for name in found if name != "base"]) for found in (record.hashes, hashes))
        raise InputError(f"pool.experts: the run in {folder} was made with {then}, found {now}. Name those it had.")
    changed = [name for name in hashes if record.hashes[name] != hashes[name]]
    if changed:
        name, options = changed[0], [name if name == "base" else f"experts.{name}" for name in changed]
        others = f" So have {shorten([f'pool.{option}' for option in options[1:]])}." if len(changed) > 1 else ""
        raise InputError(
            f"pool.{options[0]}: its content has changed since the run in {folder} was made: sha256 "
            f"{str(record.hashes[name])[:12]} then ({record.source.name}), {hashes[name][:12]} now.{others} Restore "
            "the file, or start another run."
        )


def check_start(start: Mapping[str, Any], folder: Path) -> None:
    """Refuse a file of coefficients, which a run started from, that is not what it was then.

    Args:
        start: Its ``file`` and ``sha256`` now; empty where the run starts from no file.
        folder: The run's.

    Raises:
        InputError: If its content has changed.
    """
    record = record_of(folder)
    if record is not None and start and record.start.get("sha256") not in (None, start["sha256"]):
        raise InputError(
            f"init: {start['file']} has changed since the run in {folder} was begun from it: sha256 "
            f"{str(record.start['sha256'])[:12]} then, {start['sha256'][:12]} now. Restore the file, or start another "
            "run."
        )
