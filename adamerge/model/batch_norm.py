"""Which statistics the BatchNorm layers of a merged model have: the base's, the experts' average, or its own.

Statistics are not parameters: nothing says that those of a merge are a combination of the experts'.
Legend: C channels of a layer; statistics are its ``running_mean`` and ``running_var``, (C,).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from adamerge.checkpoints.checkpoint import load_state_dict, stored_facts
from adamerge.checkpoints.writing import save_state_dict
from adamerge.data.batch import Inputs, join, to
from adamerge.errors import InputError, check_choice, check_number
from adamerge.model.encoder import fused
from adamerge.model.merged_model import MergedModel
from adamerge.pool.pool import ExpertPool

if TYPE_CHECKING:  # it imports Lightning, which a merge without data does not need
    from adamerge.data.unlabeled_tasks import UnlabeledTasks

FILE = "batch_norm.safetensors"
POLICIES = ("base", "average", "recalibrate")
_STATISTICS = (".running_mean", ".running_var")


@dataclass(frozen=True)
class BatchNormPolicy:
    """Which statistics a merged model's BatchNorm layers have; nothing happens where an encoder has no such layer.

    Args:
        policy: ``base``: the base's. ``average``: the mean of the experts'. ``recalibrate``: the merged model's own,
            over unlabeled inputs of all tasks, taken when coefficients are final; until then the experts' average.
        batches: To recalibrate on, each of ``data.batch_size`` inputs of every task.

    Raises:
        InputError: If an option has another value.
    """

    policy: Literal["base", "average", "recalibrate"] = "recalibrate"
    batches: int = 32

    def __post_init__(self) -> None:
        check_choice("batch_norm.policy", self.policy, POLICIES)
        check_number("batch_norm.batches", self.batches, 1, whole=True)

    @property
    def needs_data(self) -> bool:
        """Whether :meth:`final` reads unlabeled inputs."""
        return self.policy == "recalibrate"

    def start(self, model: MergedModel) -> None:
        """Set the statistics that the merged model adapts with."""
        if self.policy != "base":
            model.set_buffers(average(model.pool))

    def applies(self, model: MergedModel) -> bool:
        """Whether :meth:`final` returns any statistics: not where they are the base's, or there are no layers."""
        return self.policy != "base" and bool(_layers(model))

    def final(
        self, model: MergedModel, params: Mapping[str, Tensor], data: "UnlabeledTasks | None"
    ) -> dict[str, Tensor]:
        """Return the statistics of merged parameters, by the encoder's names; {} where they are the base's.

        Args:
            model: Its encoder and pool.
            params: The merged parameters, as :meth:`MergedModel.forward` takes them.
            data: Unlabeled streams, to recalibrate; the inputs depend on its seed only.

        Raises:
            InputError: If there is no data, or a layer sees one value per channel only, of which there is no variance.
        """
        if not self.applies(model):
            return {}
        if self.policy == "average":
            return average_for(model.encoder, model.pool)
        if data is None:
            raise InputError("batch_norm.policy=recalibrate: needs unlabeled data, found none; choose average or base.")
        return _recalibrated(model, _layers(model), params, data.mixed_batches(self.batches))

    def complete(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        model: MergedModel | None,
        pool: ExpertPool,
        data: "UnlabeledTasks | None",
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield a merge for export, under the base's keys and dtypes, with the statistics that belong to it.

        Args:
            tensors: The merge: every key of the base, with its tensor. All are held where statistics need them.
            model: The pool's merged model, to recalibrate.
            pool: Base and experts.
            data: Unlabeled streams; to recalibrate.

        Raises:
            InputError: See :meth:`final`.
        """
        if not self.needs_data:
            yield from with_statistics(tensors, pool, average(pool) if self.policy == "average" else {})
            return
        if model is None:
            raise InputError("batch_norm.policy=recalibrate: needs the model that is merged; choose average or base.")
        state_dict = dict(tensors)
        names = {name: pool.keys.file_key(name) for name in pool.names}
        params = {name: state_dict[key].to(pool.device, pool.compute_dtype) for name, key in names.items()}
        yield from with_statistics(state_dict.items(), pool, self.final(model, params, data))


def average(pool: ExpertPool) -> dict[str, Tensor]:
    """Return the mean of the experts' BatchNorm statistics by the encoder's names, (C,); the base's where one has none.

    Means are taken in float64, and kept in the dtype of the base's file.
    """
    names = [name for key in pool.source.keys if (name := pool.keys.name(key) or "").endswith(_STATISTICS)]
    like = {name: pool.source.get(pool.keys.file_key(name)) for name in names}
    sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in like.items()}
    for expert in pool.expert_names:
        for name, tensor in pool.buffers(like, expert).items():
            sums[name] += tensor.double()
    return {name: (total / len(pool.expert_names)).to(like[name].dtype) for name, total in sums.items()}


def average_for(encoder: nn.Module, pool: ExpertPool) -> dict[str, Tensor]:
    """Return :func:`average` for the buffers that an encoder has, in their dtypes, on the pool's device."""
    buffers = dict(encoder.named_buffers())
    means = {name: tensor for name, tensor in average(pool).items() if name in buffers}
    return {name: tensor.to(pool.device, buffers[name].dtype) for name, tensor in means.items()}


def with_statistics(
    tensors: Iterable[tuple[str, Tensor]], pool: ExpertPool, statistics: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors under the base's keys with other statistics; those the base has no key for are left out."""
    by_key = {pool.keys.file_key(name): tensor for name, tensor in statistics.items() if name in pool.keys}
    return ((key, by_key[key].to("cpu", tensor.dtype) if key in by_key else tensor) for key, tensor in tensors)


def save_statistics(statistics: Mapping[str, Tensor], path: Path, facts: Mapping[str, Any]) -> None:
    """Write statistics beside the coefficients that they belong to, atomically, so that a replay needs no input.

    Args:
        statistics: Encoder's name to (C,).
        path: The file.
        facts: What else is known, ready for JSON: ``policy``, and ``coefficients``, the hash of those.
    """
    save_state_dict(statistics, path, {"adamerge_batch_norm": json.dumps(dict(facts), sort_keys=True)})


def load_statistics(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_statistics` wrote, and its facts.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it is another file.
    """
    tensors = load_state_dict(path)
    facts = stored_facts(path, "adamerge_batch_norm")
    if facts is None:
        raise InputError(f"{path}: expected BatchNorm statistics that adamerge wrote, found another file.")
    return tensors, facts


def _layers(model: MergedModel) -> dict[str, _BatchNorm]:
    """Return the encoder's layers that normalise by kept statistics."""
    return {
        name: module
        for name, module in model.encoder.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
    }


@torch.no_grad()
def _recalibrated(
    model: MergedModel,
    layers: Mapping[str, _BatchNorm],
    params: Mapping[str, Tensor],
    batches: Iterable[Mapping[str, Inputs]],
) -> dict[str, Tensor]:
    """Take the mean and variance of what each layer sees over all inputs, each batch normalised by its own statistics.

    Batches hold inputs of all tasks, as the variance between tasks is part of what a layer must normalise.
    """
    moments = {name: _Moments() for name in layers}
    for batch in batches:
        for tasks in fused(batch, None):
            inputs = to(join([batch[task] for task in tasks]), model.pool.device)
            with _watched(layers, moments):
                try:
                    model(inputs, params)
                except ValueError as error:  # of batch_norm, whose message does not say what to do
                    if "more than 1 value per channel" not in str(error):
                        raise
                    raise InputError(
                        f"batch_norm.policy=recalibrate: {error} Set data.batch_size to 2 or more, or choose average."
                    ) from error
    return {
        f"{name}{suffix}": value.to(model.pool.device, torch.float32)
        for name, seen in moments.items()
        for suffix, value in zip(_STATISTICS, seen.result(), strict=True)
        if seen.count
    }


class _Moments:
    """Mean and variance of a layer's inputs over batches, in float64 (Chan et al., 1983)."""

    def __init__(self) -> None:
        self.count = 0
        self._mean = torch.zeros(())
        self._squares = torch.zeros(())

    def add(self, inputs: Tensor) -> None:
        """Add inputs (B, C, ...)."""
        count = inputs.numel() // inputs.shape[1]
        dims = [0, *range(2, inputs.ndim)]
        variance, mean = (m.double().cpu() for m in torch.var_mean(inputs.float(), dims, correction=0))
        total, difference = self.count + count, mean - self._mean
        self._mean = self._mean + difference * (count / total)
        self._squares = self._squares + variance * count + difference.square() * (self.count * count / total)
        self.count = total

    def result(self) -> tuple[Tensor, Tensor]:
        """Return mean and unbiased variance, as torch's own layers keep them, (C,)."""
        return self._mean, self._squares / max(1, self.count - 1)


@contextmanager
def _watched(layers: Mapping[str, _BatchNorm], moments: Mapping[str, _Moments]) -> Iterator[None]:
    """Let layers normalise by the batch, and add what they see to ``moments``; their own statistics stay."""
    with ExitStack() as stack:
        for name, layer in layers.items():
            seen = moments[name]
            stack.enter_context(layer.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.add(inputs[0])))
            stack.callback(vars(layer).update, training=layer.training, track_running_stats=layer.track_running_stats)
            # Both: with statistics that are tracked, a layer in training mode would write into the buffers.
            layer.training, layer.track_running_stats = True, False
        yield
