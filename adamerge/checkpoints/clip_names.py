"""Names of Hugging Face's CLIP checkpoints, and open_clip's: a table of patterns, and a view through it.

The table is all that is known of the two. ``{n}`` in a pattern is the number of a block, ``{p}`` is ``weight`` or
``bias``; several names of Hugging Face's for one of open_clip's are its parts, stacked along dimension 0.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.checkpoints.composed import ComposedCheckpoint, Piece
from adamerge.errors import InputError, shorten


@dataclass(frozen=True)
class NameRule:
    """One tensor in both formats.

    Attributes:
        open_clip: Its name in open_clip, a pattern.
        hugging_face: Its name in transformers, or those of its parts, stacked along dimension 0.
        transposed: Whether the two are each other's transpose.
    """

    open_clip: str
    hugging_face: tuple[str, ...]
    transposed: bool = False


def _blocks(open_clip: str, hugging_face: str) -> tuple[NameRule, ...]:
    """Return the rules of a transformer's blocks; both towers of CLIP have the same."""
    attention = tuple(f"{hugging_face}.self_attn.{part}_proj.{{p}}" for part in "qkv")
    pairs = {
        "attn.out_proj": "self_attn.out_proj",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    others = (
        NameRule(f"{open_clip}.{name}.{{p}}", (f"{hugging_face}.{counterpart}.{{p}}",))
        for name, counterpart in pairs.items()
    )
    return (NameRule(f"{open_clip}.attn.in_proj_{{p}}", attention), *others)


# transformers' CLIPModel and its towers (CLIPVisionModel, CLIPTextModel, ...WithProjection, ...ForImageClassification).
_RULES = (
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
)
_SIGNATURE = "vision_model.pre_layrnorm.weight"  # spelt so; SigLIP and others of these prefixes have none
_OWN_SIGNATURE = ("visual.class_embedding", "visual.ln_pre.weight")  # of open_clip's that transformers can hold
_INDICES = ("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids")  # buffers that carry nothing
PREFIX = "vision_model."  # CLIPVisionModel as transformers 5 writes it leaves it out
_OPTIONAL = ("visual.proj",)  # CLIPVisionModel has no projection: it was fine-tuned without, or with it frozen


def is_hugging_face(names: Collection[str]) -> bool:
    """Return whether tensors are named as in Hugging Face's CLIP."""
    return _SIGNATURE in names or _SIGNATURE.removeprefix(PREFIX) in names


def as_own(checkpoint: Checkpoint, base: Checkpoint | None = None) -> ComposedCheckpoint:
    """See a Hugging Face CLIP under open_clip's names; a name that the table lacks stays.

    Args:
        checkpoint: The Hugging Face checkpoint.
        base: An expert's, under open_clip's names: what the expert's format may lack is taken from it.

    Raises:
        InputError: If a tensor of several parts lacks one.
    """
    keys = set(checkpoint.keys)
    prefix = PREFIX if _SIGNATURE.removeprefix(PREFIX) in keys else ""
    pieces: dict[str, Piece] = {}
    for key in checkpoint.keys:
        if prefix + key in _INDICES:
            continue
        rule = _rule(prefix + key, of_open_clip=False)
        if rule is None:
            pieces[key] = Piece(checkpoint, (key,))
            continue
        parts = tuple(part.removeprefix(prefix) for part in rule.hugging_face)
        if missing := [part for part in parts if part not in keys]:
            raise InputError(
                f"{checkpoint.name}: lacks {shorten(missing)}, a part of open_clip's {rule.open_clip!r} as is {key!r}. "
                "Expected a whole Hugging Face CLIP checkpoint; save it again."
            )
        pieces.setdefault(rule.open_clip, Piece(checkpoint, parts, rule.transposed))
    for key in _OPTIONAL:
        if base is not None and key in base.keys:
            pieces.setdefault(key, Piece(base, (key,)))
    return ComposedCheckpoint(checkpoint.name, pieces, {"": checkpoint})


def as_theirs(checkpoint: Checkpoint) -> ComposedCheckpoint:
    """See an open_clip checkpoint under Hugging Face's names.

    Raises:
        InputError: If it is no open_clip checkpoint that transformers can hold; with the names that have no place.
    """
    rules = {key: _rule(key, of_open_clip=True) for key in checkpoint.keys}
    unknown = [key for key, rule in rules.items() if rule is None]
    if unknown or not {*_OWN_SIGNATURE} <= rules.keys():
        reason = f"it has no place for {shorten(unknown)}" if unknown else f"found {shorten(checkpoint.keys)}"
        raise InputError(
            f"{checkpoint.name}: cannot be written as Hugging Face CLIP: {reason}. Expected the keys of an open_clip "
            f"ViT such as {shorten(_OWN_SIGNATURE)}."
        )
    pieces = {
        name: Piece(checkpoint, (key,), rule.transposed, part, len(rule.hugging_face))
        for key, rule in rules.items()
        if rule is not None
        for part, name in enumerate(rule.hugging_face)
    }
    return ComposedCheckpoint(checkpoint.name, pieces, {"": checkpoint})


def own_key(name: str) -> str | None:
    """Return open_clip's name for a Hugging Face tensor, or for the tensor that it is a part of; None if unknown."""
    rule = _rule(name, of_open_clip=False)
    return None if rule is None else rule.open_clip


def _rule(name: str, *, of_open_clip: bool) -> NameRule | None:
    """Return the rule of one tensor with the tensor's numbers in the place of the patterns'."""
    for rule in _RULES:
        for pattern in (rule.open_clip,) if of_open_clip else rule.hugging_face:
            if (match := _compiled(pattern).fullmatch(name)) is not None:
                fields = match.groupdict()
                hugging_face = tuple(part.format(**fields) for part in rule.hugging_face)
                return NameRule(rule.open_clip.format(**fields), hugging_face, rule.transposed)
    return None


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    escaped = re.escape(pattern)
    return re.compile(escaped.replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{p\}", r"(?P<p>weight|bias)"))
