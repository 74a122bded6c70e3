"""Checkpoints made of the tensors of others: renamed, put together, cut apart, or from several files."""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.errors import shorten
from adamerge.system.files import combined_hash

log = logging.getLogger(__name__)

_WRAPPERS = ("module.", "_orig_mod.", "model.")  # DataParallel, torch.compile, and modules around one ``self.model``
_INNER = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # of torch, wherever in a name


@dataclass(frozen=True)
class Piece:
    """Where a tensor comes from.

    Attributes:
        checkpoint: The checkpoint that has the tensor.
        keys: Its name there, or those of its parts, stacked along dimension 0.
        transposed: Whether it is the transpose of what is there.
        part: Number of the part, along dimension 0, where the checkpoint's tensor has several.
        parts: How many there are.
    """

    checkpoint: Checkpoint
    keys: tuple[str, ...]
    transposed: bool = False
    part: int = 0
    parts: int = 1


class ComposedCheckpoint:
    """Tensors of other checkpoints, read and put together when asked for.

    Args:
        name: For messages.
        pieces: Name to where the tensor comes from.
        sources: The checkpoints that its hash is made of; of a single one it is that one's.
        config_file: The configuration that lies beside the weights, where one is known.

    Attributes:
        pieces: As given.
    """

    def __init__(
        self,
        name: str,
        pieces: Mapping[str, Piece],
        sources: Mapping[str, Checkpoint],
        config_file: Path | None = None,
    ) -> None:
        self.name, self.config_file = name, config_file
        self.pieces, self._sources = pieces, sources

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the tensor names, in the order of the pieces."""
        return tuple(self.pieces)

    def spec(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return shape and dtype of a tensor, from those of its parts."""
        piece = self.pieces[key]
        shape, dtype = piece.checkpoint.spec(piece.keys[0])
        if piece.transposed:
            shape = shape[::-1]
        if len(piece.keys) > 1:
            shape = (sum(piece.checkpoint.spec(part)[0][0] for part in piece.keys), *shape[1:])
        return (shape[0] // piece.parts, *shape[1:]) if piece.parts > 1 else shape, dtype

    def get(self, key: str) -> Tensor:
        """Return a tensor on the CPU; what is neither stacked nor turned is as its checkpoint gives it."""
        piece = self.pieces[key]
        tensors = [piece.checkpoint.get(part) for part in piece.keys]
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        if piece.transposed:
            return tensor.t().contiguous()
        return tensor.chunk(piece.parts)[piece.part] if piece.parts > 1 else tensor

    def sha256(self) -> str:
        """Return the source's hash; of several, one of all."""
        hashes = {name: source.sha256() for name, source in self._sources.items()}
        return combined_hash(hashes) if len(hashes) > 1 else next(iter(hashes.values()))


def wrappers(names: Collection[str]) -> list[str]:
    """Return what wrappers of models put before all of the names: nothing, then one prefix longer than the other.

    >>> wrappers(["module._orig_mod.w", "module._orig_mod.b"])
    ['', 'module.', 'module._orig_mod.']
    """
    prefixes = [""]
    while names and (
        name := next((w for w in _WRAPPERS if all(key.startswith(prefixes[-1] + w) for key in names)), None)
    ):
        prefixes.append(prefixes[-1] + name)
    return prefixes


def unwrapped(checkpoint: Checkpoint, fits: Callable[[Collection[str]], bool]) -> Checkpoint:
    """See a checkpoint without what wrappers of models put into its names, where they fit so and not as they are.

    Args:
        checkpoint: Any.
        fits: Whether names are the wanted ones.
    """
    inner = [".".join(part for part in key.split(".") if part not in _INNER) for key in checkpoint.keys]
    for names in (inner, list(checkpoint.keys)):
        for wrapper in wrappers(names):
            plain = {name.removeprefix(wrapper): key for name, key in zip(names, checkpoint.keys, strict=True)}
            if len(plain) < len(names) or not fits(plain):
                continue
            if list(plain) == list(checkpoint.keys):
                return checkpoint
            key, name = next(iter(plain.values())), next(iter(plain))
            tell_once(f"{checkpoint.name}: its names are read without what wrappers add: {key!r} as {name!r}.")
            pieces = {name: Piece(checkpoint, (key,)) for name, key in plain.items()}
            return ComposedCheckpoint(checkpoint.name, pieces, {"": checkpoint})
    return checkpoint


def renamed_by_prefix(names: Collection[str], wanted: Collection[str]) -> dict[str, str]:
    """Return what each of a file's names is among others that differ by a prefix, such as those of a bare encoder.

    Names that have no counterpart stay as they are; so do all where any agrees, or where two prefixes serve as well.

    >>> renamed_by_prefix(["bert.w", "bert.b", "classifier.w"], ["w", "b"])
    {'bert.w': 'w', 'bert.b': 'b', 'classifier.w': 'classifier.w'}
    >>> renamed_by_prefix(["w", "b"], ["bert.w", "bert.b", "cls.w"])
    {'w': 'bert.w', 'b': 'bert.b'}
    """
    plain, present = {name: name for name in names}, set(wanted)
    if not present.isdisjoint(plain):
        return plain
    shorter = ({name: name.removeprefix(start) for name in names} for start in _starts(names))
    longer = ({name: start + name if start + name in present else name for name in names} for start in _starts(present))
    renamings = [renaming for renaming in (*shorter, *longer) if len({*renaming.values()}) == len(plain)]
    hits = [len(present.intersection(renaming.values())) for renaming in renamings]
    best = max(hits, default=0)
    return renamings[hits.index(best)] if best and hits.count(best) == 1 else plain


def _starts(names: Collection[str]) -> list[str]:
    """Return the first one and two modules of names, each with its dot."""
    parts = [name.split(".") for name in names]
    starts = dict.fromkeys(".".join(part[:depth]) + "." for part in parts for depth in (1, 2) if len(part) > depth)
    return list(starts)


def aligned(checkpoint: Checkpoint, base: Checkpoint) -> Checkpoint:
    """See an expert under its base's names, where the two differ by a prefix.

    Args:
        checkpoint: The expert.
        base: Its base.
    """
    names = renamed_by_prefix(checkpoint.keys, base.keys)
    renamed = next((key for key, name in names.items() if key != name), None)
    if renamed is None:
        return checkpoint
    tell_once(f"{checkpoint.name}: its names are read as the base's: {renamed!r} as {names[renamed]!r}.")
    return ComposedCheckpoint(
        checkpoint.name, {name: Piece(checkpoint, (key,)) for key, name in names.items()}, {"": checkpoint}
    )


def check_parts(index: Path, names: Collection[str]) -> None:
    """Refuse a checkpoint of several files, which an index beside them names, where one is missing.

    Raises:
        FileNotFoundError: If a file is missing.
    """
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise FileNotFoundError(f"{index}: names {len(names)} files, missing: {shorten(missing)}. Copy them too.")


@cache
def tell_once(text: str, level: int = logging.INFO) -> None:
    """Say how a file is read, however often it is opened."""
    log.log(level, "%s", text)
