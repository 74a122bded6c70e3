"""Pickled checkpoints to safetensors, without unpickling them."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from adamerge.checkpoints.checkpoint import (
    Checkpoint,
    MemoryCheckpoint,
    SafetensorsCheckpoint,
    checkpoint_head,
    open_checkpoint,
)
from adamerge.checkpoints.composed import wrappers
from adamerge.checkpoints.distributed import METADATA, DistributedCheckpoint
from adamerge.checkpoints.model_folder import open_shards
from adamerge.checkpoints.pickles import PickledTensors, read_pickle
from adamerge.checkpoints.writing import nbytes, save_tensors
from adamerge.errors import InputError, shorten


@dataclass(frozen=True)
class Conversion:
    """What was found and written.

    Attributes:
        of: What the file holds, in words.
        dtypes: How many tensors of each dtype.
        nbytes: Their size.
        inert: Classes and functions that the file names, none of which was imported.
        left_out: Names that were not written: no tensors, or without the prefix.
        prefix: What all written names begin with and a plain model's do not; empty if nothing.
    """

    of: str
    dtypes: dict[str, int]
    nbytes: int
    inert: tuple[str, ...]
    left_out: tuple[str, ...]
    prefix: str


def convert_file(source: Path, out: Path, key_prefix: str = "", entry: str | None = None) -> Conversion:
    """Write a checkpoint's tensors as safetensors, atomically; dtypes stay.

    Args:
        source: What :func:`adamerge.checkpoints.pickles.read_pickle` reads; a folder of torch.distributed.checkpoint;
            an index of shards, as Hugging Face writes it; or safetensors, for other names.
        out: The file to write; weights that share memory are written in full, each under its name.
        entry: See :func:`~adamerge.checkpoints.pickles.read_pickle`.
        key_prefix: Taken off the names; tensors without it are left out.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If the file is refused or damaged, has no tensors, or none with the prefix.
    """
    if out.suffix != ".safetensors":
        raise InputError(f"--out {out}: expected a file name that ends in .safetensors.")
    opened, pickled = _opened(source, entry)
    if out.exists() and out.samefile(source):
        raise InputError(f"--out {out}: is the source itself; choose another name.")
    if isinstance(opened, SafetensorsCheckpoint) and not key_prefix:
        raise InputError(f"{source}: is a safetensors file already; nothing to convert but names, with --key-prefix.")
    keys = {key.removeprefix(key_prefix): key for key in opened.keys if key.startswith(key_prefix)}
    dropped = [key for key in opened.keys if not key.startswith(key_prefix)]
    if not keys or "" in keys:
        raise InputError(f"--key-prefix {key_prefix}: no names begin so; there are {shorten(opened.keys)}.")
    specs = {name: opened.spec(key) for name, key in keys.items()}
    save_tensors(specs, ((name, opened.get(key)) for name, key in keys.items()), out)
    return Conversion(
        of=f"{pickled.holder}, {pickled.format}",
        dtypes=dict(Counter(str(dtype).removeprefix("torch.") for _, dtype in specs.values())),
        nbytes=sum(map(nbytes, specs.values())),
        inert=pickled.inert,
        left_out=(*pickled.left_out, *dropped, *pickled.beside),
        prefix=wrappers(keys)[-1],
    )


def _opened(source: Path, entry: str | None) -> tuple[Checkpoint, PickledTensors]:
    """Open a source by what it is; return its tensors, and what a pickle holds beside them."""
    if (source / METADATA).is_file():
        opened: Checkpoint = DistributedCheckpoint(source)
        form = "folder of torch.distributed.checkpoint"
    elif source.name.endswith(".index.json"):
        opened, form = open_shards(source), "shards"
    elif checkpoint_head(source)[8:9] == b"{":
        opened, form = open_checkpoint(source), "safetensors file"
    else:
        pickled = read_pickle(source, entry)
        return MemoryCheckpoint(str(source), pickled.tensors), pickled
    if entry:
        raise InputError(
            f"--entry {entry}: of pickled files only; --key-prefix {entry}. takes the names that begin so."
        )
    return opened, PickledTensors({}, "state dict", False, (), (), (), form)
