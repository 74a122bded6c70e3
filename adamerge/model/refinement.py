"""From coefficients learned before to a finer start: which tensors get how many, and with which values.

Legend: E experts, G groups, n entries of a flattened parameter, L merged parameter tensors.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from adamerge.errors import InputError, check_number
from adamerge.model.coefficients import Coefficients
from adamerge.model.granularity import Chunk
from adamerge.model.groups import Granularity, GroupIndex, Segment, Shapes
from adamerge.pool.pool import ExpertPool
from adamerge.pool.tiles import CACHED, tiles

log = logging.getLogger(__name__)


@runtime_checkable
class Refinement(Protocol):
    """A granularity that depends on coefficients learned before, by a first stage or read from a file."""

    def refine(self, pool: ExpertPool, coefficients: Coefficients) -> Granularity:
        """Return the granularity that follows from coefficients of this pool."""
        ...


@dataclass(frozen=True)
class ImportanceChunks:
    r"""Chunks for the tensors that matter: the second stage of Expert Merging++.

    :math:`I_\ell \propto \sum_k |\alpha_k^\ell| \cdot \mathrm{mean}|\tau_k^\ell| \cdot n_\ell`, which sum to 1, and
    :math:`m_\ell = \lfloor B L\, I_\ell^\kappa / \sum_j I_j^\kappa \rfloor` contiguous pieces of the flattened
    tensor, each with a coefficient per expert. A tensor with :math:`m_\ell = 0` is frozen at the value it has.
    Because of n the importance is an L1 mass, so large matrices win by size; kappa < 1 evens that out.

    The budget B multiplies the number L of merged tensors: read without it, the paper's values of B (0.9 to 1.2)
    would give no tensor a chunk. kappa is not known from the paper; 1 is our choice. The released code has neither
    importance nor allocation, but a table of pieces by hand, in which 0 freezes a tensor at its initial value. To have
    that: ``granularity=chunk granularity.pieces={NAME: NUMBER}`` without a first stage.

    Args:
        budget: B, > 0: chunks per tensor, on average and at most.
        kappa: Exponent, >= 0; 0 spends the budget evenly.

    Reference:
        Expert Merging++, ICLR 2026, arXiv:2509.25712, importance-guided chunking.
    """

    budget: float = 1.0
    kappa: float = 1.0

    def __post_init__(self) -> None:
        check_number("granularity.budget", self.budget, 0, above=True)
        check_number("granularity.kappa", self.kappa, 0)

    def __call__(self, shapes: Shapes) -> GroupIndex:
        """Refuse: names and shapes alone do not say what matters.

        Raises:
            InputError: Always.
        """
        raise InputError(
            "granularity: ImportanceChunks needs coefficients learned before. Add a first stage "
            "('first_stage={steps: 75, granularity: {_target_: adamerge.model.granularity.Layer}}'), or start from a "
            "file: init=coefficients.json."
        )

    def refine(self, pool: ExpertPool, coefficients: Coefficients) -> Chunk:
        """Return the chunks that the budget buys.

        Raises:
            InputError: If it buys none at all.
        """
        wanted = allocate(importance(pool, coefficients), self.budget, self.kappa)
        pieces = {name: min(number, pool.base[name].numel()) for name, number in wanted.items()}
        frozen = sum(number == 0 for number in pieces.values())
        if frozen == len(pieces):
            raise InputError(
                f"granularity.budget: {self.budget} leaves all {frozen} tensors without a chunk, so that nothing could "
                "be trained. Raise it, or granularity.kappa."
            )
        chunks, chunked = sum(pieces.values()), len(pieces) - frozen
        log.info("Chunks by importance: %d in %d tensors, %d tensors frozen", chunks, chunked, frozen)
        return Chunk(pieces)


@torch.no_grad()
def importance(pool: ExpertPool, coefficients: Coefficients) -> dict[str, float]:
    """Return each parameter's share of the weighted task vectors' L1 mass; the shares sum to 1.

    That is ``sum_k |alpha_k| mean|tau_k| n`` where a parameter has one coefficient per expert, and its sum over the
    groups where it has several. One pass over the task vectors, a tile at a time; sums in float64.
    """
    if coefficients.index.directions:
        raise InputError(
            "granularity: importance goes by entries of tensors, and the coefficients to start from by their singular "
            "directions (granularity=rank). Start from those of another granularity, such as layer."
        )
    values = coefficients().detach().abs().to(pool.device)  # (E, G)
    mass = dict.fromkeys(pool.names, 0.0)
    for name in pool.names:
        for start, stop in tiles(range(pool.base[name].numel()), CACHED):
            weights = values[:, _group_ids(coefficients.index.segments[name], start, stop, values.device)]
            weights *= pool.tile(name, start, stop, reuse=True).abs()
            mass[name] += weights.sum(dtype=torch.float64).item()
    total = sum(mass.values())
    if total == 0:  # all coefficients are 0
        raise InputError(
            "granularity: all coefficients of the first stage are 0, so no tensor is more important than another. "
            "Look at its objective, or use granularity=chunk."
        )
    return {name: value / total for name, value in mass.items()}


def allocate(importance: Mapping[str, float], budget: float, kappa: float) -> dict[str, int]:
    """Return the number of chunks of each tensor, which sum to at most ``budget`` times the number of tensors.

    >>> allocate({"up": 0.7, "down": 0.2, "bias": 0.1}, budget=2.0, kappa=1.0)
    {'up': 4, 'down': 1, 'bias': 0}
    """
    most = max(importance.values())  # divided by, so that a large kappa does not underflow everywhere
    powers = {name: (value / most) ** kappa for name, value in importance.items()}
    share = budget * len(powers) / sum(powers.values())
    # Rounding must not turn a whole number into the one below: 49 x (1 / 49) < 1.
    return {name: math.floor(share * power * (1 + 1e-9)) for name, power in powers.items()}


@torch.no_grad()
def transfer(coefficients: Coefficients, index: GroupIndex) -> Tensor:
    """Return coefficients (E, G) of other groups: each the mean over its entries of the coefficients they have.

    Where a new group lies within one old group the value is the old one, exactly, so that the merge stays the same.
    Directions of a tensor, to which all its entries belong, have its mean.

    Raises:
        InputError: If the old groups are directions, and the new ones are others.
    """
    old = coefficients().detach().cpu()
    sums = torch.zeros(len(old), index.size, dtype=torch.float64)
    counts = torch.zeros(index.size, dtype=torch.float64)
    for name, segments in index.segments.items():
        own = coefficients.index.segments[name]
        if own and own[0].directions:
            new, former = _directions(name, segments, own[0])
            sums[:, new], counts[new] = old[:, former].double(), 1
            continue
        entries = max((segment.stop for segment in segments), default=0)
        for start, stop in tiles(range(entries), CACHED):
            before = _group_ids(own, start, stop, old.device)
            after = _group_ids(segments, start, stop, old.device)
            sums.index_add_(1, after, old[:, before].double())
            counts += torch.bincount(after, minlength=index.size)
        for segment in segments:
            if segment.directions:
                groups = slice(segment.first, segment.first + segment.span)
                sums[:, groups], counts[groups] = sums[:, segment.first, None], counts[segment.first].clone()
    return (sums / counts.clamp(min=1)).to(old.dtype)


def _directions(name: str, segments: Sequence[Segment], old: Segment) -> tuple[slice, slice]:
    """Return the groups of a tensor's directions, the new and the old ones."""
    if not segments or segments[0].directions != old.directions:
        raise InputError(
            f"init: the coefficients to start from are of {old.directions} singular directions of {name!r} "
            "(granularity=rank), which the new groups are not. Take the granularity and the experts that they have."
        )
    new = segments[0]
    return slice(new.first, new.first + new.span), slice(old.first, old.first + old.span)


def _group_ids(segments: Iterable[Segment], start: int, stop: int, device: torch.device) -> Tensor:
    """Return the groups of entries ``start:stop`` of a flattened parameter, (stop - start,)."""
    ids = torch.empty(stop - start, dtype=torch.long, device=device)
    for segment in segments:
        first, last = max(start, segment.start), min(stop, segment.stop)
        if first < last:
            at = torch.arange(first - segment.start, last - segment.start, device=device)
            ids[first - start : last - start] = segment.first + at // segment.inner % segment.groups
    return ids
