"""Keep entries of each task vector by their magnitude, zero the others."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adamerge.errors import InputError, check_choice, check_number
from adamerge.transforms.protocol import Source, TransformFunction, entries, per_expert
from adamerge.transforms.selection import keep_largest, kth_magnitude


@dataclass(frozen=True)
class Trim:
    """Keep the largest entries of each expert's task vector, parameter by parameter, and zero the others.

    Exactly ``int(density * n)`` of n entries stay, at least one; of equal magnitudes the first ones stay. No tensor
    is skipped; a tensor of one value keeps it. Cost: one selection per parameter.

    Args:
        density: Share of the entries that stays, in (0, 1].

    Reference:
        Yadav et al., TIES-Merging, arXiv:2306.01708, the trim step, with the threshold taken per parameter
        (the paper's is over the whole model: :class:`~adamerge.transforms.ties.Ties`).
    """

    density: float = 0.2

    def __post_init__(self) -> None:
        check_number("transform.density", self.density, 0, 1, above=True)

    def __call__(self, name: str, task_vectors: Tensor) -> Tensor:
        """Return the trimmed task vectors."""
        flat = task_vectors.reshape(len(task_vectors), -1)
        for row in flat:
            keep_largest(row, max(1, int(self.density * flat.shape[1])))
        return flat.view_as(task_vectors)


@dataclass(frozen=True)
class Magnitude:
    r"""Magnitude pruning: drop the smallest entries of each task vector, and rescale the rest where asked.

    :math:`\tau'_{e} = \tau_e [|\tau_e| > m_e] / (1 - p)`, m_e the ``int(p n)``-th smallest of n magnitudes (equal ones
    are dropped too), n counted per parameter or over the whole model. No tensor is skipped, but a parameter with
    fewer than 1 / p entries loses none under ``scope="tensor"``. Cost: one selection per parameter, or three passes.

    Args:
        drop: p, the share of the entries that is dropped, in [0, 1).
        scope: Threshold per ``tensor``, or one per expert over the ``model``.
        rescale: Whether to divide by 1 - p, as DARE does.

    Reference:
        The magnitude baseline of Yu et al., DARE, arXiv:2311.03099; released code (MergeLM), per tensor.
    """

    drop: float = 0.8
    scope: Literal["tensor", "model"] = "tensor"
    rescale: bool = False

    def __post_init__(self) -> None:
        check_number("transform.drop", self.drop, 0, 1, below=True)
        check_choice("transform.scope", self.scope, ("tensor", "model"))

    @property
    def elementwise(self) -> bool:
        """Whether thresholds are known beforehand."""
        return self.scope == "model"

    def prepare(self, source: Source) -> TransformFunction:
        """Return the rule, after finding the thresholds where they are the model's."""
        rank = int(self.drop * entries(source)) if self.scope == "model" else 0
        model_threshold = kth_magnitude(source, rank) if rank else None

        def rule(name: str, task_vectors: Tensor) -> Tensor:
            magnitudes = task_vectors.abs()
            flat = magnitudes.reshape(len(magnitudes), -1)
            threshold = model_threshold
            if self.scope == "tensor" and (k := int(self.drop * flat.shape[1])):
                threshold = flat.kthvalue(k, dim=1).values
            if threshold is not None:
                task_vectors = task_vectors.masked_fill(magnitudes <= per_expert(threshold, magnitudes), 0)
            return task_vectors / (1 - self.drop) if self.rescale else task_vectors

        return rule


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
