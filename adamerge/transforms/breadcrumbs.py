"""Model Breadcrumbs: drop outliers and small entries, keep the middle."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adamerge.errors import InputError, check_choice, check_number


@dataclass(frozen=True)
class Breadcrumbs:
    r"""Zero the largest magnitudes of each task vector, keep the next largest, zero the rest.

    :math:`\tau'_e = \tau_e [r n \le \mathrm{rank}(|\tau_e|) < (r + k) n]`, with r ``remove``, k ``keep``, ranks from
    the largest; counts are ``int(share * n)``. Tensors without dimensions are left as they are (they have no middle).
    Cost: one sort per parameter.

    Args:
        keep: Share of n that stays, in (0, 1].
        remove: Share of n that is zeroed from the top, in [0, 1).
        scope: n counts a ``tensor`` (the paper's layer; at least one entry stays), or a ``row`` along the last
            dimension (the authors' code; rows with fewer than 1 / keep entries, such as small kernels', become zero).

    Reference:
        Davari and Belilovsky, Model Breadcrumbs, arXiv:2312.06795; keep 0.2 and remove 0.1 are the example of the
        authors' code.
    """

    keep: float = 0.2
    remove: float = 0.1
    scope: Literal["tensor", "row"] = "tensor"

    def __post_init__(self) -> None:
        check_number("transform.keep", self.keep, 0, 1, above=True)
        check_number("transform.remove", self.remove, 0, 1, below=True)
        check_choice("transform.scope", self.scope, ("tensor", "row"))
        if self.keep + self.remove > 1 + 1e-9:
            raise InputError(
                f"transform.keep, transform.remove: expected a sum of at most 1, found {self.keep} + {self.remove}."
            )

    def __call__(self, name: str, task_vectors: Tensor) -> Tensor:
        """Return the middle of each task vector."""
        if task_vectors.ndim == 1:
            return task_vectors
        rows = task_vectors if self.scope == "row" else task_vectors.reshape(len(task_vectors), -1)
        size = rows.shape[-1]
        keep, first = int(self.keep * size), int(self.remove * size)
        keep = max(keep, 1) if self.scope == "tensor" else keep
        order = rows.abs().argsort(dim=-1, descending=True, stable=True)[..., first : first + keep]
        mask = torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, order, True)
        return rows.masked_fill(~mask, 0).view_as(task_vectors)
