"""What is in a pool: sizes, hashes, norms and cosines."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


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
