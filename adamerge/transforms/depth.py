"""LiNeS: scale task vectors by the depth of their layer."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from adamerge.errors import InputError, check_number
from adamerge.system.patterns import search_all
from adamerge.transforms.protocol import Source, TransformFunction, total

BLOCK_PATTERN = r"^.*?\.\d+(?=\.)"  # of a parameter's name: everything up to the first number, transformer.resblocks.3


@dataclass(frozen=True)
class Lines:
    r"""Scale each task vector linearly with depth: shallow layers, which are shared, least.

    :math:`\tau'_e = (\alpha + \beta\, l / (L - 1)) \tau_e` for block l of L. Every tensor outside the blocks gets
    alpha: embeddings, and the final norm and projection too, as in the authors' code. LiNeS itself is this with
    ``init=1``; ``init=lines`` starts coefficients from the same numbers instead. Cost: one product per entry.

    Args:
        alpha: Scale of the first block. Default the paper's rule for multi-task merging,
            ``|sum of the raw tau|_1 / |sum of these tau|_1 / E``: 1 / E, or more after a transform that zeroes entries
            (in a :class:`~adamerge.transforms.chain.Chain`; two passes).
        beta: Increase from first to last block. The paper searches 0.1 to 1 on validation data; 0.5 is our choice.
        pattern: Regular expression whose match in a parameter's name identifies its block.

    Reference:
        Wang et al., LiNeS, arXiv:2410.17146.
    """

    alpha: float | None = None
    beta: float = 0.5
    pattern: str = BLOCK_PATTERN
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.alpha is not None:
            check_number("transform.alpha", self.alpha)
        check_number("transform.beta", self.beta)

    def prepare(self, source: Source) -> TransformFunction:
        """Return the rule, with the depth of every parameter.

        Raises:
            InputError: If no parameter belongs to a block.
        """
        alpha = _alpha(source) if self.alpha is None else self.alpha
        depths = relative_depths(source.shapes, self.pattern)
        return lambda name, task_vectors: task_vectors * (alpha + self.beta * depths[name])


def relative_depths(names: Iterable[str], pattern: str = BLOCK_PATTERN) -> dict[str, float]:
    """Return each parameter's block as a share of the depth of its tower, 0 (first block, or no block) to 1 (last).

    Blocks whose names differ only in numbers form a tower, ordered by these numbers, whatever the order of names.

    Raises:
        InputError: If the pattern is no regular expression, or matches no name.

    >>> relative_depths(["conv1", "blocks.0.w", "blocks.10.w", "blocks.2.w"])
    {'conv1': 0.0, 'blocks.0.w': 0.0, 'blocks.10.w': 1.0, 'blocks.2.w': 0.5}
    """
    names = list(names)
    blocks = blocks_of(names, pattern)
    if not blocks:
        raise InputError(
            f"pattern: {pattern!r} matches no parameter, so there are no blocks to tell depth by. "
            f"Names look like {next(iter(names), None)!r}."
        )
    towers: dict[str, set[tuple[int, ...]]] = {}
    for block in blocks.values():
        towers.setdefault(_tower(block), set()).add(_numbers(block))
    ordered = {tower: sorted(members) for tower, members in towers.items()}

    def depth(name: str) -> float:
        if name not in blocks:
            return 0.0
        members = ordered[_tower(blocks[name])]
        return members.index(_numbers(blocks[name])) / max(len(members) - 1, 1)

    return {name: depth(name) for name in names}


def blocks_of(names: Iterable[str], pattern: str, option: str = "pattern") -> dict[str, str]:
    """Return the block of each parameter whose name has one: what a regular expression matches of it.

    Raises:
        InputError: If the pattern is no regular expression, or takes too long to match.
    """
    return search_all({option: pattern}, names)[option]


def _alpha(source: Source) -> float:
    """Return the paper's rule: how much smaller the sum is than that of the raw task vectors, over E."""
    raw = getattr(source, "original", source)
    ratio = 1.0 if raw is source else _norm_of_sum(raw) / max(_norm_of_sum(source), 1e-300)
    return ratio / len(source.expert_names)


def _norm_of_sum(source: Source) -> float:
    return sum(total(tile).double().abs().sum().item() for _, tile in source.tiles())


def block_order(block: str) -> tuple[str, tuple[int, ...]]:
    """Return what sorts blocks by depth: their tower, then their numbers; files may list block 10 before block 2.

    >>> sorted(["blocks.10", "blocks.2"], key=block_order)
    ['blocks.2', 'blocks.10']
    """
    return _tower(block), _numbers(block)


def _tower(block: str) -> str:
    return re.sub(r"\d+", "#", block)


def _numbers(block: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", block))
