"""``reproduce``: published tables, made here."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from adamerge.commands.data import print_how_to_get
from adamerge.commands.terminal import configure_logging, err, escape, json_option, out, print_json, report
from adamerge.errors import InputError
from adamerge.system import progress

if TYPE_CHECKING:
    from adamerge.commands.reproduction import Published


@click.command(options_metavar="[OPTIONS] [-- OVERRIDES...]")
@click.argument("preset")
@click.option("--check", "only_check", is_flag=True, help="Say what is missing, and how to get it; make nothing.")
@click.option("--seed", "seeds", type=int, multiple=True, default=(0,), show_default=True, help="Repeat for several.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Rows at a time.")
@click.option("--out", "folder", type=click.Path(path_type=Path), help="Folder; go on in it.  [runs/reproduce/PRESET]")
@json_option
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def reproduce(
    preset: str,
    only_check: bool,
    seeds: tuple[int, ...],
    jobs: int,
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
    from adamerge.commands import reproduction
    from adamerge.commands.compare import plan as comparison

    published = reproduction.read_published(preset)
    folder = folder or Path("runs") / "reproduce" / Path(preset).stem
    try:
        plan = comparison.plan_of((), preset, overrides, seeds, folder, jobs)
    except InputError as error:
        report([str(error)], lambda: _explain(published))
        raise
    problems = reproduction.problems_of(plan, published)
    report(problems, lambda: _explain(published, reproduction.missing_data(plan)))
    if only_check:
        out.print(f"{published.title}: {len(plan.rows)} rows can be made.", highlight=False)
        return
    start = functools.partial(configure_logging, debug=False, quiet=progress.is_quiet() or jobs > 1)
    console = Console(quiet=True) if as_json or progress.is_quiet() else out
    failed = reproduction.run(plan, published, console, start)
    if as_json:
        path = folder / reproduction.JSON
        made = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": {}}
        print_json({**made, "failed": failed})
    report([f"{row}: {message}" for row, message in failed.items()])
    if not as_json:
        click.echo(str(folder))


def _explain(published: "Published", missing: Sequence[tuple[str, Path]] = ()) -> None:
    """Say how to get what a table needs: data sets by name and folder, and its checkpoints."""
    for name, root in missing:
        print_how_to_get(name, root, err)
    err.print(f"\nThe table was made with: {escape(published.pool)}")
