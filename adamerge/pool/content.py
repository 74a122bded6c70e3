"""What a pool's tensors must not be: infinite, the base's own, or two experts' alike. E experts, P parameters."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.errors import InputError
from adamerge.pool.options import PoolOptions


def check_finite(tensor: Tensor, where: str, key: str) -> None:
    """Refuse a checkpoint's tensor with NaN or infinite values.

    Raises:
        InputError: If it has any.
    """
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
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
        norms: Of the task vectors, by parameter, (E,).
        experts: Name to checkpoint.
        base: What the base is called.
        options: Of the pool.
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
