"""``coefficients``: files of merging coefficients."""

from pathlib import Path

import click

from adamerge.commands.run.named_pools import named_pool
from adamerge.commands.terminal import echo, json_option, out, print_json, print_table, report
from adamerge.errors import InputError
from adamerge.model.published import EIGHT, chosen_list, facts_of, named_coefficients, shipped_lists
from adamerge.system.files import save_json


@click.group(short_help="Bring published coefficients into a file with names.")
def coefficients() -> None:
    """Work on files of merging coefficients (docs/files.md)."""


@coefficients.command("list")
@json_option
def list_lists(as_json: bool) -> None:
    """List the published lists that ship, which `coefficients import` takes by name."""
    lists = [facts_of(published) for published in shipped_lists().values()]
    if as_json:
        print_json(lists)
        return
    header = ("", "model", "method", "granularity", "rows", "columns")
    print_table("Published coefficients", header, [tuple(map(str, facts.values())) for facts in lists])
    out.print(f"Columns: {', '.join(EIGHT)}.", highlight=False)


@coefficients.command("import")
@click.argument("source", metavar="NAME|FILE")
@click.option("--pool", required=True, help="The pool that they are for: a name, or a pool file.")
@click.option("--order", help="Experts in the order of the columns, NAME,NAME,... Default: AdaMerging's eight tasks.")
@click.option("--out", "output", type=click.Path(path_type=Path), required=True, help="File to write, NAME.json.")
def import_list(source: str, pool: str, order: str | None, output: Path) -> None:
    """Write a published list of coefficients as a file that `export` replays and `adapt init=FILE` starts from.

    \b
    adamerge coefficients import lw_adamerging/ViT-B-32 --pool ours --out lw.json             a list that ships
    adamerge export --pool ours --coefficients lw.json --out merged                           the paper's merge
    adamerge coefficients import rows.txt --pool ours --order cars,dtd --out mine.json        a file of numbers

    SOURCE is a list that ships, which all of AdaMerging's do, or a file of rows of numbers, as text or JSON. No image
    is needed, no weight is read.
    """  # noqa: D301
    if output.suffix != ".json":
        raise InputError(f"--out {output}: expected a file name that ends in .json.")
    published = chosen_list(source)
    files = named_pool(pool)
    headers = files.headers()
    report(headers.problems)
    columns = [word.strip() for word in order.split(",")] if order else None
    content = named_coefficients(published, list(headers.shapes), list(files.experts), columns)
    save_json(content, output)
    values = [value for expert in content["coefficients"].values() for value in expert.values()]
    facts = f"{len(values)} coefficients of {len(files.experts)} experts, {content['granularity']}-wise"
    out.print(f"{published.name}: {facts}, mean {sum(values) / len(values):.3f}.", highlight=False)
    echo(output)
