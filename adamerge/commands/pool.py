"""``pool``: files that name a base and its experts, and what is known about them."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adamerge.commands.terminal import json_option, out, print_json, print_table, report
from adamerge.errors import InputError

if TYPE_CHECKING:
    from adamerge.pool.pool_file import PoolFiles


@click.group(short_help="Keep pool files: a base, its experts, their tasks, licences and hashes.")
def pool() -> None:
    """Keep the pool files that runs refer to as `pool=NAME` and `--pool NAME` (docs/files.md).

    A name is a shipped pool's, or that of NAME.yaml in ./pools (ADAMERGE_POOLS names other folders).
    """


@pool.command()
@click.argument("name")
@click.option("--base", help="The pretrained checkpoint, for a new pool.")
@click.option("--expert", "experts", multiple=True, metavar="NAME=FILE", help="An expert; repeat.")
@click.option("--task", "tasks", multiple=True, metavar="NAME=TASK", help="What an expert was fine-tuned on; repeat.")
@click.option("--licence", "licences", multiple=True, metavar="NAME=LICENCE", help="Of an expert, or base=...; repeat.")
@click.option("--key-prefix", default=None, help="Of the encoder's keys. Default: visual. for a whole CLIP.")
@click.option("--convert", "pickled", is_flag=True, help="Convert pickles into a folder beside the pool file.")
@click.option("--replace", "again", is_flag=True, help="Replace what the pool has under the same name.")
def add(
    name: str,
    base: str | None,
    experts: tuple[str, ...],
    tasks: tuple[str, ...],
    licences: tuple[str, ...],
    key_prefix: str | None,
    pickled: bool,
    again: bool,
) -> None:
    """Make the pool NAME, or add to it; a NAME with .yaml or / is a file's.

    \b
    adamerge pool add ours --base vit_b32.safetensors --expert cars=cars.safetensors --expert dtd=dtd.safetensors
    adamerge pool add ours --expert svhn=hf://org/name@main --task svhn=svhn --licence svhn=MIT
    adamerge pool add published --base hf://openai/clip-vit-base-patch32 --expert cars=Cars/finetuned.pt --convert

    Files are opened and compared with the base; their SHA-256, and the commits of models from the Hub, are recorded.
    """  # noqa: D301
    from adamerge.commands import pool_command
    from adamerge.commands.run.named_pools import pool_path

    if not (base or experts or tasks or licences or key_prefix):
        raise InputError("pool add: nothing to add; give --base, --expert, --task or --licence.")
    path = pool_path(name)
    addition = pool_command.Addition(base, experts, tasks, licences, key_prefix, pickled=pickled, again=again)
    try:
        files = pool_command.add(path, addition)
    except pool_command.PoolError as error:
        report(error.problems)
        raise
    _show(files, str(path))
    click.echo(str(path))


@pool.command("list")
@click.argument("name", required=False)
@json_option
def list_pools(name: str | None, as_json: bool) -> None:
    """List all pools that have a name, or the files of one."""
    from adamerge.commands import pool_command
    from adamerge.commands.run.named_pools import named_pool

    if name is not None:
        files = named_pool(name)
        if as_json:
            print_json(_as_json(files))
        else:
            _show(files, name)
        return
    found = pool_command.every_pool()
    lines = []
    for pool_name, (where, said) in found.items():
        if isinstance(said, InputError):
            lines.append((pool_name, "", "", str(said), where))
            continue
        count = pool_command.summary(said)
        state = f"{count['there']} of {count['files']} files are here"
        lines.append((pool_name, str(len(said.experts)), str(said.base.file), state, where))
    if as_json:
        keys = ("name", "experts", "base", "state", "where")
        print_json([dict(zip(keys, line, strict=True)) for line in lines])
    else:
        print_table("Pools", ("", "experts", "base", "state", "from"), lines)


@pool.command()
@click.argument("name")
@click.option(
    "--record", type=click.Path(path_type=Path), help="Write a pool file with all hashes, and commits of the Hub."
)
def verify(name: str, record: Path | None) -> None:
    """Read every byte of a pool's files: all are there, have their hashes, and fit the base. Exit code 2 if not.

    \b
    adamerge pool verify ours
    adamerge pool verify clip_vit_b32_8 --record pools/my_b32.yaml   # pins what is in the cache
    """  # noqa: D301
    from adamerge.commands import pool_command
    from adamerge.commands.run.named_pools import named_pool

    files = named_pool(name)
    report(pool_command.problems_of(files))
    if record is not None:
        files = pool_command.record(name, record)
    _show(files, name)
    unknown = [entry for entry, state in files.entries.items() if state.sha256 is None]
    out.print(f"No problems found. {len(unknown)} files have no hash to compare with." if unknown else "All verified.")
    if record is not None:
        click.echo(str(record))


@pool.command()
@click.argument("targets", nargs=-1, required=True, metavar="NAME|hf://ORG/NAME...")
def fetch(targets: tuple[str, ...]) -> None:
    """Download the models of the Hub that pools name, or models by reference: the only command that does.

    \b
    adamerge pool fetch clip_vit_b32_8
    adamerge pool fetch hf://openai/clip-vit-base-patch32

    They go to the Hugging Face cache (HF_HOME); what is there is not fetched again.
    """  # noqa: D301
    from adamerge.commands import pool_command

    for reference in pool_command.references(targets):
        out.print(f"{reference}: {reference.fetch()}", highlight=False)


def _show(files: "PoolFiles", title: str) -> None:
    from adamerge.commands import pool_command

    lines = []
    for name, state in pool_command.states(files).items():
        entry = state.entry
        known = (entry.sha256 or "-")[:12]
        where = "here" if state.there else "missing"
        lines.append((name, where, entry.task or "", entry.licence or "", known, str(entry.file)))
    print_table(title, ("", "state", "task", "licence", "sha256", "file"), lines)


def _as_json(files: "PoolFiles") -> dict[str, object]:
    from adamerge.commands import pool_command

    there = {name: state.there for name, state in pool_command.states(files).items()}
    return {**files.described(), "there": there}
