"""``convert``: a pickle's tensors as safetensors, a CLIP in another library's format, or GGUF as a model's folder."""

from dataclasses import asdict
from pathlib import Path

import click

from adamerge.checkpoints.convert import Conversion, convert_file
from adamerge.commands.terminal import echo, json_option, print_json
from adamerge.errors import InputError, shorten
from adamerge.results.numbers import size

GGUF = ".gguf"


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="NAME.safetensors; for a model a folder.")
@click.option("--key-prefix", default="", help="Take it off the names, such as model.; other tensors are left out.")
@click.option("--entry", help="Where the weights are in the file, such as state_dict_ema.  [state_dict or model]")
@click.option("--to", "target", type=click.Choice(["open_clip", "hf"]), help="A CLIP in the other library's format.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of GGUF's weights.  [float32]")
@json_option
def convert(
    source: Path, out: Path, key_prefix: str, entry: str | None, target: str | None, dtype: str | None, as_json: bool
) -> None:
    """Write a pickled checkpoint's tensors as safetensors, nothing in it is run; or a model in another format.

    \b
    adamerge convert MNIST.pt --out mnist.safetensors
    adamerge convert step-1000 --out step-1000.safetensors                     a folder of torch.distributed.checkpoint
    adamerge convert pytorch_model.bin.index.json --out model.safetensors      the shards that it lists, in one file
    adamerge convert clip-vit-base-patch32 --to open_clip --out vit_b32        a folder of Hugging Face's
    adamerge convert vit_b32 --to hf --out clip                                a folder of open_clip's
    adamerge convert SmolLM2.Q4_1.gguf --out smollm2                           dequantised, for transformers
    """  # noqa: D301
    is_gguf = source.suffix == GGUF
    if dtype and not is_gguf:
        raise InputError("--dtype: only for a GGUF file; other weights keep their own.")
    if (key_prefix or entry) and (target or is_gguf):
        raise InputError("--key-prefix, --entry: only without --to, and not of GGUF files.")
    if target and is_gguf:
        raise InputError(f"--to {target}: a GGUF file becomes a folder of transformers; leave --to out.")
    if not is_gguf and target is None:
        done = convert_file(source, out, key_prefix, entry)
        if as_json:
            print_json({"file": str(out), **asdict(done)})
        else:
            _tell(done, source, out, key_prefix)
        return
    files, text = _convert_model(source, out, target, dtype or "float32")
    if as_json:
        print_json({"files": [str(path) for path in files], **({"generated": text} if text else {})})
        return
    for line in (*files, *([f"Generated greedily: {text!r}"] if text else [])):
        echo(line)


def _convert_model(source: Path, out: Path, target: str | None, dtype: str) -> tuple[list[Path], str | None]:
    """Convert a whole model; imports the other libraries. Return the files, and what a language model says."""
    if target is None:
        from adamerge.results.formats.gguf import convert_gguf

        return convert_gguf(source, out, dtype)
    from adamerge.results.formats.convert import convert_model

    return convert_model(source, target, out), None


def _tell(done: Conversion, source: Path, out: Path, key_prefix: str) -> None:
    """Print what was found in a file of tensors."""
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
