"""``convert``: a pickle's tensors as safetensors, or a CLIP in another library's format."""

from dataclasses import asdict
from pathlib import Path

import click

from adamerge.checkpoints.convert import convert_file
from adamerge.commands.terminal import echo, json_option, print_json
from adamerge.errors import InputError, shorten
from adamerge.results.numbers import size


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="NAME.safetensors, or with --to a folder.")
@click.option("--key-prefix", default="", help="Take it off the names, such as model.; other tensors are left out.")
@click.option("--entry", help="Where the weights are in the file, such as state_dict_ema.  [state_dict or model]")
@click.option("--to", "target", type=click.Choice(["open_clip", "hf"]), help="A CLIP in the other library's format.")
@json_option
def convert(source: Path, out: Path, key_prefix: str, entry: str | None, target: str | None, as_json: bool) -> None:
    """Write a pickled checkpoint's tensors as safetensors, nothing in it is run; or a CLIP in another format.

    \b
    adamerge convert MNIST.pt --out mnist.safetensors
    adamerge convert clip-vit-base-patch32 --to open_clip --out vit_b32        a folder of Hugging Face's
    adamerge convert vit_b32 --to hf --out clip                                a folder of open_clip's
    """  # noqa: D301
    if target is not None:
        from adamerge.results.formats.convert import convert_model  # imports the other libraries

        if key_prefix or entry:
            raise InputError("--key-prefix, --entry: only without --to.")
        files = convert_model(source, target, out)
        if as_json:
            print_json({"files": [str(path) for path in files]})
            return
        for path in files:
            echo(path)
        return
    done = convert_file(source, out, key_prefix, entry)
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
        click.echo(line.encode("ascii", "backslashreplace").decode())
