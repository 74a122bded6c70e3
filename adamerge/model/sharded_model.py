"""A merged model of which each process holds a part: for models that do not fit one device."""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adamerge.data.batch import Outputs
from adamerge.errors import InputError
from adamerge.model.calls import MicroBatch, call_with, fused
from adamerge.model.merge import PullBack, merge_into
from adamerge.model.merged_model import MergedModel
from adamerge.model.sharding import PartialPullBack, ShardedEncoder
from adamerge.pool.lazy import LazyTensors
from adamerge.pool.part import PoolPart
from adamerge.system import ranks


class ShardedModel(MergedModel):
    """Base, task vectors, merged weights and their gradients in parts, one on each process.

    A model like :class:`MergedModel`, with its arguments, until :meth:`to_device` finds several processes and cuts the
    encoder, which from then on is changed. From then on all processes must run the same passes in the same order: one
    that lacks a task of a step, or has fewer batches for an expert, takes part with zeros, whose outputs do not count.

    The pool should be a mapped one (``ExpertPool.from_files(..., mapped=True)``).
    """

    _encoder: ShardedEncoder | None = None
    _part: PoolPart

    @property
    def is_sharded(self) -> bool:
        """Whether this process holds a part."""
        return self._encoder is not None

    def to_device(self, device: torch.device | str) -> "ShardedModel":
        """Cut the encoder, read this process's part of the pool, and move all to the device."""
        device = torch.device(device)
        if ranks.count() > 1 and self._encoder is None:
            self.pool.to("cpu")
            self._encoder = ShardedEncoder(self.encoder, self.pool, device)
            ranges = {name: self._encoder.ranges[name] for name in self.pool.names}
            self._part = PoolPart(self.pool, ranges).to(device)
            self._part_index = self.coefficients.index.part(ranges)
            self._loaded: Mapping[str, Tensor] | None = None  # what the encoder holds instead of a merge
        super().to_device(device)
        return self

    def merge(self) -> dict[str, Tensor] | LazyTensors:  # type: ignore[override]
        """Return the merged parameters, whole and without gradient, each merged when it is asked for.

        With one process: as :meth:`MergedModel.merge`.
        """
        if ranks.count() == 1:
            return super().merge()
        values = self.coefficients().detach().to(self.pool.device)

        def read(name: str) -> Tensor:
            whole = torch.empty_like(self.pool.base[name])
            merge_into({name: whole}, self.pool, self.coefficients.index, values)
            return whole

        return LazyTensors(read, self.pool.names)

    def base_parameters(self) -> MutableMapping[str, Tensor]:
        """Return the base's own parameters and buffers, each read when it is asked for."""
        if self._encoder is None:
            return super().base_parameters()
        return LazyTensors(self.pool.base.__getitem__, self.pool.names) | self.pool.buffers(self._buffers_of_encoder)

    def expert_parameters(self, expert: str) -> MutableMapping[str, Tensor]:
        """Return the raw expert's own parameters and buffers, each read when it is asked for."""
        if self._encoder is None:
            return super().expert_parameters(expert)
        own = LazyTensors(self.pool.expert_parameters(expert).__getitem__, (*self.pool.names, *self._fixed))
        return own | self.pool.buffers(self._buffers_of_encoder, expert)

    def expert_outputs(
        self, expert: str, batches: Iterable[tuple[str, Tensor]], hidden_layers: Sequence[str] = ()
    ) -> Iterator[Outputs]:
        """Yield the raw expert's outputs for this process's batches of (task, inputs); all processes must call."""
        if self._encoder is None:
            yield from super().expert_outputs(expert, batches, hidden_layers)
            return
        is_own: list[bool] = []  # of the batch that is running
        for outputs in super().expert_outputs(expert, self._padded(batches, is_own), hidden_layers):
            if is_own.pop():
                yield outputs

    def teacher(self, task: str, inputs: Tensor, indices: Tensor, hidden_layers: Sequence[str] = ()) -> Outputs:
        """Return the outputs of the task's teacher, which must have been asked.

        Raises:
            InputError: If it has not been: in the midst of a step the encoder holds the merged weights.
        """
        if self._encoder is not None and self.teacher_cache.get(task, indices) is None:
            raise InputError(
                f"Task {task!r}: the objective asks the expert in the midst of a step, which a sharded model cannot. "
                "Give the objective the class attribute uses_teacher = True, so that the experts are asked before."
            )
        return super().teacher(task, inputs, indices, hidden_layers)

    def _padded(self, batches: Iterable[tuple[str, Tensor]], is_own: list[bool]) -> Iterator[tuple[str, Tensor]]:
        """Yield batches, and zeros in their place while other processes have more."""
        iterator = iter(batches)
        while True:
            batch = next(iterator, None)
            kinds = _agreed({} if batch is None else {batch[0]: batch[1]})
            if not kinds:
                return
            is_own.append(batch is not None)
            task, kind = next(iter(kinds.items()))
            yield batch or (task, kind.zeros(self.pool.device))

    def _passes(
        self, inputs: Mapping[str, Tensor], micro_batch: MicroBatch
    ) -> tuple[Mapping[str, Tensor], list[list[str]]]:
        """Agree on the tasks of a step and the passes they share, by the largest batches of any process."""
        if self._encoder is None:
            return super()._passes(inputs, micro_batch)
        kinds, device = _agreed(inputs), self.pool.device
        passes = {task: inputs[task] if task in inputs else kind.zeros(device) for task, kind in kinds.items()}
        return passes, fused({task: kind.like(device) for task, kind in kinds.items()}, micro_batch)

    def _nothing(self, outputs: Mapping[str, Outputs]) -> Tensor:
        """Return a 0 that depends on all parameters, so that every process has gradients of the same ones."""
        if self._encoder is None:
            return super()._nothing(outputs)
        return torch.stack([output.features.sum() for output in outputs.values()]).sum() * 0

    def _pull_back(self) -> PullBack:
        if self._encoder is None:
            return super()._pull_back()
        return PartialPullBack(self._part, self._part_index)

    def _check_forward(self) -> None:
        if self._encoder is not None:
            raise InputError(
                "The objective runs further passes in a step (step.forward), whose number a sharded model cannot keep "
                "the same on all devices. Use trainer=ddp, or data.views for augmented images."
            )

    def _merged_leaves(self, values: Tensor) -> Mapping[str, Tensor]:
        if self._encoder is None:
            return super()._merged_leaves(values)
        for parameter in self._encoder.merged.values():
            parameter.grad = None  # left over where a loss raised
        torch.clear_autocast_cache()
        self._loaded = None
        merge_into(self._encoder.parts(), self._part, self._part_index, values)
        return self._encoder.merged

    def _call(self, function: Callable[[nn.Module], Any], params: Mapping[str, Tensor]) -> Any:
        """Run ``function(encoder)`` on parameters whose parts are, or are now, in the encoder."""
        if self._encoder is None:
            return super()._call(function, params)
        if params is not self._encoder.merged and params is not self._loaded:
            torch.clear_autocast_cache()
            self._encoder.load(params)
            self._loaded = params if isinstance(params, LazyTensors) else None  # others may change
        buffers = {name: params.get(name, b) for name, b in self._buffers_of_encoder.items()}
        return call_with(self.encoder, buffers, function, strict=False)


class _Kind(NamedTuple):
    """What one process tells the others of a batch: shape of an input, dtype, and the number of inputs."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    size: int

    def zeros(self, device: torch.device) -> Tensor:
        """Return one input that stands in for a batch."""
        return torch.zeros(1, *self.shape, dtype=self.dtype, device=device)

    def like(self, device: torch.device) -> Tensor:
        """Return a batch of this kind that takes no memory."""
        return torch.zeros((), dtype=self.dtype, device=device).expand(self.size, *self.shape)


def _agreed(inputs: Mapping[str, Tensor]) -> dict[str, _Kind]:
    """Return every process's tasks, in the same order on each, and the kind of their largest batches."""
    own = {task: _Kind(tuple(batch.shape[1:]), batch.dtype, len(batch)) for task, batch in inputs.items()}
    found: dict[str, _Kind] = {}
    for task, kind in chain.from_iterable(part.items() for part in ranks.everyones(own)):
        known = found.setdefault(task, kind)
        if known[:2] != kind[:2]:
            raise InputError(
                f"Task {task!r}: a sharded model needs inputs of one shape and dtype on all devices, found "
                f"{known.shape}, {known.dtype} and {kind.shape}, {kind.dtype}. Resize the images to one size."
            )
        found[task] = known._replace(size=max(known.size, kind.size))
    return found
