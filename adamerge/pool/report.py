"""What is in a pool: sizes, hashes, norms and cosines."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adamerge.checkpoints.checkpoint import Checkpoint


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
