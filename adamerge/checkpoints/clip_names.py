"""Names of one library's checkpoints to another's: a table of patterns, and a lazy view through it.

The table is all that is known of a format. ``{n}`` in a pattern is the number of a block, ``{p}`` is ``weight`` or
``bias``; several names of the other library for one of open_clip's are its parts, stacked along dimension 0.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.errors import InputError, shorten


@dataclass(frozen=True)
class NameRule:
    """One tensor in both formats.

    Attributes:
        own: Its name in open_clip, a pattern.
        theirs: Its name in the other format, or those of its parts, stacked along dimension 0.
        transposed: Whether the two are each other's transpose.
    """

    own: str
    theirs: tuple[str, ...]
    transposed: bool = False


@dataclass(frozen=True)
class KeyTable:
    """A format of checkpoints, as names that stand for open_clip's.

    Attributes:
        name: For messages.
        rules: All tensors.
        signature: Names of which one is in every checkpoint of the format, and in none of another.
        own_signature: Names that all of open_clip's checkpoints have which the format can hold.
        ignored: Patterns of names in the other format that carry nothing, such as an index buffer.
        bare: Prefix that some of the format's checkpoints leave out, and the name that tells those.
        optional: Names in open_clip of tensors that some of the format's checkpoints lack, for whom they never changed.
    """

    name: str
    rules: tuple[NameRule, ...]
    signature: tuple[str, ...]
    own_signature: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    bare: Mapping[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()


def _blocks(own: str, theirs: str) -> tuple[NameRule, ...]:
    """Return the rules of a transformer's blocks; both towers of CLIP have the same."""
    attention = tuple(f"{theirs}.self_attn.{part}_proj.{{p}}" for part in "qkv")
    pairs = {
        "attn.out_proj": "self_attn.out_proj",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    rest = (NameRule(f"{own}.{mine}.{{p}}", (f"{theirs}.{other}.{{p}}",)) for mine, other in pairs.items())
    return (NameRule(f"{own}.attn.in_proj_{{p}}", attention), *rest)


# transformers' CLIPModel and its towers (CLIPVisionModel, CLIPTextModel, ...WithProjection, ...ForImageClassification).
HF_CLIP = KeyTable(
    name="Hugging Face CLIP",
    rules=(
        NameRule("positional_embedding", ("text_model.embeddings.position_embedding.weight",)),
        NameRule("text_projection", ("text_projection.weight",), transposed=True),
        NameRule("logit_scale", ("logit_scale",)),
        NameRule("visual.class_embedding", ("vision_model.embeddings.class_embedding",)),
        NameRule("visual.positional_embedding", ("vision_model.embeddings.position_embedding.weight",)),
        NameRule("visual.proj", ("visual_projection.weight",), transposed=True),
        NameRule("visual.conv1.weight", ("vision_model.embeddings.patch_embedding.weight",)),
        NameRule("visual.ln_pre.{p}", ("vision_model.pre_layrnorm.{p}",)),
        *_blocks("visual.transformer.resblocks.{n}", "vision_model.encoder.layers.{n}"),
        NameRule("visual.ln_post.{p}", ("vision_model.post_layernorm.{p}",)),
        *_blocks("transformer.resblocks.{n}", "text_model.encoder.layers.{n}"),
        NameRule("token_embedding.weight", ("text_model.embeddings.token_embedding.weight",)),
        NameRule("ln_final.{p}", ("text_model.final_layer_norm.{p}",)),
    ),
    signature=("vision_model.pre_layrnorm.weight",),  # spelt so; SigLIP and others of these prefixes have none
    own_signature=("visual.class_embedding", "visual.ln_pre.weight"),
    ignored=("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids"),
    bare={"vision_model.": "pre_layrnorm.weight"},  # CLIPVisionModel as transformers 5 writes it
    optional=("visual.proj",),  # CLIPVisionModel has no projection: it was fine-tuned without, or with it frozen
)


TABLES = (HF_CLIP,)


@dataclass(frozen=True)
class _Piece:
    """How a tensor of a view comes about: from sources that are stacked, or as one of several parts of a source."""

    sources: tuple[str, ...]
    transposed: bool = False
    part: int = 0
    parts: int = 1


class MappedCheckpoint:
    """A checkpoint seen under another library's names; tensors are read, and put together, when asked for.

    Made by :func:`as_own` and :func:`as_theirs`.

    Attributes:
        source: What is seen.
        config_file: The source's configuration, where it is known to have one.
    """

    def __init__(self, source: Checkpoint, plan: Mapping[str, _Piece]) -> None:
        self.name = source.name
        self.source = source
        self.config_file: Path | None = None
        self._plan = plan

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the tensor names, in the order of the source."""
        return tuple(self._plan)

    def spec(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return shape and dtype of a tensor, from those of its sources."""
        piece = self._plan[key]
        shape, dtype = self.source.spec(piece.sources[0])
        if piece.transposed:
            shape = shape[::-1]
        if len(piece.sources) > 1:
            shape = (sum(self.source.spec(name)[0][0] for name in piece.sources), *shape[1:])
        return (shape[0] // piece.parts, *shape[1:]) if piece.parts > 1 else shape, dtype

    def get(self, key: str) -> Tensor:
        """Return a tensor on the CPU; what is not stacked is as the source gives it."""
        piece = self._plan[key]
        tensors = [self.source.get(name) for name in piece.sources]
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        if piece.transposed:
            return tensor.t().contiguous()
        return tensor.chunk(piece.parts)[piece.part] if piece.parts > 1 else tensor

    def sha256(self) -> str:
        """Return the source's hash."""
        return self.source.sha256()


class Completed:
    """An expert's checkpoint with the base's tensors in the place of those that checkpoints of its format may lack.

    Args:
        own: The expert's, under open_clip's names.
        base: Of the pool.
        table: Of the expert's format.

    Attributes:
        config_file: The expert's, see :class:`MappedCheckpoint`.
    """

    def __init__(self, own: MappedCheckpoint, base: Checkpoint, table: KeyTable) -> None:
        self.name = own.name
        self.config_file = own.config_file
        self._own = own
        self._base = base
        self._missing = sorted(({*table.optional} & {*base.keys}) - {*own.keys})

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the expert's tensor names, then the base's."""
        return (*self._own.keys, *self._missing)

    def spec(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return shape and dtype of a tensor."""
        return (self._base if key in self._missing else self._own).spec(key)

    def get(self, key: str) -> Tensor:
        """Return a tensor on the CPU."""
        return (self._base if key in self._missing else self._own).get(key)

    def sha256(self) -> str:
        """Return the expert's hash; the base has its own."""
        return self._own.sha256()


def table_of(checkpoint: Checkpoint) -> KeyTable | None:
    """Return the table of a foreign checkpoint's format, by its keys; None for open_clip's and any other."""
    keys = set(checkpoint.keys)
    return next((table for table in TABLES if not keys.isdisjoint({*table.signature, *table.bare.values()})), None)


def as_own(checkpoint: Checkpoint, table: KeyTable) -> MappedCheckpoint:
    """See a foreign checkpoint under open_clip's names; what the table does not know keeps its name.

    Raises:
        InputError: If a tensor of several parts lacks one.
    """
    keys = set(checkpoint.keys)
    prefix = next((start for start, key in table.bare.items() if key in keys), "")
    plan: dict[str, _Piece] = {}
    for key in checkpoint.keys:
        name = prefix + key
        if name in table.ignored:
            continue
        found = _own_name(name, table)
        if found is None:
            plan[key] = _Piece((key,))
            continue
        own, theirs, transposed = found
        sources = tuple(part.removeprefix(prefix) for part in theirs)
        missing = [part for part in sources if part not in keys]
        if missing:
            raise InputError(
                f"{checkpoint.name}: lacks {shorten(missing)}, a part of open_clip's {own!r} as is {key!r}. Expected "
                f"a whole {table.name} checkpoint; save it again."
            )
        plan.setdefault(own, _Piece(sources, transposed))
    return MappedCheckpoint(checkpoint, plan)


def as_theirs(checkpoint: Checkpoint, table: KeyTable) -> MappedCheckpoint:
    """See an open_clip checkpoint under another format's names.

    Raises:
        InputError: If it is no open_clip checkpoint that the format can hold; with the names that have no place in it.
    """
    plan: dict[str, _Piece] = {}
    unknown = []
    for key in checkpoint.keys:
        found = _their_names(key, table)
        if found is None:
            unknown.append(key)
            continue
        names, transposed = found
        for part, name in enumerate(names):
            plan[name] = _Piece((key,), transposed, part, len(names))
    if unknown or not set(table.own_signature) <= set(checkpoint.keys):
        what = f"it has no place for {shorten(unknown)}" if unknown else f"found {shorten(checkpoint.keys)}"
        raise InputError(
            f"{checkpoint.name}: cannot be written as {table.name}: {what}. Expected the keys of an open_clip ViT such "
            f"as {shorten(table.own_signature)}."
        )
    return MappedCheckpoint(checkpoint, plan)


def own_key(name: str, table: KeyTable) -> str | None:
    """Return what open_clip calls a tensor of another format, or that which it is a part of; None for unknown ones."""
    found = _own_name(name, table)
    return None if found is None else found[0]


def _own_name(name: str, table: KeyTable) -> tuple[str, tuple[str, ...], bool] | None:
    """Return open_clip's name of a foreign tensor, all foreign tensors that it is made of, whether transposed."""
    for rule in table.rules:
        for pattern in rule.theirs:
            if (match := _compiled(pattern).fullmatch(name)) is not None:
                fields = match.groupdict()
                return rule.own.format(**fields), tuple(part.format(**fields) for part in rule.theirs), rule.transposed
    return None


def _their_names(key: str, table: KeyTable) -> tuple[tuple[str, ...], bool] | None:
    """Return the foreign names of an open_clip tensor, or of its parts, and whether they are transposed."""
    for rule in table.rules:
        if (match := _compiled(rule.own).fullmatch(key)) is not None:
            return tuple(part.format(**match.groupdict()) for part in rule.theirs), rule.transposed
    return None


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    escaped = re.escape(pattern)
    return re.compile(escaped.replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{p\}", r"(?P<p>weight|bias)"))
