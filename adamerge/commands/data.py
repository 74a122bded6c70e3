"""``data check`` and ``data get``: the field's data sets on this machine."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.text import Text

from adamerge.commands.terminal import EXIT_INPUT, err, json_option, out, print_json
from adamerge.system import progress

if TYPE_CHECKING:
    from adamerge.data.benchmarks.checks import DatasetReport

_STYLES = {"complete": "green", "missing": "dim", "incomplete": "yellow", "wrong": "red"}


def _default_root() -> str:
    return os.environ.get("ADAMERGE_DATA") or "data"


root_option = click.option(
    "--root",
    type=click.Path(path_type=Path),
    default=_default_root,
    help="Folder of the data sets, as torchvision's root. Default: ADAMERGE_DATA, else ./data.",
)


@click.group(short_help="Which of the field's data sets are there, and how to get the others.")
def data() -> None:
    """Look after the data sets of `data=clip_8`, `clip_14`, `clip_20` and `clip_20_hub` (docs/data.md)."""


@data.command()
@click.argument("names", nargs=-1)
@root_option
@click.option("--sample", type=click.IntRange(min=0), default=20, help="Images of each split to decode.  [20]")
@click.option("--all", "every", is_flag=True, help="Decode all images.")
@json_option
def check(names: tuple[str, ...], root: Path, sample: int, every: bool, as_json: bool) -> None:
    """Say which data sets are there and complete, and how to get the missing ones.

    \b
    adamerge data check                          all of them
    adamerge data check clip_8 --root /datasets  a benchmark's
    adamerge data check sun397 dtd --all         decode every image

    Exit code 2 if one that was named is not complete.
    """  # noqa: D301
    from adamerge.data.benchmarks.checks import check
    from adamerge.data.benchmarks.definitions import chosen

    root = root.expanduser().absolute()
    wanted = chosen(names)
    if not root.is_dir():
        err.print(f"{root}: no such folder. Name that of the data sets: --root DIR, or ADAMERGE_DATA.")
    looked_at = progress.track(wanted, "Looking at the data sets", "data sets")
    reports = [check(name, root, None if every else sample) for name in looked_at]
    if as_json:
        print_json({report.name: report.as_json() for report in reports})
    else:
        _show(reports, root)
        for report in reports:
            if report.state != "complete":
                print_how_to_get(report.name, root, out)
    if any(report.state != "complete" and (names or report.state != "missing") for report in reports):
        sys.exit(EXIT_INPUT)


def print_how_to_get(name: str, root: Path, console: Console) -> None:
    """Print what a person has to do to have a data set."""
    from adamerge.data.benchmarks.checks import how_to_get
    from adamerge.data.benchmarks.definitions import definition

    console.print(Text.assemble("\n", (name, "bold"), ": how to get it"))
    for line in how_to_get(definition(name), root):
        console.print(f"  {line}", highlight=False)


@data.command()
@click.argument("names", nargs=-1, required=True)
@root_option
@click.option("--hub", is_flag=True, help="Take the copies at the Hugging Face Hub, where there are any.")
def get(names: tuple[str, ...], root: Path, hub: bool) -> None:
    """Download data sets: the only command that does. Files that are there and whole are not fetched again.

    \b
    adamerge data get mnist svhn --root /datasets
    adamerge data get sun397 --hub
    """  # noqa: D301
    from adamerge.data.benchmarks.checks import check
    from adamerge.data.benchmarks.definitions import chosen, definition
    from adamerge.data.benchmarks.downloads import fetch
    from adamerge.system.files import ensure_writable

    root = root.expanduser().absolute()
    wanted = chosen(names)
    ensure_writable(root)
    reports = []
    for name in wanted:
        facts = definition(name)
        out.print(f"{name}: {facts.size}; licence: {facts.licence}; {facts.homepage}", highlight=False)
        fetch(facts, root, hub=hub)
        reports.append(check(name, root))
    _show(reports, root)
    if any(report.state != "complete" for report in reports):
        sys.exit(EXIT_INPUT)


def _show(reports: "list[DatasetReport]", root: Path) -> None:
    from adamerge.results.table import Table

    splits = ("train", "val", "test")
    rows, styles = [], {}
    for at, report in enumerate(reports):
        styles[at, 1] = _STYLES[report.state]
        counts = []
        for column, split in enumerate(splits, 2):
            state = report.splits.get(split)
            if state is None or state.found is None:
                counts.append("-")
            elif state.expected in (None, state.found):
                counts.append(str(state.found))
            else:
                counts.append(f"{state.found} of {state.expected}")
                styles[at, column] = "red"
        rows.append([report.name, report.state, *counts, report.layout or ""])
    table = Table(["", "state", *splits, "lies as"], rows, title=f"Data sets below {root}", styles=styles)
    out.print(table.terminal())
    for report in reports:
        for problem in report.problems:
            out.print(f"{report.name}: {problem}", highlight=False)
