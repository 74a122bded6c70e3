"""What kind of tensor a parameter is, told by its name and shape, for rules that treat kinds in their own ways.

Names are read by the conventions of open_clip, transformers, timm and torchvision.
"""

import fnmatch
import re
from collections.abc import Sequence
from typing import Literal

Kind = Literal["embedding", "position", "norm", "head", "projection", "convolution", "matrix", "vector", "other"]

_OUTSIDE = r"^(?:[a-z]\w*\.)*?"  # of numbered blocks, whose names have a part that begins with a digit
_POSITION = re.compile(r"(^|[._])(pos_?emb\w*|position\w*|wpe|rel_pos\w*|rel_embeddings|relative_\w+)(\.weight)?$")
_EMBEDDING = re.compile(r"(^|\.)(?!patch)(\w+_)?(embed|embeddings?|embed_tokens|wte|shared|tokens?)(\.weight)?$")
_PROJECTION = re.compile(_OUTSIDE + r"(\w+_projection|(?<!patch_embed\.)(?<!attn_pool\.)proj)(\.weight)?$")
_HEAD = re.compile(
    _OUTSIDE + r"(\w*classifier|\w*head|heads|head_dist|fc|score|qa_outputs|cls|vocab_\w+)\.(\w+\.)*weight$"
)
_NORM = re.compile(r"(^|\.)([^.]*norm[^.]*|(ln|bn)(_?\w+)?)\.bias$")


def kind_of(name: str, shape: Sequence[int]) -> Kind:
    """Return the kind of a parameter.

    ``embedding``: tables of tokens and of token types, and single tokens. ``position``: tables of positions, relative
    ones too. ``head``: matrices of classifiers and of language model heads. ``projection``: matrices from a tower into
    the space that it shares with others. ``norm``: scales of normalisations, and their biases where the name says so.
    All else is a ``matrix`` with two axes, a ``vector`` with fewer, and with more a ``convolution`` if it is a weight.

    >>> kind_of("transformer.wte.weight", (50257, 768)), kind_of("blocks.0.attn.qkv.weight", (2304, 768))
    ('embedding', 'matrix')
    """
    name, axes = name.lower(), len(shape)
    is_weight = name.endswith("weight")
    kinds: tuple[tuple[Kind, object], ...] = (
        ("position", _POSITION.search(name)),
        ("embedding", axes < 4 and _EMBEDDING.search(name)),
        ("norm", axes == 1 and (is_weight or _NORM.search(name))),
        ("projection", axes == 2 and _PROJECTION.match(name)),
        ("head", axes == 2 and _HEAD.match(name)),
        ("convolution", axes > 2 and is_weight),
        ("matrix", axes == 2),
        ("vector", axes < 2),
    )
    return next((kind for kind, fits in kinds if fits), "other")


def is_skipped(name: str, shape: Sequence[int], skip: Sequence[str]) -> bool:
    """Whether ``skip`` names the kind of a parameter, or has a glob that matches its name."""
    kind = kind_of(name, shape)
    return any(entry == kind or fnmatch.fnmatchcase(name, entry) for entry in skip)
