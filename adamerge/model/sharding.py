"""Weights of which each process holds a part of every parameter (FSDP2's ``fully_shard``).

Parameters are cut along dimension 0, so that a part is a run of the flattened parameter. Merged values are written into
the parts in place; FSDP gathers a module's parameters when its forward or backward pass begins, drops them after it,
and adds up and distributes their gradients. Parameters without dimensions cannot be cut: every process holds them.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from adamerge.data.batch import Inputs, Outputs
from adamerge.errors import InputError
from adamerge.model.beside import BesideLeaves, BesideWeights, Updates
from adamerge.model.coefficients import Coefficients
from adamerge.model.encoder import (
    MicroBatch,
    embedding_width,
    grouped,
    members,
    swapped,
)
from adamerge.model.groups import GroupIndex
from adamerge.model.merge import PullBack, merge_into
from adamerge.model.merged_model import MergedModel
from adamerge.model.shared_batch import agreed
from adamerge.model.weights import WholeWeights
from adamerge.pool.lazy import LazyTensors
from adamerge.pool.part import PoolPart
from adamerge.pool.pool import ExpertPool
from adamerge.system import ranks


class ShardedWeights(WholeWeights):
    """This process's parts of what an encoder runs on; see :class:`~adamerge.model.weights.WholeWeights`.

    All processes must run the same passes in the same order: one that lacks a task of a step, or has fewer batches for
    an expert, takes part with zeros, whose outputs do not count.

    Args:
        encoder: Cut in place, unless it has been; its parameters become the parts.
        pool: Base and experts; a mapped one, or this process would hold all of it.
        index: The groups of the coefficients.
        device: Where the parts go.
        updates: What is added beside the base's own weights; None where all of them are merged.

    Attributes:
        parameters: Name to parameter, of those that merge and those that do not.
        ranges: Name to the entries of the flattened parameter that are here.
        leaves: The merged parameters by name, which every merge overwrites; those with updates beside them are not.
        part: The pool's entries that belong to the leaves.
    """

    is_sharded = True

    def __init__(
        self,
        encoder: nn.Module,
        pool: ExpertPool,
        index: GroupIndex,
        device: torch.device,
        updates: Updates | None = None,
    ) -> None:
        if not isinstance(encoder, FSDPModule):
            _shard(encoder, pool.compute_dtype, device)
        self._encoder: nn.Module = encoder
        self._drop_gathered()  # of a fit before this one, whose whole parameters would be freed under these
        self._pool, self._index, self._width = pool, index, embedding_width(encoder)
        self.parameters = dict(encoder.named_parameters())
        self._updates, self.gives_gradients = updates, updates is None
        merged = [name for name in pool.names if updates is None or name not in updates.names]
        self.leaves = {name: self.parameters[name] for name in merged}
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in self.leaves)
        self.ranges = {name: _entries(parameter) for name, parameter in self.parameters.items()}
        ranges = {name: self.ranges[name] for name in merged}
        self.part = PoolPart(pool, ranges, index.directions).to(device)
        self._part_index = index.part(ranges)
        self._fixed = [name for name in self.parameters if name not in pool.shapes]
        self._others_are_base = False  # the parameters that are no leaves
        self._loaded: Mapping[str, Tensor] | None = None  # what the encoder holds instead of a merge

    def merge(self, coefficients: Coefficients) -> LazyTensors:
        """Return the merged parameters, whole and without gradient, each merged when it is asked for."""
        values = coefficients().detach().to(self._pool.device)

        def read(name: str) -> Tensor:
            whole = torch.empty_like(self._pool.base[name])
            merge_into({name: whole}, self._pool, self._index, values)
            return whole

        return LazyTensors(read, self._pool.names)

    def merged_leaves(self, values: Tensor) -> Mapping[str, Tensor]:
        """Merge with coefficients (E, G) into the encoder's parts, and return its parameters."""
        for parameter in self.leaves.values():
            parameter.grad = None  # left over where a loss raised
        torch.clear_autocast_cache()
        self._loaded = None
        self._drop_gathered()
        if not self._others_are_base:
            for name in self.parameters.keys() - self.leaves.keys():
                self._write(name, self._base(name))
            self._others_are_base = True
        parts = {name: local(parameter).view(-1) for name, parameter in self.leaves.items()}
        merge_into(parts, self.part, self._part_index, values)
        return self.leaves if self._updates is None else BesideLeaves(self.leaves, values)

    def forget(self) -> None:
        """Drop nothing: the parts are where they belong."""

    def pull_back(self) -> PullBack:
        """Return the adjoint of the merge on this process's part."""
        return PartialPullBack(self.part, self._part_index)

    def read(
        self, read: Callable[[str], Tensor], buffers: Mapping[str, Tensor], *, with_fixed: bool = False
    ) -> MutableMapping[str, Tensor]:
        """Return a model's parameters by name, with buffers, each read when it is asked for."""
        return LazyTensors(read, (*self._pool.names, *(self._fixed if with_fixed else ()))) | buffers

    @contextmanager
    def swapped(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Iterator[None]:
        """Let the encoder run on the leaves, or on this process's parts of whole parameters, while a block lasts."""
        is_step = params is self.leaves or isinstance(params, BesideLeaves)
        if not is_step and params is not self._loaded:
            torch.clear_autocast_cache()
            self._drop_gathered()
            self._others_are_base = False
            for name in self.parameters:
                self._write(name, params[name] if name in params else self._base(name))
            self._loaded = params if isinstance(params, LazyTensors) else None  # others may change
        with ExitStack() as stack:
            own = {name: params.get(name, buffer) for name, buffer in buffers.items()}
            stack.enter_context(swapped(self._encoder, own, strict=False))
            if self._updates is not None and isinstance(params, BesideLeaves):
                stack.enter_context(self._updates.added(params.coefficients))
            elif self._updates is not None:
                stack.enter_context(self._updates.silent())
            yield

    def passes(
        self, inputs: Mapping[str, Inputs], micro_batch: MicroBatch
    ) -> tuple[Mapping[str, Inputs], list[list[str]]]:
        """Agree on the tasks of a step and the passes they share, by the largest batches of any process."""
        shared, device = agreed(inputs, self._width), self._pool.device
        passes = {task: inputs[task] if task in inputs else batch.stand_in(device) for task, batch in shared.items()}
        facts = {task: batch.facts for task, batch in shared.items()}
        return passes, grouped(facts, micro_batch, device.type == "cpu")

    def padded(self, batches: Iterable[tuple[str, Inputs]]) -> Iterator[tuple[str, Inputs, bool]]:
        """Yield batches of (task, inputs), and a sample in their place while other processes have more."""
        iterator = iter(batches)
        while True:
            batch = next(iterator, None)
            shared = agreed({} if batch is None else {batch[0]: batch[1]}, self._width)
            if not shared:
                return
            task, another = next(iter(shared.items()))
            yield (task, another.stand_in(self._pool.device), False) if batch is None else (*batch, True)

    def zero(self, outputs: Mapping[str, Outputs]) -> Tensor:
        """Return a 0 that depends on all parameters, so that every process has gradients of the same ones."""
        parts = [output.logits if output.features is None else output.features for output in outputs.values()]
        return torch.stack([part.mean() for part in parts]).sum() * 0

    def _base(self, name: str) -> Tensor:
        return self._pool.base[name] if name in self._pool.base else self._pool.fixed[name]

    def _write(self, name: str, whole: Tensor) -> None:
        entries = self.ranges[name]
        local(self.parameters[name]).view(-1).copy_(whole.reshape(-1)[entries.start : entries.stop])

    def _drop_gathered(self) -> None:
        """Forget gathered parameters of older values, which torch may keep for the root until its backward pass."""
        for module in self._encoder.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


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
            updates = self.weights.updates if isinstance(self.weights, BesideWeights) else None
            if (dtype := self.weights.base_dtype) != "float32":
                raise InputError(
                    f"encoder.base_dtype: {dtype} has no parts for trainer=fsdp. Use ddp, or leave it out."
                )
            index = self.coefficients.index
            self.weights = ShardedWeights(self.encoder, self.pool, index, torch.device(device), updates)
        super().to_device(device)
        return self


class PartialPullBack(PullBack):
    """The adjoint of the merge on this process's part; the mean over the processes is the whole.

    A process's own gradients of what all of them hold count as they are; FSDP's are means over the processes already,
    each here for a part, so they count as many times as there are processes.
    """

    @contextmanager
    def collect(
        self, leaves: Mapping[str, Tensor], also: Callable[[str, Tensor], None] | None = None
    ) -> Iterator[None]:
        """Contract and drop the gradients of the leaves once a backward pass inside the block has ended.

        ``also`` sees each name and this process's part of the gradient.
        """
        yield
        for name, leaf in leaves.items():
            gradient = leaf.grad
            if gradient is None:
                continue
            part = local(gradient)
            if isinstance(gradient, DTensor):
                part.mul_(ranks.count())
            self.add(name, part)
            if also is not None:
                also(name, part)
            leaf.grad = None


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, without autograd."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shard(encoder: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Cut an encoder's parameters, block by block, so that only one block is whole at a time."""
    _materialize(encoder)
    for parameter in encoder.parameters():
        parameter.data = parameter.data.to(dtype).contiguous()
    whole = [
        (module, name, parameter)
        for module in encoder.modules()
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False))
        if parameter.ndim == 0
    ]
    for module, name, _ in whole:
        setattr(module, name, None)  # fully_shard refuses them
    mesh = init_device_mesh(device.type, (ranks.count(),))
    for module in (*_blocks(encoder), encoder):
        fully_shard(module, mesh=mesh)
    for module, name, parameter in whole:
        parameter.data = parameter.data.to(device)
        setattr(module, name, parameter)


def _materialize(encoder: nn.Module) -> None:
    """Give parameters without memory some, in which nothing is written; tied ones stay tied."""
    empty: dict[nn.Parameter, nn.Parameter] = {}
    for module in encoder.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter.is_meta:
                setattr(
                    module, name, empty.setdefault(parameter, nn.Parameter(torch.empty_like(parameter, device="cpu")))
                )


def _blocks(encoder: nn.Module) -> list[nn.Module]:
    """Return the modules gathered as one: members of the outermost containers that share no parameter with others."""
    uses = Counter(id(p) for _, p in encoder.named_parameters(remove_duplicate=False))
    blocks = []
    for name in members(encoder):
        block = encoder.get_submodule(name)
        uses_inside = Counter(id(p) for _, p in block.named_parameters(remove_duplicate=False))
        if all(uses[key] == count for key, count in uses_inside.items()):
            blocks.append(block)
    return blocks


def _entries(parameter: Tensor) -> range:
    """Return which entries of a flattened parameter this process holds."""
    if not isinstance(parameter, DTensor):
        return range(parameter.numel())
    rows, width = parameter.shape[0], parameter.numel() // max(1, parameter.shape[0])
    first = min(rows, ranks.rank() * -(-rows // ranks.count()))  # as torch.chunk cuts
    return range(first * width, first * width + parameter.to_local().numel())
