"""The experts' outputs, kept in a folder from run to run.

One file per batch, named by a hash of everything that decides its content: the expert, the head, the encoder, the
layers asked for, how it is computed, and the inputs themselves. Outputs that differ in any of these have another name
(an encoder counts by its class, its print and its buffers: empty the folder after editing its code). The inputs are
hashed as the encoder sees them, preprocessed: inputs are still read in each run, which costs little beside asking an
expert, and another transform, split or sample gives another name.

The batch is the unit, not the sample: a sample's outputs change in their last bits with the batch it is part of, and a
run must not depend on what other runs have left in the folder. Samples come in a fixed order
(:meth:`~adamerge.data.UnlabeledTasks.teacher_loader`), so the next run on the same data asks for the same batches.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from adamerge.checkpoints.hashes import digest
from adamerge.checkpoints.tensor_cache import TensorCache
from adamerge.data.batch import Inputs, TaskBatch, read_output, to
from adamerge.model.merged_model import MergedModel
from adamerge.pool.low_rank import matmul_precision
from adamerge.system.files import ensure_writable

_FORMAT = 1


class TeacherFiles:
    """A folder of the experts' outputs, which several processes may share.

    Args:
        folder: Made if needed.

    Raises:
        InputError: If the folder cannot be written to.
    """

    def __init__(self, folder: Path | str) -> None:
        self._cache = TensorCache("teacher", Path(folder))
        ensure_writable(self._cache.folder)
        self._read = self._written = 0

    def summary(self) -> str:
        """Say how many batches came from the folder and how many went there."""
        return f"{self._read} batches read from {self._cache.folder}, {self._written} computed and added"

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Return the tensors of the outputs under a key, on the CPU; None where the folder has no sound ones."""
        tensors = self._cache.get(key, ("logits",))
        self._read += tensors is not None
        return tensors

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write what is kept of the outputs of a batch; where that fails the run goes on without."""
        self._written += self._cache.put(key, dict(tensors))


def ask_expert(
    model: MergedModel,
    task: str,
    batches: Sequence[TaskBatch],
    hidden_layers: Sequence[str] = (),
    files: TeacherFiles | None = None,
    computed: Mapping[str, str] | None = None,
) -> None:
    """Put the outputs of a task's expert for batches into the model's cache.

    Args:
        model: Its pool has the expert, its ``teacher_cache`` gets the outputs.
        task: The task whose expert gives the outputs.
        batches: Inputs (B, ...) and their positions in the task's stream (B,).
        hidden_layers: Modules of the encoder to capture, by path or glob.
        files: Looked into before the expert is asked; if they have all, not even its parameters are read.
        computed: What else decides the bits of the outputs, such as precision and device.
    """
    expert, device = model.teacher_of(task), model.pool.device
    model_key = _model_key(model, task, hidden_layers, computed or {}) if files else ""
    asked: list[tuple[Tensor, str]] = []

    def missing() -> Iterator[tuple[str, Inputs]]:
        for inputs, indices in batches:
            key = digest({"model": model_key, "inputs": inputs})[:40] if files else ""
            stored = files.get(key) if files else None
            if stored is None:
                asked.append((indices, key))
                yield task, to(inputs, device)
            else:
                tensors = {name: tensor.to(device) for name, tensor in stored.items()}
                model.teacher_cache.put_tensors(task, indices, tensors)

    questions = missing()
    first = next(questions, None)
    if first is None and not model.is_sharded:
        return
    asking = questions if first is None else itertools.chain([first], questions)
    for outputs in model.expert_outputs(expert, asking, hidden_layers):
        indices, key = asked.pop()
        tensors = model.teacher_cache.kept(outputs)
        model.teacher_cache.put_tensors(task, indices, tensors)
        if files:
            files.put(key, tensors)


def _model_key(model: MergedModel, task: str, hidden_layers: Sequence[str], computed: Mapping[str, str]) -> str:
    """Hash all that decides the outputs of a task's expert but the inputs.

    The encoder counts with its class, its modules as they are printed, and its own buffers; a head with its tensors;
    the base too, as it stands in for what an expert's file lacks.
    """
    hashes, encoder, head = model.pool.hashes(), model.encoder, model.heads.get(task)
    cache = model.teacher_cache
    readers = [model.read, model.valid] if model.read is not read_output or model.valid else []
    read = {"read": [_name(reader) for reader in readers]} if readers else {}
    return digest(
        {
            "format": _FORMAT,
            "files": [hashes["base"], hashes[model.teacher_of(task)], model.pool.keys_digest],
            "encoder": [*_described(encoder), dict(encoder.named_buffers())],
            "head": [*_described(head), head.state_dict()] if head else [],
            **read,
            **({} if cache.is_exact else {"kept": [cache.top_k, cache.dtype]}),
            "hidden_layers": list(hidden_layers),
            "dtype": model.computes_in,
            "matmul": matmul_precision(),
            "torch": torch.__version__,
            "computed": dict(computed),
        }
    )


def _name(function: object) -> str:
    """Return the import path of a function or method, with the print of what it is bound to."""
    owner = getattr(function, "__self__", None)
    path = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"
    return _without_addresses(f"{path} {owner!r}" if owner is not None else path)


def _described(module: nn.Module) -> list[str]:
    """Return a module's class and print, without addresses in memory."""
    return [f"{type(module).__module__}.{type(module).__qualname__}", _without_addresses(repr(module))]


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)
