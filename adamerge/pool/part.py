"""The part of a pool that one of several processes holds.

Merging is elementwise, so a process that has some entries of base and task vectors can merge these, and contract the
gradient of these, without the others. Legend: E experts, n entries of the part of one parameter.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from adamerge.pool.low_rank import Factors
from adamerge.pool.pool import ExpertPool
from adamerge.pool.stacks import Dense, Factored
from adamerge.pool.task_vectors import TaskVectors


class PoolPart:
    """Some entries of every merged parameter, in memory: what merge and adjoint read of a pool.

    Task vectors are kept as the pool gives them; integers are expanded.

    Args:
        pool: On the CPU; a mapped one, so that the processes do not each hold all of it besides.
        ranges: Parameter name to entries of the flattened parameter, whole rows, for those that the part has.
        directions: Number of leading singular directions by parameter, where these are kept.

    Attributes:
        names: Those parameters.
        expert_names: The pool's experts.
        compute_dtype: The pool's dtype for computing.
        base: Name to tensor (n,) in ``compute_dtype``.
        ranges: As given.
        device: Where tiles are wanted.
    """

    def __init__(
        self, pool: ExpertPool, ranges: Mapping[str, range], directions: Mapping[str, int] | None = None
    ) -> None:
        self.names, self.expert_names, self.compute_dtype = tuple(ranges), pool.expert_names, pool.compute_dtype
        self.ranges = dict(ranges)
        self.device = torch.device("cpu")
        self.base: dict[str, Tensor] = {}
        dtype = pool.compute_dtype
        if pool.packed is not None and pool.packed.dtype.is_floating_point:
            dtype = pool.packed.dtype
        experts = len(pool.expert_names)
        size = sum(map(len, self.ranges.values())) * experts * dtype.itemsize
        self._task_vectors = TaskVectors(experts, pool.options.storage, "ram", size, dtype, pool.compute_dtype)
        for name, entries in self.ranges.items():
            self.base[name] = pool.base[name].view(-1)[entries.start : entries.stop].clone()
            if (factors := pool.factors(name, (directions or {}).get(name, 0))) is not None:
                width = factors.down.shape[1]
                rows = factors.rows(entries.start // width, entries.stop // width)
                self._task_vectors.stacks[name] = Factored(rows)
                continue
            stack = Dense.empty(experts, len(entries), dtype, self.device)
            for where, tile in pool.pieces(name, entries):
                stack.data[:, where.start - entries.start : where.stop - entries.start].copy_(tile)
            self._task_vectors.stacks[name] = stack

    @property
    def nbytes(self) -> int:
        """Bytes of base and task vectors."""
        return self._task_vectors.nbytes + sum(tensor.nbytes for tensor in self.base.values())

    def tile(self, name: str, start: int, stop: int, *, reuse: bool = False) -> Tensor:
        """Return task vectors (E, stop - start), as :meth:`~adamerge.ExpertPool.tile` does; entry 0 is the part's.

        Args:
            name: The parameter.
            start: First entry.
            stop: End, exclusive.
            reuse: Whether the result may be overwritten by the next call.
        """
        return self._task_vectors.tile(name, start, stop, self.base[name], reuse)

    def factors(self, name: str, directions: int = 0) -> Factors | None:
        """Return the products that this process has some rows of: directions, where these are kept; else None."""
        return self._task_vectors.factors(name)

    def to(self, device: torch.device) -> "PoolPart":
        """Move to a device, in place; with ``pool.storage=ram`` the task vectors stay in the host's memory."""
        self.device = device
        self.base = {name: tensor.to(device) for name, tensor in self.base.items()}
        self._task_vectors.to(device, self.base)
        return self
