"""A comparison: ways to merge one pool, with seeds, made one after another and scored side by side.

A row's result is a file; what is there is not made again. A row that fails is named, and ends no other.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from adamerge import __version__
from adamerge.commands.compare.published import Published, protocols_table, read_published, with_published
from adamerge.commands.compare.row import Spec, make_row, read_row
from adamerge.commands.compare.table import GOAL, START, compared
from adamerge.commands.run.compose import compose
from adamerge.commands.run.folder import held
from adamerge.commands.run.shipped import preset_content
from adamerge.errors import GuardError, InputError, did_you_mean
from adamerge.results.report import drawing
from adamerge.results.report.run_charts import rows_with_means
from adamerge.results.summary_table import table
from adamerge.system.files import atomic_path, save_json
from adamerge.system.reading import read_json_mapping

log = logging.getLogger(__name__)

_RESULT = "row.json"
_PRESET_KEYS = ("rows", "overrides", "published")


@dataclass(frozen=True)
class Plan:
    """A comparison.

    Attributes:
        rows: Name to what it is, see :mod:`adamerge.commands.compare.row`.
        overrides: Overrides of the configuration of ``adapt``, for all rows: pool, data, backbone.
        seeds: Every row is made with each.
        folder: Folder of results and tables.
        published: Figures to stand beside the rows, if the preset has any.
    """

    rows: Mapping[str, Spec]
    overrides: tuple[str, ...]
    seeds: tuple[int, ...]
    folder: Path
    published: Published | None = None


def plan_of(
    rows: Sequence[str], preset: str | None, overrides: Sequence[str], seeds: Sequence[int], folder: Path
) -> Plan:
    """Read the command's options; task arithmetic and the experts, to which measures refer, are always among the rows.

    Raises:
        InputError: If a row, the preset or an override is wrong.
    """
    of_preset, common, published = ({}, [], None) if preset is None else read_preset(preset)
    is_choice = any(row in of_preset for row in rows)
    named = {} if is_choice else dict(of_preset)
    named |= {row: of_preset.get(row, row) for row in rows}
    if not named:
        raise InputError("compare: give --rows ROW ..., or --preset NAME or FILE, such as --preset demo.")
    if len(set(seeds)) != len(seeds):
        raise InputError(f"--seeds: expected each once, found {' '.join(map(str, seeds))}.")
    for reference in (START, GOAL):
        named.setdefault(reference, reference)
    named[GOAL] = named.pop(GOAL)  # last in the tables
    specs = {}
    for name, text in named.items():
        try:
            specs[name] = spec = read_row(text)
        except InputError as error:
            raise InputError(f"{error}{'' if name in of_preset else did_you_mean(name, of_preset)}") from error
        try:
            if spec.overrides or len(specs) == 1:
                compose([*common, *overrides, *spec.overrides])
        except InputError as error:
            raise InputError(f"row {name!r}: {error}") from error
    folders = [_slug(name) for name in specs]
    for name, slug in zip(specs, folders, strict=True):
        if folders.count(slug) > 1:
            raise InputError(f"row {name!r}: another row has the same folder {slug!r}; rename one in a preset.")
    return Plan(specs, (*common, *overrides), tuple(seeds), folder.absolute(), published)


def run(plan: Plan, console: Console) -> dict[str, str]:
    """Make the rows that have no result yet, one after another, and write tables of all.

    Rows that do not adapt come first: they share images, heads and pool.

    Args:
        plan: What to compare.
        console: Where the table goes; progress is logged.

    Returns:
        What went wrong, by row and seed; run again to try those again.

    Raises:
        InputError: If the folder holds results of other options under a row's name, another process holds it, or
            nothing could be scored.
        SystemExit: If a signal stopped it; what is done is kept.
    """
    failed: dict[str, str] = {}
    with held(plan.folder, option="--out"):
        jobs = [(seed, name) for seed in plan.seeds for name in sorted(plan.rows, key=lambda n: plan.rows[n].adapts)]
        results = {job: result for job in jobs if (result := stored_result(plan, *job)) is not None}
        try:
            for number, (seed, name) in enumerate(jobs, 1):
                if (seed, name) in results:
                    continue
                label = f"[{number}/{len(jobs)}] seed {seed}  {name}"
                try:
                    result = make_row(plan.rows[name], plan.overrides, seed, folder_of(plan, seed, name))
                except Exception as error:  # of a user's rule too; a signal's SystemExit ends them all
                    reason = failed[f"{name}, seed {seed}"] = _reason(error)
                    log.debug("Where it failed:", exc_info=error)
                    log.info("%s: failed: %s", label, reason)
                else:
                    results[seed, name] = result
                    save_json({**_key(plan, seed, name), "result": result}, folder_of(plan, seed, name) / _RESULT)
                    log.info("%s: %.1f %%, %.1f s", label, 100 * result["mean"], result["seconds"])
        finally:
            if results:
                _write(plan, results, console)
    return failed


def _reason(error: Exception) -> str:
    """Return an error in one line, with its type unless it is adamerge's own."""
    text = " ".join(str(error).split())
    kind = type(error).__name__
    return text if text and isinstance(error, (InputError, GuardError, OSError, RuntimeError)) else f"{kind}: {text}"


def _write(plan: Plan, results: Mapping[tuple[int, str], Any], console: Console) -> None:
    """Write summary, tables and picture of the rows that are made."""
    content = compared(
        {name: [results[seed, name] for seed in plan.seeds if (seed, name) in results] for name in plan.rows}
    )
    if plan.published is not None:
        content = with_published(content, plan.published, {name: protocol_of(plan, name) for name in plan.rows})
    save_json(content, plan.folder / "summary.json")
    shown = table(content, content.get("title", ""))
    with atomic_path(plan.folder / "table.md") as temporary:
        notes = "" if plan.published is None else "\n" + protocols_table(content).markdown(code=(0,))
        temporary.write_text(shown.markdown(code=(0,)) + notes, encoding="utf-8")
    drawing.save_if_possible(rows_with_means(content), plan.folder / "comparison.png")
    console.print(shown.terminal(console.width))


def read(folder: Path) -> dict[str, Any] | None:
    """Return the ``summary.json`` of a comparison; None where no row could be made."""
    path = folder / "summary.json"
    return read_json_mapping(path) if path.is_file() else None


def _key(plan: Plan, seed: int, name: str) -> dict[str, Any]:
    """Return what a result depends on."""
    row = plan.rows[name].as_json()
    return {"format": 2, "version": __version__, "row": row, "overrides": list(plan.overrides), "seed": seed}


def stored_result(plan: Plan, seed: int, name: str) -> dict[str, Any] | None:
    """Return a row's result, or None where there is none.

    Raises:
        InputError: If it is the result of other options.
    """
    path = folder_of(plan, seed, name) / _RESULT
    if not path.is_file():
        return None
    try:
        content = read_json_mapping(path)
        result: dict[str, Any] = content.pop("result")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: no result of `adamerge compare`; remove the file to make the row again.") from error
    key = json.loads(json.dumps(_key(plan, seed, name)))
    changed = [option for option, value in key.items() if content.get(option) != value]
    if changed:
        raise InputError(
            f"{path}: made with another {changed[0]}: expected {key[changed[0]]}, found "
            f"{content.get(changed[0])}. Choose another --out, or remove its folder to make the row again."
        )
    return result


def folder_of(plan: Plan, seed: int, name: str) -> Path:
    """Return the folder of a row's files."""
    return plan.folder / f"seed_{seed}" / _slug(name)


def _slug(name: str) -> str:
    """Return a row's name as that of a folder."""
    return re.sub(r"[^\w.=+,-]+", "_", name).strip("_.")[:150] or "row"


def protocol_of(plan: Plan, name: str) -> str:
    """Return the protocol of a row of a plan, in words."""
    spec = plan.rows[name]
    config = compose([*plan.overrides, *spec.overrides])
    protocol = str(config.data.get("protocol") or "split")
    if config.data.get("adapt") not in (None, "test"):
        protocol = f"adapted on {config.data.adapt}, scored on all of test"
    if spec.adapts:
        batches = f"{config.data.get('batches_per_step') or 1} x {config.data.get('batch_size')}"
        protocol += f", {config.steps} steps of {batches} inputs a task"
    return protocol


def read_preset(preset: str) -> tuple[dict[str, str], list[str], Published | None]:
    """Read rows, overrides and what was published from a shipped preset or a yaml file.

    Raises:
        InputError: If there is no such preset, or it says something else.
    """
    path, content = preset_content("compare", preset)
    rows = content.get("rows") if isinstance(content, Mapping) else None
    overrides = content.get("overrides") or [] if isinstance(content, Mapping) else None
    if not isinstance(rows, Mapping) or not isinstance(overrides, list) or set(content) - set(_PRESET_KEYS):
        raise InputError(f"{path}: expected rows: {{name: row, ...}} and overrides: [...], found {content!r}.")
    section = content.get("published")
    published = None if section is None else read_published(section, rows, path)
    texts = {str(name): str(name if row is None else row) for name, row in rows.items()}
    return texts, [str(override) for override in overrides], published
