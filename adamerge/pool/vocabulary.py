"""Pools in which one expert has further tokens: shared rows merge, further ones are that expert's."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.errors import InputError, shorten
from adamerge.system.files import combined_hash


@dataclass
class WithFurtherRows:
    """A checkpoint some of whose tensors go on with the rows that another has beyond theirs.

    Attributes:
        checkpoint: Whose tensors they are.
        longer: Whose further rows they get.
        extended: The tensors that are shorter than those of ``longer``.
    """

    checkpoint: Checkpoint
    longer: Checkpoint
    extended: frozenset[str]

    def __post_init__(self) -> None:
        self.name = self.checkpoint.name  # for messages

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the checkpoint's tensor names."""
        return self.checkpoint.keys

    def spec(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return shape and dtype of a tensor."""
        shape, dtype = self.checkpoint.spec(key)
        return (self.longer.spec(key)[0] if key in self.extended else shape), dtype

    def get(self, key: str) -> Tensor:
        """Return a tensor on the CPU, further rows in the dtype of the others."""
        tensor = self.checkpoint.get(key)
        if key not in self.extended:
            return tensor
        return torch.cat([tensor, self.longer.get(key)[len(tensor) :].to(tensor.dtype)])

    def sha256(self) -> str:
        """Hash the two files' hashes into one."""
        return combined_hash({"": self.checkpoint.sha256(), "further rows": self.longer.sha256()})


def longest(base: Checkpoint, experts: Mapping[str, Checkpoint], keys: Collection[str]) -> str | None:
    """Return the expert that has more rows than the base; None where none has.

    Args:
        base: The base.
        experts: By name.
        keys: The tensors that may be longer, by the base's names.

    Raises:
        InputError: If several have.
    """
    present = set(base.keys)
    wanted = [key for key in keys if key in present]
    rows = {
        name: max((checkpoint.spec(key)[0][0] - base.spec(key)[0][0] for key in wanted if key in own), default=0)
        for name, checkpoint in experts.items()
        for own in (set(checkpoint.keys),)
    }
    longer = [name for name, count in rows.items() if count > 0]
    if len(longer) > 1:
        raise InputError(
            f"backbone.vocabulary=shared: expected one expert with further tokens, found {shorten(longer)}: which rows "
            "belong together is not known. Leave all but one of them out, or give them one tokenizer and train again."
        )
    return longer[0] if longer else None


def with_further_rows(checkpoint: Checkpoint, longer: Checkpoint, keys: Collection[str]) -> Checkpoint:
    """See a checkpoint with the further rows of another; one that has them stays as it is.

    Args:
        checkpoint: The base, or an expert.
        longer: The expert that has them.
        keys: The tensors that may be longer.
    """
    own, others = set(checkpoint.keys), set(longer.keys)
    shared = [key for key in keys if key in own and key in others]
    shorter = frozenset(key for key in shared if checkpoint.spec(key)[0][0] < longer.spec(key)[0][0])
    return WithFurtherRows(checkpoint, longer, shorter) if shorter else checkpoint
