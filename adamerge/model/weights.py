"""The parameters that an encoder runs on, where this process holds all of them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from adamerge.data.batch import Inputs, Outputs
from adamerge.model.coefficients import Coefficients
from adamerge.model.encoder import MicroBatch, embedding_width, fused, swapped
from adamerge.model.groups import GroupIndex
from adamerge.model.merge import PullBack, merge, merge_into
from adamerge.pool.lazy import LazyTensors
from adamerge.pool.pool import ExpertPool


class WholeWeights:
    """Whole parameters; :class:`~adamerge.model.sharding.ShardedWeights` does the same with parts of them.

    Args:
        encoder: The network that lends its code.
        pool: Base and experts.
        index: The groups of the coefficients.
        dtype: Of parameters with two or more dimensions; None: all are as the pool computes.

    Attributes:
        dtype: As given.
        leaves: The merged parameters by name, which every merge overwrites.
        gives_gradients: Whether a step's backward pass gives the gradient of every merged parameter.
        base_dtype: What weights of the base are held in: ``float32`` as the pool computes, ``int8`` or ``nf4``.
    """

    is_sharded = False
    base_dtype = "float32"
    dtype: torch.dtype | None = None
    gives_gradients = True

    def __init__(
        self, encoder: nn.Module, pool: ExpertPool, index: GroupIndex, dtype: torch.dtype | None = None
    ) -> None:
        self.dtype = dtype
        self._encoder, self._pool, self._index = encoder, pool, index
        self._fixed = [name for name, _ in encoder.named_parameters() if name in pool.fixed]
        self._width = embedding_width(encoder)
        self.leaves: dict[str, Tensor] = {}

    def merge(self, coefficients: Coefficients) -> dict[str, Tensor] | LazyTensors:
        """Return new merged parameters, differentiable in the coefficients."""
        return merge(self._pool, coefficients)

    def merged_leaves(self, values: Tensor) -> Mapping[str, Tensor]:
        """Merge with coefficients (E, G) into the tensors of the merge before, and return them as autograd leaves."""
        if not self.leaves:
            self.leaves = {name: self._leaf(self._pool.shapes[name]) for name in self._names_of_leaves()}
        for leaf in self.leaves.values():
            leaf.grad = None  # left over where a loss raised
        torch.clear_autocast_cache()  # it may hold the leaves' last values in half precision
        merge_into({name: leaf.detach() for name, leaf in self.leaves.items()}, self._pool, self._index, values)
        return self.leaves

    def _leaf(self, shape: tuple[int, ...]) -> Tensor:
        """Return an unwritten leaf."""
        return torch.empty(shape, dtype=self.dtype_of(shape), device=self._pool.device).requires_grad_()

    def dtype_of(self, shape: Sequence[int]) -> torch.dtype:
        """Return the dtype of a parameter; vectors are never rounded, as norms compute with them in float32."""
        return self.dtype if self.dtype is not None and len(shape) > 1 else self._pool.compute_dtype

    def _names_of_leaves(self) -> Sequence[str]:
        """Return the parameters that are merged."""
        return self._pool.names

    def forget(self) -> None:
        """Drop the merged parameters, as after a move to another device."""
        self.leaves = {}

    def pull_back(self) -> PullBack:
        """Return the adjoint of the merge, for the leaves' gradients."""
        return PullBack(self._pool, self._index)

    def read(
        self, read: Callable[[str], Tensor], buffers: Mapping[str, Tensor], *, with_fixed: bool = False
    ) -> MutableMapping[str, Tensor]:
        """Return a model's parameters by name, with buffers; those that do not merge, too, if ``with_fixed``."""
        names = (*self._pool.names, *(self._fixed if with_fixed else ()))
        return {name: read(name) for name in names} | dict(buffers)

    def expert(self, expert: str, buffers: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return what the encoder runs on as the raw expert, with buffers; one model's memory."""
        return self.read(self._pool.expert_parameters(expert, self.dtype).__getitem__, buffers, with_fixed=True)

    def swapped(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Let the encoder run on parameters, and on buffers where ``params`` has none, while a block lasts."""
        fixed = {name: self._pool.fixed[name] for name in self._fixed}
        return swapped(self._encoder, {**fixed, **buffers, **params})

    def passes(
        self, inputs: Mapping[str, Inputs], micro_batch: MicroBatch
    ) -> tuple[Mapping[str, Inputs], list[list[str]]]:
        """Return a step's inputs by task, and for each pass of the encoder the tasks that share it."""
        return inputs, fused(inputs, micro_batch, self._width)

    def padded(self, batches: Iterable[tuple[str, Inputs]]) -> Iterator[tuple[str, Inputs, bool]]:
        """Yield batches of (task, inputs), and whether they are this process's own."""
        return ((task, inputs, True) for task, inputs in batches)

    def zero(self, outputs: Mapping[str, Outputs]) -> Tensor:
        """Return the 0 that the losses of a pass are added to."""
        return torch.zeros((), device=next(iter(outputs.values())).logits.device)


class TrainedWeights(WholeWeights):
    """Parameters that are trained themselves, from a merge on: what the coefficients say of them has no effect.

    Args:
        encoder: The network that lends its code.
        pool: Base and experts.
        coefficients: Those of the merge to start from.

    Attributes:
        parameters: The trained parameters (*S) by name, on the pool's device.
    """

    def __init__(self, encoder: nn.Module, pool: ExpertPool, coefficients: Coefficients) -> None:
        super().__init__(encoder, pool, coefficients.index)
        start = merge(pool, coefficients)
        self.parameters = {name: nn.Parameter(tensor.detach().clone()) for name, tensor in start.items()}

    def merge(self, coefficients: Coefficients) -> dict[str, Tensor]:
        """Return the parameters as they are, without gradient."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def merged_leaves(self, values: Tensor) -> Mapping[str, Tensor]:
        """Return the parameters as leaves of their own, which share their memory."""
        torch.clear_autocast_cache()  # it may hold the last values in half precision
        return {name: parameter.detach().requires_grad_() for name, parameter in self.parameters.items()}
