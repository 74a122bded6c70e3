"""``coefficients``: files of merging coefficients."""

from pathlib import Path

import click

from adamerge.commands.terminal import escape, json_option, out, print_json, print_table, report
from adamerge.errors import InputError


@click.group(short_help="Bring published coefficients into a file with names.")
def coefficients() -> None:
    """Work on files of merging coefficients (docs/files.md)."""


@coefficients.command("list")
@json_option
def list_lists(as_json: bool) -> None:
    """List the published lists that ship, which `coefficients import` takes by name."""
    from adamerge.model.published import EIGHT, facts_of, shipped_lists

    found = [facts_of(published) for published in shipped_lists().values()]
    if as_json:
        print_json(found)
        return
    header = ("", "model", "method", "granularity", "rows", "columns")
    print_table("Published coefficients", header, [tuple(map(str, facts.values())) for facts in found])
    out.print(f"Columns: {', '.join(EIGHT)}.", highlight=False)


@coefficients.command("import")
@click.argument("source", metavar="NAME|FILE")
@click.option("--list", "name", help="Which of a file's lists, such as lw_adamerging/ViT-B-32.")
@click.option("--pool", required=True, help="The pool that they are for: a name, or a pool file.")
@click.option("--order", help="Experts in the order of the columns, NAME,NAME,... Default: AdaMerging's eight tasks.")
@click.option("--out", "output", type=click.Path(path_type=Path), required=True, help="File to write, NAME.json.")
def import_list(source: str, name: str | None, pool: str, order: str | None, output: Path) -> None:
    """Write a published list of coefficients as a file that `export` replays and `adapt init=FILE` starts from.

    \b
    adamerge coefficients import lw_adamerging/ViT-B-32 --pool ours --out lw.json             a list that ships
    adamerge export --pool ours --coefficients lw.json --output merged                        the paper's merge
    adamerge coefficients import merging_cofficient.py --list lw_adamerging/ViT-B-32 --pool ours --out lw.json

    SOURCE is a list that ships, which all of AdaMerging's do, or a file: Python like the authors', which is read and
    not run, or rows of numbers as text, JSON or a tensor (.pt, .safetensors). No image is needed, no weight is read.
    """  # noqa: D301
    from adamerge.commands.pool_command import header_problems, headers
    from adamerge.commands.run.named_pools import named_pool
    from adamerge.model import published as lists
    from adamerge.system.files import save_json

    if output.suffix != ".json":
        raise InputError(f"--out {output}: expected a file name that ends in .json.")
    published = lists.chosen_list(source, name)
    files = named_pool(pool)
    report(header_problems(files))
    order_of = [word.strip() for word in order.split(",")] if order else None
    content = lists.named_coefficients(published, list(headers(files).shapes), list(files.experts), order_of)
    save_json(content, output)
    values = [value for expert in content["coefficients"].values() for value in expert.values()]
    facts = f"{len(values)} coefficients of {len(files.experts)} experts, {content['granularity']}-wise"
    out.print(escape(f"{published.name}: {facts}, mean {sum(values) / len(values):.3f}."), highlight=False)
    click.echo(str(output))
