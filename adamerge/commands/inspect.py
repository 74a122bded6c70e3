"""``inspect`` and ``convert``: what is in checkpoint files."""

from dataclasses import asdict
from pathlib import Path

import click

from adamerge.commands.terminal import json_option, out, print_json, report, size


@click.command()
@click.option("--base", type=click.Path(path_type=Path), help="The base checkpoint.")
@click.option("--expert", "experts", multiple=True, metavar="NAME=FILE", help="An expert; repeat.")
@click.option("--pool", help="Instead: zoo, or a pool file (yaml; its paths start from its own folder).")
@click.option("--prefix", default=None, help="Key prefix of the encoder, such as visual. (the zoo's default).")
@click.option("--include", multiple=True, metavar="GLOB", help="Only parameters of such names; repeat.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Parameters to leave out, such as a head's; repeat.")
@json_option
def inspect(
    base: Path | None,
    experts: tuple[str, ...],
    pool: str | None,
    prefix: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show what is in a pool: experts, tensors, sizes, task-vector norms and cosines, problems found."""
    from adamerge.commands import inspection
    from adamerge.commands.run.named_pools import chosen_pool

    files = chosen_pool("inspect", base, experts, pool, prefix).narrowed(include, exclude)
    report(inspection.header_problems(files))
    opened = inspection.open_pool(files)
    if as_json:
        print_json(inspection.as_json(opened))
    else:
        inspection.show(opened, out)


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="NAME.safetensors, or with --to a folder.")
@click.option("--key-prefix", default="", help="Take it off the names, such as model.; other tensors are left out.")
@click.option("--to", "target", type=click.Choice(["open_clip", "hf"]), help="A CLIP in the other library's format.")
@json_option
def convert(source: Path, out: Path, key_prefix: str, target: str | None, as_json: bool) -> None:
    """Write a pickled checkpoint's tensors as safetensors, nothing in it is run; or a CLIP in another format.

    \b
    adamerge convert MNIST.pt --out mnist.safetensors
    adamerge convert clip-vit-base-patch32 --to open_clip --out vit_b32        a folder of Hugging Face's
    adamerge convert vit_b32 --to hf --out clip                                a folder of open_clip's
    """  # noqa: D301
    from adamerge.checkpoints import convert as conversion
    from adamerge.errors import InputError, shorten

    if target is not None:
        from adamerge.results.formats.convert import convert_model

        if key_prefix:
            raise InputError("--key-prefix: only without --to.")
        files = convert_model(source, target, out)
        if as_json:
            print_json({"files": [str(path) for path in files]})
            return
        for path in files:
            click.echo(str(path))
        return

    done = conversion.convert(source, out, key_prefix)
    if as_json:
        print_json({"file": str(out), **asdict(done)})
        return
    counts = ", ".join(f"{count} {dtype}" for dtype, count in done.dtypes.items())
    lines = [f"{source}: {done.of}", f"  {sum(done.dtypes.values())} tensors, {size(done.nbytes)}: {counts}"]
    if done.inert:
        lines.append(f"  named in it, not imported: {shorten(done.inert)}")
    if done.left_out:
        lines.append(f"  left out: {shorten(done.left_out)}")
    if done.prefix:
        lines.append(f"  All names begin with {done.prefix!r}: --key-prefix {key_prefix}{done.prefix} takes it off.")
    for line in (*lines, str(out)):
        out_line = line.encode("ascii", "backslashreplace").decode()
        click.echo(out_line)
