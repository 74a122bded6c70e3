"""Where a parameter stands in its network, read from its name: which block, and what kind of layer.

Names are all that a report has. They are read by the conventions of open_clip, timm, transformers and torchvision; what
fits none is ``other``.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

_BLOCK = re.compile(r"^(.*?\.|.*?layer|)(\d+)\.")  # transformer.resblocks.3. or layer1.0.
_STAGE = re.compile(r"^(layer\d+\.\d+)\.")  # torchvision's ResNets
_KINDS = (  # the first that matches
    ("norm", re.compile(r"(^|[._])(ln|bn|norm|layer_?norm|group_?norm)\w*(\.|$)", re.IGNORECASE)),
    ("attention", re.compile(r"attn|attention|(^|[._])(q|k|v|qkv|out)_proj", re.IGNORECASE)),
    ("MLP", re.compile(r"mlp|ffn|feed_?forward|intermediate|(^|\.)(fc\d|c_fc|c_proj|linear\d)(\.|$)", re.IGNORECASE)),
    ("embedding", re.compile(r"embed|token|(^|\.)(pos\w*|proj|patch\w*|visual_projection)(\.|$)", re.IGNORECASE)),
    ("convolution", re.compile(r"conv|downsample", re.IGNORECASE)),
)
KINDS = ("attention", "MLP", "norm", "convolution", "embedding", "other")
_END = re.compile(r"^proj$|(^|[._])(post\w*|ln_final|head|fc|pooler|norm|fc_norm|visual_projection|classifier)(\.|$)")


@dataclass(frozen=True, order=True)
class ParameterPlace:
    """A parameter's place; places sort by depth.

    Attributes:
        order: Sorts: the stem, the blocks by number, what comes after them.
        block: Short name of the block, such as ``3``, ``stem`` or ``end``.
        kind: One of :data:`KINDS`.
    """

    order: tuple[int, tuple[int, ...]]
    block: str
    kind: str


def place_of(name: str) -> ParameterPlace:
    """Read a parameter's name.

    >>> place_of("transformer.resblocks.11.attn.in_proj_weight").block
    '11'
    >>> [place_of(name).kind for name in ("blocks.0.ln_1.weight", "conv1.weight", "blocks.2.mlp.c_fc.bias")]
    ['norm', 'convolution', 'MLP']
    """
    kind = next((kind for kind, pattern in _KINDS if pattern.search(name)), "other")
    match = _STAGE.match(name) or _BLOCK.match(name + ".")
    if match is None:
        is_end = _END.search(name) is not None
        return ParameterPlace((2 if is_end else 0, ()), "end" if is_end else "stem", kind)
    numbers = tuple(map(int, re.findall(r"\d+", match[0])))
    return ParameterPlace((1, numbers), ".".join(map(str, numbers)), kind)


def by_depth(names: Iterable[str]) -> list[str]:
    """Return parameter names from the stem to the end; within a block they keep their order."""
    return sorted(names, key=lambda name: place_of(name).order)


def are_parameters(names: Iterable[str]) -> bool:
    """Whether labels of coefficients are names of parameter tensors, not of blocks or groups of the user's.

    >>> are_parameters(["conv1.weight", "blocks.0.mlp.fc1.bias"]), are_parameters(["stem", "blocks.0"])
    (True, False)
    """
    return any(re.search(r"(weight|bias)$", name) for name in names)
