"""What is in a pool: sizes, hashes, norms and cosines; and what its tensors must not be: infinite, or alike.

E experts, P parameters.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.errors import InputError
from adamerge.pool.options import PoolOptions
from adamerge.system.finite import is_finite


@dataclass(frozen=True)
class PoolReport:
    """What is in a pool.

    Attributes:
        experts: Expert name to ``source``, ``sha256``, ``norm`` (of the whole task vector) and
            ``relative_norm`` (to the norm of the base's merged parameters).
        parameters: Number of merged parameter tensors, and of their entries.
        entries: Number of entries of the merged parameters.
        skipped: Tensor name (as in the base file) to why it is not merged.
        cosines: Cosines between task vectors, (E, E).
        norms: Norm of each expert's task vector by parameter, name to (E,).
        base_norms: Norm of each of the base's merged parameters.
        storage: Where the task vectors are: ``device``, ``ram``, ``stream`` or ``packed``.
        bytes: Memory that they hold; mapped files count as none.
        dtype: That they are kept in.
        transform: What was done to them: the transform, a packed file's description of it, or None.
    """

    experts: Mapping[str, Mapping[str, str | float]]
    parameters: int
    entries: int
    skipped: Mapping[str, str]
    cosines: Tensor
    norms: Mapping[str, Tensor]
    base_norms: Mapping[str, float]
    storage: str
    bytes: int
    dtype: str
    transform: Any


def pool_report(
    experts: Mapping[str, Checkpoint],
    base: Mapping[str, Tensor],
    tiles: Iterable[tuple[str, Tensor]],
    hashes: Mapping[str, str],
    **facts: Any,
) -> PoolReport:
    """Return sizes, norms and cosines of a pool, from one pass over its task vectors.

    Args:
        experts: Name to checkpoint.
        base: The merged parameters.
        tiles: Name and task vectors (E, k), of all of them.
        hashes: SHA-256 by expert.
        facts: The report's other attributes.
    """
    gram = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    for _, tile in tiles:
        gram += (tile @ tile.T).cpu().double()
    norms = gram.diagonal().sqrt()
    base_norms = {name: torch.linalg.vector_norm(w, dtype=torch.float64).item() for name, w in base.items()}
    scale = math.hypot(*base_norms.values())
    by_expert = {
        name: {"source": checkpoint.name, "sha256": hashes[name], "norm": norm, "relative_norm": norm / scale}
        for (name, checkpoint), norm in zip(experts.items(), norms.tolist(), strict=True)
    }
    entries = sum(tensor.numel() for tensor in base.values())
    return PoolReport(
        experts=by_expert, parameters=len(base), entries=entries, cosines=gram / torch.outer(norms, norms),
        base_norms=base_norms, **facts,
    )  # fmt: skip


def check_finite(tensor: Tensor, where: str, key: str) -> None:
    """Refuse a checkpoint's tensor with NaN or infinite values.

    Raises:
        InputError: If it has any.
    """
    if not is_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise InputError(
            f"{where}: tensor {key!r} holds {bad} NaN or infinite values of {tensor.numel()}. "
            "The checkpoint is damaged or diverged in training; use another one."
        )


def check_norms(norms: Tensor, key: str, experts: Mapping[str, Checkpoint], dtype: str) -> None:
    """Refuse norms of one parameter's task vectors, (E,), that are not finite.

    Raises:
        InputError: If an expert's tensor is not finite, or overflows in the ``dtype`` of task vectors.
    """
    if torch.isfinite(norms).all():
        return
    expert = list(experts)[int((~torch.isfinite(norms)).nonzero()[0])]
    check_finite(experts[expert].get(key), experts[expert].name, key)
    raise InputError(
        f"pool.dtype: {dtype} overflows in the task vector of expert {expert!r}, tensor {key!r}. "
        "Use bfloat16 or float32, and check the file if that fails too."
    )


def norms_of(tiles: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the norms of one parameter's task vectors, (E,), from tiles (E, k)."""
    # Without a float64 copy of each tile: between small tensors that stay, such copies fragment the heap.
    squares = sum(torch.linalg.vector_norm(tile, dim=1, dtype=torch.float64).square() for tile in tiles)
    return torch.as_tensor(squares).sqrt().to(dtype)


def check_differ(
    norms: Mapping[str, Tensor],
    experts: Mapping[str, Checkpoint],
    base: str,
    options: PoolOptions,
    are_equal: Callable[[int, int], bool],
) -> None:
    """Refuse experts that are the base, or (a coefficient would count twice) each other.

    Args:
        norms: Norms of the task vectors, by parameter, (E,).
        experts: Name to checkpoint.
        base: What the base is called.
        options: The options of the pool.
        are_equal: Whether two experts' task vectors are the same.

    Raises:
        InputError: If any is.
    """
    if not norms:
        raise InputError(
            f"Every expert is identical to the base {base}{options.after}: all task vectors are zero. "
            "Are the experts the fine-tuned files?"
        )
    stacked, names = torch.stack(list(norms.values())), list(experts)  # (P, E)
    for row, expert in enumerate(names):
        if not stacked[:, row].any():
            raise InputError(
                f"Expert {expert!r} ({experts[expert].name}) is identical to the base {base}{options.after}: its task "
                "vector is zero. Remove it or name its fine-tuned file."
            )
        for earlier in range(0 if options.duplicates == "allow" else row):
            if torch.equal(stacked[:, row], stacked[:, earlier]) and are_equal(row, earlier):
                raise InputError(
                    f"Experts {names[earlier]!r} and {expert!r} have identical weights{options.after} "
                    f"({experts[expert].name}). Remove one or name its own file; "
                    "if both are wanted, set pool.duplicates=allow."
                )
