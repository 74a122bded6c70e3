"""The command ``adamerge compare``: many ways to merge one pool, with seeds, scored side by side.

Rows are made in other processes, see :mod:`adamerge.commands.compare.row_processes`. A row's result is a file; what is
there is not run again.
"""

import json
import logging
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from adamerge import __version__
from adamerge.commands.compare import row as compare_row
from adamerge.commands.compare.row_processes import RowProcesses
from adamerge.commands.compare.table import GOAL, START, compared, markdown, terminal
from adamerge.commands.run.compose import compose, preset_content
from adamerge.commands.run.folder import held
from adamerge.errors import GuardError, InputError
from adamerge.results.figures import save_comparison
from adamerge.system.files import atomic_path, save_json

log = logging.getLogger(__name__)

_RESULT = "row.json"
_PRESET_KEYS = ("rows", "overrides", "published")  # the last is read by `adamerge reproduce`


@dataclass(frozen=True)
class Plan:
    """A comparison.

    Attributes:
        rows: Name to what it is, see :mod:`adamerge.commands.compare.row`.
        overrides: Of the configuration of ``adapt``, for all rows: pool, data, backbone.
        seeds: Every row is made with each.
        folder: Of results and tables.
        jobs: Rows that are made at a time.
    """

    rows: Mapping[str, compare_row.Spec]
    overrides: tuple[str, ...]
    seeds: tuple[int, ...]
    folder: Path
    jobs: int = 1


def plan_of(
    rows: Sequence[str],
    preset: str | None,
    overrides: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    jobs: int = 1,
) -> Plan:
    """Read the command's options; task arithmetic and the experts, to which measures refer, are always among the rows.

    Raises:
        InputError: If a row, the preset or an override is wrong.
    """
    named, common = ({}, []) if preset is None else _read_preset(preset)
    named |= {row: row for row in rows}
    if not named:
        raise InputError("compare: give --rows ROW ..., or --preset NAME or FILE, such as --preset demo.")
    if len(set(seeds)) != len(seeds):
        raise InputError(f"--seeds: expected each once, found {' '.join(map(str, seeds))}.")
    for reference in (START, GOAL):
        named.setdefault(reference, reference)
    named[GOAL] = named.pop(GOAL)  # last in the tables
    specs = {}
    for name, text in named.items():
        specs[name] = compare_row.read_row(text)
        try:
            compose([*common, *overrides, *specs[name].overrides])
        except InputError as error:
            raise InputError(f"row {name!r}: {error}") from error
    folders = [_slug(name) for name in specs]
    for name, slug in zip(specs, folders, strict=True):
        if folders.count(slug) > 1:
            raise InputError(f"row {name!r}: another row has the same folder {slug!r}; rename one in a preset.")
    return Plan(specs, (*common, *overrides), tuple(seeds), folder, jobs)


def run(plan: Plan, console: Console, on_start: Callable[[], None] | None = None) -> dict[str, str]:
    """Make the rows that have no result yet, and write tables of all.

    Args:
        plan: What to compare.
        console: Where the table goes; progress is logged.
        on_start: Called first in each row's process, such as to set up logging; importable.

    Returns:
        What went wrong, by row and seed; run again to try those again.

    Raises:
        InputError: If the folder holds results of other options under a row's name, another process holds it, or
            nothing could be scored.
        Interrupted: If it was stopped; what is done is kept.
    """
    with held(plan.folder, option="--out"):
        return _run(plan, console, on_start)


def _run(plan: Plan, console: Console, on_start: Callable[[], None] | None) -> dict[str, str]:
    """Make the rows in a folder that no other process writes to."""
    jobs = [(seed, name) for seed in plan.seeds for name in plan.rows]
    done = {job: result for job in jobs if (result := _stored(plan, *job)) is not None}
    waiting = deque((number, *job) for number, job in enumerate(jobs, 1) if job not in done)
    running: dict[Future[dict[str, Any]], tuple[int, int, str]] = {}
    failed: dict[str, str] = {}
    try:
        with RowProcesses(plan.jobs, on_start) as processes:
            while waiting or running:
                while waiting and len(running) < plan.jobs:
                    number, seed, name = waiting.popleft()
                    future = processes.submit(plan.rows[name], plan.overrides, seed, _folder(plan, seed, name))
                    running[future] = number, seed, name
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    number, seed, name = running.pop(future)
                    label = f"[{number}/{len(jobs)}] seed {seed}  {name}"
                    try:
                        result = processes.result(future)
                    except Exception as error:  # of a user's rule too; a signal's SystemExit ends them all
                        reason = failed[f"{name}, seed {seed}"] = _reason(error)
                        log.debug("Where it failed:", exc_info=error)
                        log.info("%s: failed: %s", label, reason)
                        continue
                    done[seed, name] = result
                    save_json({**_key(plan, seed, name), "result": result}, _folder(plan, seed, name) / _RESULT)
                    facts = f"{100 * result['mean']:.1f} %, {result['seconds']:.1f} s"
                    log.info("%s: %s", label, facts)
    finally:
        if done:
            _write(plan, done, console)
    return failed


def _reason(error: Exception) -> str:
    """Return an error in one line, with its type where it is none of ours."""
    text = " ".join(str(error).split())
    kind = type(error).__name__
    return text if text and isinstance(error, (InputError, GuardError, OSError, RuntimeError)) else f"{kind}: {text}"


def _write(plan: Plan, done: Mapping[tuple[int, str], Any], console: Console) -> None:
    """Write summary, tables and picture of what is there."""
    results = {name: [done[seed, name] for seed in plan.seeds if (seed, name) in done] for name in plan.rows}
    content = compared(results)
    save_json(content, plan.folder / "summary.json")
    with atomic_path(plan.folder / "table.md") as temporary:
        temporary.write_text(markdown(content), encoding="utf-8")
    try:
        save_comparison(content, plan.folder / "comparison.png")
    except ImportError:
        log.warning("No picture: matplotlib is not installed (pip install 'adamerge[demo]').")
    console.print(terminal(content))


def read(folder: Path) -> dict[str, Any] | None:
    """Return the ``summary.json`` of a comparison; None where no row could be made."""
    path = folder / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _key(plan: Plan, seed: int, name: str) -> dict[str, Any]:
    """Return what a result depends on."""
    row = plan.rows[name].as_json()
    return {"format": 1, "version": __version__, "row": row, "overrides": list(plan.overrides), "seed": seed}


def _stored(plan: Plan, seed: int, name: str) -> dict[str, Any] | None:
    """Return a row's result, or None where there is none.

    Raises:
        InputError: If it is the result of other options.
    """
    path = _folder(plan, seed, name) / _RESULT
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        result: dict[str, Any] = content.pop("result")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: no result of `adamerge compare`; remove the file to make the row again.") from error
    own = json.loads(json.dumps(_key(plan, seed, name)))
    changed = [key for key, value in own.items() if content.get(key) != value]
    if changed:
        raise InputError(
            f"{path}: made with another {changed[0]}: expected {own[changed[0]]}, found "
            f"{content.get(changed[0])}. Choose another --out, or remove its folder to make the row again."
        )
    return result


def _folder(plan: Plan, seed: int, name: str) -> Path:
    return plan.folder.absolute() / f"seed_{seed}" / _slug(name)


def _slug(name: str) -> str:
    """Return a row's name as that of a folder."""
    return re.sub(r"[^\w.=+,-]+", "_", name).strip("_.")[:150] or "row"


def _read_preset(preset: str) -> tuple[dict[str, str], list[str]]:
    """Read rows and overrides from a shipped preset or a yaml file."""
    path, content = preset_content("compare", preset)
    rows = content.get("rows") if isinstance(content, Mapping) else None
    overrides = content.get("overrides") or [] if isinstance(content, Mapping) else None
    if not isinstance(rows, Mapping) or not isinstance(overrides, list) or set(content) - set(_PRESET_KEYS):
        raise InputError(f"{path}: expected rows: {{name: row, ...}} and overrides: [...], found {content!r}.")
    return {str(name): str(name if row is None else row) for name, row in rows.items()}, [str(o) for o in overrides]
