"""``reproduce``: a published table's rows, made here, beside the published figures.

A preset of ``adamerge compare`` with a section ``published`` says what was published; its rows are made as those of any
comparison, so that an interrupted reproduction goes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from omegaconf import DictConfig
from rich.console import Console

from adamerge.commands.compare import plan as comparison
from adamerge.commands.data import print_how_to_get
from adamerge.commands.run.check import check
from adamerge.commands.run.compose import compose
from adamerge.commands.run.shipped import preset_content
from adamerge.commands.terminal import err, escape, json_option, out, print_json, report
from adamerge.data.benchmarks import checks
from adamerge.errors import InputError, check_keys, did_you_mean
from adamerge.results.evaluation import starred
from adamerge.results.table import Table
from adamerge.system import progress
from adamerge.system.files import atomic_path, save_json

JSON, MARKDOWN = "reproduction.json", "reproduction.md"
_TASK = "adamerge.data.benchmarks.task"
_KEYS = ("title", "source", "protocol", "pool", "rows")
_ROW_KEYS = ("mean", "tasks", "source", "protocol")


@dataclass(frozen=True)
class Published:
    """What was published of a table.

    Attributes:
        title: Of the table.
        rows: By the names of the preset's rows: ``mean`` and ``tasks`` (by task, as far as known) in percent,
            ``source`` (where it was read) and ``protocol`` (how it was obtained, as far as known).
        pool: The checkpoints that it was made with, and how to get them.
    """

    title: str
    rows: Mapping[str, Mapping[str, Any]]
    pool: str


@click.command(options_metavar="[OPTIONS] [-- OVERRIDES...]")
@click.argument("preset")
@click.option("--check", "only_check", is_flag=True, help="Say what is missing, and how to get it; make nothing.")
@click.option("--seed", "seeds", type=int, multiple=True, default=(0,), show_default=True, help="Repeat for several.")
@click.option("--out", "folder", type=click.Path(path_type=Path), help="Folder; go on in it.  [runs/reproduce/PRESET]")
@json_option
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def reproduce(
    preset: str,
    only_check: bool,
    seeds: tuple[int, ...],
    folder: Path | None,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Make the rows of a published table and print them beside the published figures; run it again to go on.

    \b
    adamerge reproduce table1 --check                       what is missing, and how to get it
    adamerge reproduce table1_hub                           ViT-B/32, 8 tasks, with the Hub's experts
    adamerge reproduce table1 -- pool=my_b32 data.root=/datasets trainer=gpu

    PRESET is a shipped one (docs/reproduce.md), or a yaml file of rows with a section `published`. OVERRIDES are those
    of `adamerge adapt`, for all rows.
    """  # noqa: D301
    published = read_published(preset)
    folder = folder or Path("runs") / "reproduce" / Path(preset).stem
    try:
        plan = comparison.plan_of((), preset, overrides, seeds, folder)
    except InputError as error:
        report([str(error)], lambda: _explain(published))
        raise
    report(problems_of(plan, published), lambda: _explain(published, missing_data(plan)))
    if only_check:
        out.print(f"{published.title}: {len(plan.rows)} rows can be made.", highlight=False)
        return
    console = Console(quiet=True) if as_json or progress.is_quiet() else out
    failed = comparison.run(plan, console)
    summary = comparison.read(plan.folder)
    content: dict[str, Any] = {"rows": {}} if summary is None else reproduced(summary, published, settings_of(plan))
    if summary is not None:
        save_json(content, plan.folder / JSON)
        with atomic_path(plan.folder / MARKDOWN) as temporary:
            temporary.write_text(markdown(content), encoding="utf-8")
        console.print(table(content).terminal())
    if as_json:
        print_json({**content, "failed": failed})
    report([f"{row}: {message}" for row, message in failed.items()])
    if not as_json:
        click.echo(str(folder))


def _explain(published: Published, missing: Sequence[tuple[str, Path]] = ()) -> None:
    """Say how to get what a table needs: data sets by name and folder, and its checkpoints."""
    for name, root in missing:
        print_how_to_get(name, root, err)
    err.print(f"\nThe table was made with: {escape(published.pool)}")


def read_published(preset: str) -> Published:
    """Read what a preset says was published.

    Raises:
        InputError: If there is no such preset, or it says nothing, or something else.
    """
    path, content = preset_content("compare", preset)
    section = content.get("published") if isinstance(content, Mapping) else None
    if section is None:
        raise InputError(f"{path}: expected a section published: with the figures to compare with, found none.")
    where = f"{path}: published"
    check_keys(section, _KEYS, where)
    for key in _KEYS:
        if not section.get(key):
            raise InputError(f"{where}.{key}: must be given.")
    rows = content.get("rows") or {}
    for mapping, name in ((rows, f"{path}: rows"), (section["rows"], f"{where}.rows")):
        if not isinstance(mapping, Mapping):
            raise InputError(f"{name}: expected a mapping from row to what it is, found {mapping!r}.")
    for name in section["rows"]:
        if name not in rows:
            raise InputError(
                f"{where}.rows: {name!r} is no row of the preset.{did_you_mean(str(name), map(str, rows))}"
            )
    figures = {str(name): _figures(entry, f"{where}.rows.{name}", section) for name, entry in section["rows"].items()}
    return Published(str(section["title"]), figures, str(section["pool"]))


def _figures(entry: Any, where: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """Check what was published of a row, and put in source and protocol of the table where it has none."""
    check_keys(entry, _ROW_KEYS, where)
    tasks = entry.get("tasks") or {}
    if not isinstance(tasks, Mapping):
        raise InputError(f"{where}.tasks: expected a mapping from task to percent, found {tasks!r}.")
    for name, value in {"mean": entry.get("mean"), **tasks}.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 100:
            raise InputError(f"{where}: {name}: expected an accuracy in percent, found {value!r}.")
    texts = {key: str(entry.get(key) or section[key]) for key in ("source", "protocol")}
    return {"mean": float(entry["mean"]), "tasks": {str(task): float(v) for task, v in tasks.items()}, **texts}


def problems_of(plan: comparison.Plan, published: Published) -> list[str]:
    """Return everything that a plan's rows lack, before any is made: pool, data, options.

    Rows are checked as ``adamerge check`` would; what several have wrong is said once.
    """
    problems: list[str] = []
    for overrides in [(), *(spec.overrides for spec in plan.rows.values() if spec.adapts)]:
        config = compose([*plan.overrides, *overrides])
        config.run_dir = str(plan.folder / "run")
        problems = check(config)
        if problems:
            break  # pool and data are the same for all rows
    tasks = compose(plan.overrides).data.get("tasks") or ()  # a data set of another kind names its own
    return [*dict.fromkeys(problems), *(_unknown_tasks(published.rows, list(map(str, tasks))) if tasks else [])]


def missing_data(plan: comparison.Plan) -> list[tuple[str, Path]]:
    """Return the field's data sets of a plan's tasks that are not there or not complete, each with its folder."""
    missing = []
    for node in (compose(plan.overrides).data.get("tasks") or {}).values():
        if isinstance(node, DictConfig) and node.get("_target_") == _TASK:
            root = Path(str(node.root)).expanduser().absolute()
            if checks.check(str(node.name), root, 0).state != "complete":
                missing.append((str(node.name), root))
    return missing


def settings_of(plan: comparison.Plan) -> dict[str, str]:
    """Return the protocol of each row of a plan, in words."""
    settings = {}
    for name, spec in plan.rows.items():
        config = compose([*plan.overrides, *spec.overrides])
        data = config.data
        protocol = str(data.get("protocol") or "split")
        if data.get("adapt") not in (None, "test"):
            protocol = f"adapted on {data.adapt}, scored on all of test"
        if spec.adapts:
            batches = f"{data.get('batches_per_step') or 1} x {data.get('batch_size')}"
            protocol += f", {config.steps} steps of {batches} images a task"
        settings[name] = protocol
    return settings


def reproduced(summary: Mapping[str, Any], published: Published, settings: Mapping[str, str]) -> dict[str, Any]:
    """Put figures beside those that were published; all in percent.

    Args:
        summary: Content of a comparison's ``summary.json``.
        published: What was published.
        settings: Protocol of each row, in words.

    Returns:
        ``rows`` by name: ``mean`` and ``tasks`` here, ``published``, ``difference`` (of the means; None where a figure
        is missing), ``protocol``, ``published_protocol``, ``source``, ``uses_labels`` and ``seeds``.

    Raises:
        InputError: If a published figure is of a task that was not scored.
    """
    scored = {name: figures for name, figures in published.rows.items() if name in summary["rows"]}
    if unknown := _unknown_tasks(scored, summary["tasks"]):
        raise InputError(unknown[0])
    rows: dict[str, Any] = {}
    for name, row in summary["rows"].items():
        figures = published.rows.get(name)
        mean = 100 * row["mean"]
        rows[name] = {
            "mean": mean,
            "tasks": {task: 100 * value for task, value in row["per_task"].items()},
            "published": figures and {"mean": figures["mean"], "tasks": figures["tasks"]},
            "difference": figures and mean - figures["mean"],
            "protocol": settings.get(name, ""),
            "published_protocol": figures["protocol"] if figures else "",
            "source": figures["source"] if figures else "",
            "uses_labels": row["uses_labels"],
            "seeds": row["seeds"],
        }
    return {"format": 1, "title": published.title, "pool": published.pool, "tasks": summary["tasks"], "rows": rows}


def _unknown_tasks(rows: Mapping[str, Mapping[str, Any]], tasks: Sequence[str]) -> list[str]:
    """Say which published figures are of tasks that are not among these."""
    return [
        f"published.rows.{name}.tasks: {task!r} is no task of the data.{did_you_mean(task, tasks)}"
        for name, figures in rows.items()
        for task in figures["tasks"]
        if task not in tasks
    ]


def markdown(content: Mapping[str, Any]) -> str:
    """Return a reproduction as Markdown: here (published), by task and mean, and how each was obtained."""
    tasks = content["tasks"]
    accuracies, notes = [], []
    for name, row in content["rows"].items():
        own = row["published"] or {"mean": None, "tasks": {}}
        cells = [_both(row["tasks"][task], own["tasks"].get(task)) for task in tasks]
        accuracies.append([name, *cells, _both(row["mean"], own["mean"]), _signed(row["difference"])])
        notes.append([name, row["protocol"], row["published_protocol"] or "-", row["source"] or "-"])
    marks = starred(content["rows"])
    tables = [
        Table(["row", *tasks, "mean", "difference"], accuracies, starred=marks),
        Table(["row", "protocol here", "protocol published", "source"], notes, starred=marks),
    ]
    return (
        f"# {content['title']}\n\nAccuracy in %: measured here (published). * uses labels.\n\n"
        + "\n".join(table.markdown(code=(0,)) for table in tables)
        + f"\nPublished figures were made with: {content['pool']}\n"
    )


def table(content: Mapping[str, Any]) -> Table:
    """Return the table of a reproduction's means."""
    rows = [
        [
            name, _number(row["mean"]), _number(row["published"] and row["published"]["mean"]),
            _signed(row["difference"]), row["protocol"], row["published_protocol"],
        ]
        for name, row in content["rows"].items()
    ]  # fmt: skip
    header = ["row", "here", "published", "difference", "protocol here", "protocol published"]
    caption = "Mean accuracy, %. * uses labels. By task, with sources: reproduction.md."
    return Table(header, rows, caption=caption, title=content["title"], starred=starred(content["rows"]))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _both(here: float, published: float | None) -> str:
    return _number(here) if published is None else f"{here:.1f} ({published:.1f})"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1f}"
