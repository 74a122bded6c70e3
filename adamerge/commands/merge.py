"""``merge``, ``transform`` and ``compare``: merges without training, and many merges side by side."""

import functools
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from adamerge.commands.terminal import configure_logging, json_option, out, print_files, print_json, report
from adamerge.errors import InputError
from adamerge.system import progress


@click.command()
@click.option("--rule", help="Name of a rule, such as tsvm, ties or regmean++ (docs/methods.md), or an import path.")
@click.option("--base", type=click.Path(path_type=Path), help="The base checkpoint.")
@click.option("--expert", "experts", multiple=True, metavar="NAME=FILE", help="An expert; repeat.")
@click.option("--pool", help="Instead: zoo, or a pool file (yaml; its paths start from its own folder).")
@click.option("--recipe", type=click.Path(path_type=Path), help="Instead of all else: a merge.json to run again.")
@click.option("--set", "settings", multiple=True, metavar="OPTION=VALUE", help="An option of the rule; repeat.")
@click.option("--key-prefix", default=None, help="Key prefix of the encoder in the files, such as visual.")
@click.option(
    "--batch-norm",
    type=click.Choice(["base", "average", "recalibrate"]),
    help="Statistics of BatchNorm layers, if there are any.  [recalibrate if the rule reads data, else average]",
)
@click.option("--out", "output", type=click.Path(path_type=Path), required=True, help="Folder.")
@click.option("--config-dir", type=click.Path(path_type=Path), help="Your own yaml files, for OVERRIDES.")
@json_option
@click.argument("overrides", nargs=-1)
def merge(output: Path, as_json: bool, **options: Any) -> None:
    """Merge a pool by a rule, without training.

    \b
    adamerge merge --rule tsvm --base BASE --expert cars=FILE --expert dtd=FILE --out merged
    adamerge merge --rule ties --set density=0.1 --pool pool.yaml --out merged
    adamerge merge --rule regmean++ --pool zoo --out merged
    adamerge merge --rule regmean --pool pool.yaml --config-dir my_configs --out merged \\
        data=mine backbone=open_clip backbone.model=ViT-B-32
    adamerge merge --recipe merged/merge.json --out again

    Rules that need unlabeled data (fisher, regmean, regmean++), and --batch-norm recalibrate, take OVERRIDES that name
    backbone and data, as `adamerge adapt` does; the default is the demo zoo's.
    """  # noqa: D301
    from adamerge.commands import merging_command

    print_files(merging_command.run(merging_command.job_of(**options), output), as_json)


@click.command()
@click.option(
    "--rule", help="Name of a transform, such as ties (docs/methods.md), an import path, or none to pack only."
)
@click.option("--base", type=click.Path(path_type=Path), help="The base checkpoint.")
@click.option("--expert", "experts", multiple=True, metavar="NAME=FILE", help="An expert; repeat.")
@click.option("--pool", help="Instead: zoo, or a pool file (yaml; its paths start from its own folder).")
@click.option("--recipe", type=click.Path(path_type=Path), help="Instead of all else: a transform.json to run again.")
@click.option("--set", "settings", multiple=True, metavar="OPTION=VALUE", help="An option of the rule; repeat.")
@click.option("--key-prefix", default=None, help="Key prefix of the encoder in the files, such as visual.")
@click.option("--dtype", default=None, help="float32 (default), bfloat16, float16 or int8.")
@click.option("--out", "output", type=click.Path(path_type=Path), required=True, help="Folder.")
@json_option
def transform(
    rule: str | None,
    base: Path | None,
    experts: tuple[str, ...],
    pool: str | None,
    recipe: Path | None,
    settings: tuple[str, ...],
    key_prefix: str | None,
    dtype: str | None,
    output: Path,
    as_json: bool,
) -> None:
    """Write a pool's transformed task vectors into one file, which is streamed from then on.

    \b
    adamerge transform --rule ties --set density=0.3 --pool pool.yaml --dtype bfloat16 --out packed
    adamerge adapt pool=files pool.file=packed/pool.yaml data=mine
    adamerge merge --rule task_arithmetic --pool packed/pool.yaml --out merged
    """  # noqa: D301
    from adamerge.commands import transform as transform_command
    from adamerge.commands.run.compose import rule_node
    from adamerge.commands.run.named_pools import chosen_pool

    if recipe is not None:
        if rule or base or experts or pool or settings or key_prefix or dtype:
            raise InputError("transform: --recipe holds everything but --out; leave the other options out.")
        job = transform_command.read_recipe(recipe)
    elif rule is None:
        raise InputError("transform: give --rule NAME; docs/methods.md lists them; none packs only.")
    else:
        files = chosen_pool("transform", base, experts, pool, key_prefix)
        job = transform_command.Job(rule_node("transform", rule, settings), files, dtype)
    print_files(transform_command.run(job, output), as_json)


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
@click.option("--rows", multiple=True, metavar="ROW...", help="What to compare, see below.")
@click.option("--preset", help="Rows from a file, or a shipped one: demo (every merge, every transform, and more).")
@click.option("--seeds", type=int, multiple=True, default=(0,), show_default=True, metavar="SEED...")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Rows at a time.")
@click.option("--out", "folder", type=click.Path(path_type=Path), required=True, help="Folder; go on in it.")
@json_option
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def compare(
    rows: tuple[str, ...],
    preset: str | None,
    seeds: tuple[int, ...],
    jobs: int,
    folder: Path,
    as_json: bool,
    overrides: Any,
) -> None:
    """Make many merges of one pool, score them side by side, and write tables; run it again to go on.

    \b
    adamerge compare --rows weight_average ties tsvm experiment=recommended --seeds 0 1 2 --out runs/compare
    adamerge compare --rows "ties density=0.1" "task_arithmetic transform=pcb" --out runs/compare
    adamerge compare --rows "transform=ties experiment=adamerging_layer" --out runs/compare
    adamerge compare --rows "experiment=imitation_row start=wudi" --out runs/compare
    adamerge compare --preset demo --out runs/compare -- data=mine backbone=open_clip backbone.model=ViT-B-32

    A row is pretrained, experts, a rule of `adamerge merge` with its options, or what `adamerge adapt` takes;
    start=RULE adapts from that rule's merge. OVERRIDES name pool, data and backbone as for `adamerge adapt`; the
    default is the demo zoo.
    """  # noqa: D301
    from adamerge.commands.compare import plan as comparison

    plan = comparison.plan_of(rows, preset, overrides, seeds, folder, jobs)
    # Rows that are made at the same time would draw their bars over each other.
    start = functools.partial(configure_logging, debug=False, quiet=progress.is_quiet() or jobs > 1)
    failed = comparison.run(plan, Console(quiet=True) if as_json or progress.is_quiet() else out, start)
    if as_json:
        print_json({"folder": str(folder), "summary": comparison.read(folder), "failed": failed})
    report([f"{row}: {message}" for row, message in failed.items()])
    if not as_json:
        click.echo(str(folder))
