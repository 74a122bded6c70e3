"""What several rules do with a pool's task vectors.

Legend: E experts, ``*S`` the shape of one parameter.
"""

import fnmatch
from collections.abc import Sequence

import torch
from torch import Tensor

from adamerge.errors import InputError
from adamerge.pool.pool import ExpertPool


def task_vector(pool: ExpertPool, name: str, row: int) -> Tensor:
    """Return one expert's task vector of a parameter, (*S), without holding those of the others."""
    result = torch.empty_like(pool.base[name])
    flat = result.view(-1)
    for where, tile in pool.pieces(name):
        flat[where] = tile[row]
    return result


def weighted(pool: ExpertPool, name: str, weights: Sequence[float]) -> Tensor:
    """Return base + sum_e weights[e] tau[e] of a parameter, (*S).

    Summed elementwise in float64, so that the bytes do not depend on storage or threads.
    """
    result = torch.empty_like(pool.base[name])
    flat, base = result.view(-1), pool.base[name].view(-1)
    for where, tile in pool.pieces(name):
        total = base[where].to(torch.float64, copy=True)
        for vector, weight in zip(tile, weights, strict=True):
            total += vector.double() * weight
        flat[where] = total
    return result


def average(pool: ExpertPool, name: str, scale: float = 1.0) -> Tensor:
    """Return base + scale / E * sum_e tau[e] of a parameter, (*S)."""
    experts = len(pool.expert_names)
    return weighted(pool, name, [scale / experts] * experts)


def is_matrix(pool: ExpertPool, name: str, skip: Sequence[str]) -> bool:
    """Whether a parameter has two dimensions and no glob of ``skip`` matches its name."""
    return len(pool.shapes[name]) == 2 and not any(fnmatch.fnmatchcase(name, glob) for glob in skip)


def check_globs(rule: object, skip: Sequence[str]) -> None:
    """Refuse a ``skip`` that is no list of globs.

    Raises:
        InputError: If it is a single text, or holds something else.
    """
    if isinstance(skip, str) or not all(isinstance(glob, str) for glob in skip):
        raise InputError(f"{type(rule).__name__}.skip: expected a list of globs, found {skip!r}; write ['GLOB'].")


def check_range(rule: object, option: str, low: float, high: float, *, open_low: bool = False) -> None:
    """Refuse an option of a rule that is no number in [low, high], or in (low, high] with ``open_low``.

    Raises:
        InputError: If it is outside, or something else.
    """
    value = getattr(rule, option)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if (
        not number
        or not (low < value <= high if open_low else low <= value <= high)
        or value in (-torch.inf, torch.inf)
    ):
        edge = "(" if open_low else "["
        raise InputError(f"{type(rule).__name__}.{option}: expected a number in {edge}{low}, {high}], found {value!r}.")


def check_count(rule: object, option: str, low: int = 1) -> None:
    """Refuse an option of a rule that is no whole number of at least ``low``.

    Raises:
        InputError: If it is not.
    """
    value = getattr(rule, option)
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise InputError(f"{type(rule).__name__}.{option}: expected a whole number >= {low}, found {value!r}.")


def check_choice(rule: object, option: str, known: Sequence[object]) -> None:
    """Refuse an option of a rule that is none of the known words.

    Raises:
        InputError: If it is not.
    """
    value = getattr(rule, option)
    if value not in known:
        raise InputError(
            f"{type(rule).__name__}.{option}: expected one of {', '.join(map(str, known))}, found {value!r}."
        )
