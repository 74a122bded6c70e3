"""The merge and its adjoint where task vectors are products of thin matrices: nothing of their full size is formed.

    theta = theta0 + sum_e lambda_e up_e down_e,    dL/dlambda_e = <dL/dtheta, up_e down_e>

Coefficients per row scale the rows of ``up``, those per column the columns of ``down``, those per singular direction
what lies between the factors; one for the whole is a single run of rows. Legend: R ranks of all experts, E experts,
G groups; a parameter is a matrix (d, w).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from adamerge.model.groups import Segment
from adamerge.pool.low_rank import Factors, exact_products, matrix_shape
from adamerge.pool.part import PoolPart
from adamerge.pool.pool import ExpertPool


def fits(segment: Segment, width: int) -> bool:
    """Whether a segment's groups are runs of whole rows, or of whole columns, of a matrix with rows of ``width``."""
    return segment.start % width == 0 and (is_by_rows(segment, width) or segment.groups * segment.inner == width)


def merge_segment(target: Tensor, base: Tensor, factors: Factors, segment: Segment, weights: Tensor) -> None:
    """Write one segment of the merge.

    Args:
        target: The flattened parameter (n,), overwritten there.
        base: The base's (n,).
        factors: All experts'.
        segment: One that :func:`fits`.
        weights: Coefficients (G, E).
    """
    width = factors.down.shape[1]
    rows = _rows(segment, width)
    scales = scales_of(factors, segment, weights[segment.first : segment.first + segment.span].t())
    up, down = scaled(factors, segment, scales)
    with exact_products():
        torch.addmm(base.view(-1, width)[rows], up, down, out=target.view(-1, width)[rows])


def factors_of(pool: ExpertPool | PoolPart, name: str, segments: Sequence[Segment]) -> Factors | None:
    """Return a parameter's factors, its directions where these are the groups; None where it is merged densely."""
    return pool.factors(name, segments[0].directions) if segments else None


def scales_of(factors: Factors, segment: Segment, values: Tensor) -> Tensor:
    """Return a segment's coefficients by rank, (groups, R), of those by expert, (E, groups or directions)."""
    if segment.directions:
        return values[factors.owner, factors.position].unsqueeze(0)
    return values[factors.owner].t()


def scaled(factors: Factors, segment: Segment, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors, ``up`` of the segment's rows only, with its coefficients (groups, R) in one of them."""
    width, groups = factors.down.shape[1], segment.groups
    up, down = factors.up[_rows(segment, width)], factors.down
    if is_by_rows(segment, width):
        return (up.unflatten(0, (groups, -1)) * scales.unsqueeze(1)).flatten(0, 1), down
    return up, (down.unflatten(1, (groups, -1)) * scales.t().unsqueeze(2)).flatten(1)


def scaled_whole(factors: Factors, segments: Sequence[Segment], scales: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the factors of a parameter whose groups are :func:`is_expressible`, scaled segment by segment."""
    terms = [scaled(factors, segment, scale) for segment, scale in zip(segments, scales, strict=True)]
    return (torch.cat([up for up, _ in terms]) if len(terms) > 1 else terms[0][0]), terms[0][1]


def pull_back_segment(result: Tensor, gradient: Tensor, factors: Factors, segment: Segment) -> None:
    """Add one segment's inner products to ``result`` (G, E); ``gradient`` is the parameter's, (n,)."""
    width = factors.down.shape[1]
    rows, groups = _rows(segment, width), segment.groups
    piece, up = gradient.view(-1, width)[rows], factors.up[rows]
    with exact_products():
        if is_by_rows(segment, width):
            by_rank = ((piece @ factors.down.t()) * up).unflatten(0, (groups, -1)).sum(1)
        else:
            by_rank = ((up.t() @ piece) * factors.down).unflatten(1, (groups, -1)).sum(2).t()
        if segment.directions:
            result[segment.first + factors.position, factors.owner] += by_rank[0]
        else:
            result[segment.first : segment.first + groups] += by_rank @ factors.members


def is_expressible(segments: Sequence[Segment], shape: Sequence[int]) -> bool:
    """Whether a parameter's groups are runs of whole rows, or one set of columns of all rows: those of its factors."""
    rows, width = matrix_shape(shape)
    if all(fits(segment, width) and is_by_rows(segment, width) for segment in segments):
        return True
    return len(segments) == 1 and fits(segments[0], width) and segments[0].outer == rows


def _rows(segment: Segment, width: int) -> slice:
    return slice(segment.start // width, segment.stop // width)


def is_by_rows(segment: Segment, width: int) -> bool:
    """Whether a segment's groups are runs of whole rows of ``width``."""
    return segment.outer == 1 and segment.inner % width == 0
