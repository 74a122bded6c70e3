"""``compare``: many merges of one pool side by side."""

from pathlib import Path

import click
from rich.console import Console

from adamerge.commands.compare import plan as comparison
from adamerge.commands.terminal import echo, json_option, out, print_json, report
from adamerge.system import progress


class _Lists(click.Command):
    """Options that take all words up to the next option; what follows ``--`` are overrides."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        at = args.index("--") if "--" in args else len(args)
        words: list[str] = []
        option = None
        for word in args[:at]:
            if word.startswith("--"):
                option = word if word in ("--rows", "--seeds") else None
            elif option and words[-1] != option:
                words.append(option)
            words.append(word)
        return super().parse_args(ctx, [*words, *args[at:]])


@click.command(cls=_Lists, options_metavar="[OPTIONS] [-- OVERRIDES...]")
@click.option("--rows", multiple=True, metavar="ROW...", help="See below; of a preset these alone, by name, or more.")
@click.option("--preset", help="Rows from a file, or a shipped one: demo (every merge, every transform, and more).")
@click.option("--seeds", type=int, multiple=True, default=(0,), show_default=True, metavar="SEED...")
@click.option("--out", "folder", type=click.Path(path_type=Path), required=True, help="Folder; go on in it.")
@json_option
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def compare(
    rows: tuple[str, ...],
    preset: str | None,
    seeds: tuple[int, ...],
    folder: Path,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Make many merges of one pool, score them side by side, and write tables; run it again to go on.

    \b
    adamerge compare --rows weight_average ties tsvm experiment=recommended --seeds 0 1 2 --out runs/compare
    adamerge compare --rows "ties density=0.1" "task_arithmetic transform=pcb" --out runs/compare
    adamerge compare --rows "transform=ties experiment=adamerging_layer" --out runs/compare
    adamerge compare --rows "experiment=imitation_row start=wudi" --out runs/compare
    adamerge compare --preset demo --out runs/compare -- data=mine backbone=open_clip backbone.model=ViT-B-32

    A row is pretrained, experts, a rule of `adamerge merge` with its options, or what `adamerge adapt` takes;
    start=RULE adapts from that rule's merge. task_arithmetic_0.3 and experts, which measures refer to, are always made.
    OVERRIDES name pool, data and backbone as for `adamerge adapt`; the default is the demo zoo.
    """  # noqa: D301
    make(comparison.plan_of(rows, preset, overrides, seeds, folder), folder, as_json=as_json)


def make(plan: comparison.Plan, folder: Path, *, as_json: bool) -> None:
    """Make the rows of a plan, and print the table, what failed, and the folder as the user named it."""
    failed = comparison.run(plan, Console(quiet=True) if as_json or progress.is_quiet() else out)
    if as_json:
        print_json({"folder": str(folder), "summary": comparison.read(folder), "failed": failed})
    report([f"{row}: {message}" for row, message in failed.items()])
    if not as_json:
        echo(folder)
