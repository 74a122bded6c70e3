"""A merged model of which each process holds a part: for models that do not fit one device."""

import torch

from adamerge.model.merged_model import MergedModel
from adamerge.model.sharding import ShardedWeights
from adamerge.system import ranks


class ShardedModel(MergedModel):
    """Base, task vectors, merged weights and their gradients in parts, one on each process.

    A model like :class:`MergedModel`, with its arguments, until :meth:`to_device` finds several processes and cuts the
    encoder, which from then on is changed.

    The pool should be a mapped one (``ExpertPool.from_files(..., mapped=True)``).
    """

    def to_device(self, device: torch.device | str) -> "ShardedModel":
        """Cut the encoder, read this process's part of the pool, and move all to the device."""
        if ranks.count() > 1 and not self.is_sharded:
            self.pool.to("cpu")
            self.weights = ShardedWeights(self.encoder, self.pool, self.coefficients.index, torch.device(device))
        super().to_device(device)
        return self
