"""An encoder of which each process holds a part of every parameter (FSDP2's ``fully_shard``).

Parameters are cut along dimension 0, so that a part is a run of the flattened parameter. Merged values are written into
the parts in place; FSDP gathers a module's parameters when its forward or backward pass begins, drops them after it,
and adds up and distributes their gradients. Parameters without dimensions cannot be cut: every process holds them.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from adamerge.model.encoder import members
from adamerge.model.merge import PullBack
from adamerge.pool.pool import ExpertPool
from adamerge.system import ranks


class ShardedEncoder:
    """The parts that this process holds of an encoder's parameters.

    Args:
        encoder: Cut in place, unless it has been; its parameters become the parts.
        pool: Names the parameters that are merged, and those that keep the base's values.
        device: Where the parts go.

    Attributes:
        parameters: Name to parameter, of those that merge and those that do not.
        ranges: Name to the entries of the flattened parameter that are here.
    """

    def __init__(self, encoder: nn.Module, pool: ExpertPool, device: torch.device) -> None:
        if not isinstance(encoder, FSDPModule):
            _shard(encoder, pool.compute_dtype, device)
        self._encoder: nn.Module = encoder
        self._pool = pool
        self.parameters = dict(encoder.named_parameters())
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in pool.shapes)
        self.ranges = {name: _entries(parameter) for name, parameter in self.parameters.items()}
        self.merged = {name: self.parameters[name] for name in pool.names}
        self._is_base = False  # whether parameters that do not merge have the base's values

    def parts(self) -> dict[str, Tensor]:
        """Return the merged parameters' parts (n,), to be written to; gathered copies are dropped."""
        self._drop_gathered()
        if not self._is_base:
            for name in self.parameters.keys() - self.merged.keys():
                self._write(name, self._pool.fixed[name])
            self._is_base = True
        return {name: local(parameter).view(-1) for name, parameter in self.merged.items()}

    def load(self, params: Mapping[str, Tensor]) -> None:
        """Take this process's part of whole parameters (*S); the base's where ``params`` lacks one."""
        self._drop_gathered()
        self._is_base = False
        for name in self.parameters:
            if name in params:
                self._write(name, params[name])
            else:
                self._write(name, self._pool.base[name] if name in self._pool.base else self._pool.fixed[name])

    def _write(self, name: str, whole: Tensor) -> None:
        entries = self.ranges[name]
        local(self.parameters[name]).view(-1).copy_(whole.reshape(-1)[entries.start : entries.stop])

    def _drop_gathered(self) -> None:
        """Forget what has been gathered of older values, which torch may keep for the root until its backward pass."""
        for module in self._encoder.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


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
    """Return what this process holds of a tensor, without autograd."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shard(encoder: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Cut an encoder's parameters, block by block, so that only one block is whole at a time."""
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


def _blocks(encoder: nn.Module) -> list[nn.Module]:
    """Return what is gathered as one: members of the outermost containers that share no parameter with the rest."""
    uses = Counter(id(p) for _, p in encoder.named_parameters(remove_duplicate=False))
    blocks = []
    for name in members(encoder):
        block = encoder.get_submodule(name)
        own = Counter(id(p) for _, p in block.named_parameters(remove_duplicate=False))
        if all(uses[key] == count for key, count in own.items()):
            blocks.append(block)
    return blocks


def _entries(parameter: Tensor) -> range:
    """Return which entries of a flattened parameter this process holds."""
    if not isinstance(parameter, DTensor):
        return range(parameter.numel())
    rows, width = parameter.shape[0], parameter.numel() // max(1, parameter.shape[0])
    first = min(rows, ranks.rank() * -(-rows // ranks.count()))  # as torch.chunk cuts
    return range(first * width, first * width + parameter.to_local().numel())
