"""An encoder's blocks as a chain: each block's output is the next one's input."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from adamerge.data.batch import Inputs
from adamerge.errors import InputError, did_you_mean
from adamerge.merges.activations import Rows, linear_inputs
from adamerge.model.merged_model import MergedModel


@dataclass
class BlockCall:
    """The arguments of one call of a block, and what the network was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: Inputs


class BlockChain:
    """Runs a model's blocks one at a time, under any parameters.

    Args:
        model: Its encoder lends the code.
        path: Path of the module that holds the blocks.
        blocks: The blocks by name below ``path``.
    """

    def __init__(self, model: MergedModel, path: str, blocks: Mapping[str, nn.Module]) -> None:
        self._model = model
        self._prefixes = [f"{path}.{name}." if path else f"{name}." for name in blocks]
        self._blocks = list(blocks.values())
        self._buffers = model.encoder_buffers

    def __len__(self) -> int:
        return len(self._blocks)

    def enter(self, inputs: Inputs, params: Mapping[str, Tensor]) -> BlockCall:
        """Run the layers before the blocks on inputs (B, ...), and return the first block's call."""
        call: list[BlockCall] = []

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call.append(BlockCall(args, kwargs, inputs))
            raise _Entered

        handle = self._blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._model(inputs, params)
        except _Entered:
            pass
        finally:
            handle.remove()
        return call[0]

    def observe(
        self, block: int, params: Mapping[str, Tensor], calls: list[BlockCall],
        take: Callable[[Rows, Tensor, Inputs], None],
    ) -> None:  # fmt: skip
        """Run one block on calls, and hand its Linear layers' inputs to ``take``.

        ``take`` gets the rows of a weight, by the encoder's name, their inputs, and what the network was called with.
        """
        prefix, tensors = self._prefixes[block], self._tensors(block, params)
        for call in calls:

            def named(rows: Rows, x: Tensor, inputs: Inputs = call.inputs) -> None:
                take(rows._replace(name=prefix + rows.name), x, inputs)

            with linear_inputs(self._blocks[block], tensors, named) as swapped:
                self._run(block, swapped, call)

    def advance(self, block: int, params: Mapping[str, Tensor], calls: list[BlockCall]) -> None:
        """Run one block, and make its outputs the next block's inputs, in place."""
        tensors = self._tensors(block, params)
        for call in calls:
            call.args = (_first(self._run(block, tensors, call)), *call.args[1:])

    def check(self, inputs: Inputs, params: Mapping[str, Tensor]) -> None:
        """Refuse blocks that are called in another way than one after the other.

        Raises:
            InputError: If a block's input is not the output of the one before.
        """
        starts: list[list[Any]] = [[] for _ in self._blocks]
        ends: list[list[Any]] = [[] for _ in self._blocks]
        with ExitStack() as hooks:
            for i, block in enumerate(self._blocks):
                before = block.register_forward_pre_hook(lambda _, args, i=i: starts[i].append(args))
                after = block.register_forward_hook(lambda _, __, output, i=i: ends[i].append(output))
                hooks.callback(before.remove)
                hooks.callback(after.remove)
            self._model(inputs, params)
        for i in range(len(self._blocks)):
            once = len(starts[i]) == len(ends[i]) == 1 and len(starts[i][0]) > 0
            if not once or (i and not _same(starts[i][0][0], _first(ends[i - 1][0]))):
                raise InputError(
                    f"RegMeanPlusPlus.blocks: the encoder does not call {self._prefixes[i].rstrip('.')!r} once, on the "
                    "output of the block before. Name another chain of blocks with blocks=PATH, or use regmean."
                )

    def _tensors(self, block: int, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a block's parameters and buffers, by its own names."""
        prefix = self._prefixes[block]
        by_name = {**self._buffers, **self._model.pool.fixed, **params}
        return {name.removeprefix(prefix): tensor for name, tensor in by_name.items() if name.startswith(prefix)}

    def _run(self, block: int, tensors: Mapping[str, Tensor], call: BlockCall) -> Any:
        return functional_call(self._blocks[block], dict(tensors), call.args, call.kwargs, strict=True)


class _Entered(Exception):
    """Raised where the first block has been reached."""


def open_chain(model: MergedModel, path: str | None) -> BlockChain:
    """Return an encoder's blocks.

    Args:
        model: Its encoder has them.
        path: Path of the module that holds them; None takes the one with the most parameters among those that hold at
            least two modules of one class.

    Raises:
        InputError: If there is no such module.
    """
    encoder = model.encoder
    holders = {
        name: dict(module.named_children())
        for name, module in encoder.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and _alike(module)
    }
    if path is None and holders:
        path = max(holders, key=lambda name: sum(p.numel() for p in encoder.get_submodule(name).parameters()))
    if path not in holders:
        hint = did_you_mean(path, holders) if path else ""
        raise InputError(
            f"RegMeanPlusPlus.blocks: expected the path of a ModuleList or Sequential of two or more blocks of "
            f"one class, found {path!r}; the encoder has {', '.join(holders) or 'none'}.{hint}"
        )
    return BlockChain(model, str(path), holders[str(path)])


def _alike(module: nn.Module) -> bool:
    kinds = [type(child) for child in module.children()]
    return len(kinds) > 1 and len(set(kinds)) == 1


def _first(output: Any) -> Any:
    """Return what of a block's output goes on: of a tuple its first member."""
    return output[0] if isinstance(output, tuple) else output


def _same(first: Any, second: Any) -> bool:
    return first is second or (isinstance(first, Tensor) and isinstance(second, Tensor) and torch.equal(first, second))
