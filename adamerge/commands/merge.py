"""``merge`` and ``transform``: merges without training."""

from pathlib import Path
from typing import Any

import click

from adamerge.commands.terminal import json_option, print_files
from adamerge.errors import InputError


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
