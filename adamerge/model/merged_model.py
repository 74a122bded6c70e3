"""The functional-call wrapper: an encoder whose parameters are the merge of a pool.

Legend: B batch, F features, C classes, E experts, G groups. Inputs (B, ...) are a tensor or a mapping of tensors, see
:mod:`adamerge.data.batch`.

How a step runs through the encoder is in :mod:`adamerge.model.merged_encoder`; what it runs on in
:mod:`adamerge.model.weights`, and in :mod:`adamerge.model.sharding` where processes hold parts of the weights.
"""

import copy
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from adamerge.data.batch import PADDING, Inputs, Outputs, Read, Valid, join, read_output, size
from adamerge.errors import InputError, did_you_mean, shorten
from adamerge.model.beside import weights_of
from adamerge.model.coefficients import Coefficients
from adamerge.model.encoder import EncoderOptions, MicroBatch, Runner, check_names
from adamerge.model.merged_encoder import MergedEncoder
from adamerge.model.teachers import TeacherCache, outputs_of
from adamerge.pool.lazy import LazyTensors
from adamerge.pool.pool import ExpertPool


class MergedModel(nn.Module):
    """An encoder that runs on merged parameters; the coefficients are its only parameters.

    The encoder lends its code, not its weights: it is not registered here, is never changed except
    for being put into eval mode, and need not move to the device.

    Args:
        encoder: The shared network; its parameters and buffers are named as in the pool.
        pool: Base and experts.
        coefficients: Made for ``pool``.
        heads: Task to its frozen classifier, features (B, F) to logits (B, C); copied. {} where the network's own
            output is the logits, of all tasks.
        teachers: Task to the expert that teaches it; default the expert of the same name.
        options: How a step runs the encoder; default as it is.
        read: Reads the network's result; default :func:`~adamerge.data.batch.read_output`, which takes a tensor as it
            is. Its ``features`` go through the head.
        valid: The rows of the logits that count, by the inputs, see :class:`~adamerge.Outputs`; default all.

    Raises:
        InputError: If names or shapes of encoder and pool differ, the coefficients are another pool's,
            a teacher is unknown, or the options name modules that the encoder lacks.

    Attributes:
        heads: Task to head, on the pool's device.
        weights: What the encoder runs on: all of it, or this process's parts.
        encoder_buffers: The buffers that the merged model runs with, by the encoder's names.

    Example:
        >>> encoder, head = torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)
        >>> expert = {name: tensor + 0.1 for name, tensor in encoder.state_dict().items()}
        >>> pool = ExpertPool.from_state_dicts(encoder.state_dict(), {"cars": expert})
        >>> model = MergedModel(encoder, pool, Coefficients(pool, "task"), heads={"cars": head})
        >>> model.logits(torch.zeros(5, 4), "cars").shape, [name for name, _ in model.named_parameters()]
        (torch.Size([5, 2]), ['coefficients.raw'])
    """

    def __init__(
        self,
        encoder: nn.Module,
        pool: ExpertPool,
        coefficients: Coefficients,
        heads: Mapping[str, nn.Module],
        teachers: Mapping[str, str] | None = None,
        options: EncoderOptions | None = None,
        read: Read = read_output,
        valid: Valid | None = None,
    ) -> None:
        super().__init__()
        coefficients.check(pool)
        check_names(encoder, pool)
        self.coefficients = coefficients
        # In a tuple and a dict, so that nn.Module does not register them: they must not enter
        # checkpoints, optimizers or the broadcasts of distributed training.
        self._unregistered = (encoder.eval(),)
        options = options or EncoderOptions()
        self._runner = Runner(encoder, options)
        self.heads = {task: copy.deepcopy(head).eval().requires_grad_(False) for task, head in heads.items()}
        self.read, self.valid = read, valid
        self.pool = pool
        self.encoder_buffers = pool.buffers({name: b.detach().clone() for name, b in encoder.named_buffers()})
        self.weights = weights_of(options, encoder, pool, coefficients.index)
        of_own_name = {task: task for task in heads or pool.expert_names if task in pool.expert_names}
        self.teachers = of_own_name | dict(teachers or {})
        for task, expert in self.teachers.items():
            if expert not in pool.expert_names:
                raise InputError(
                    f"teachers[{task!r}]: no expert {expert!r} in the pool.{did_you_mean(expert, pool.expert_names)}"
                )
        self.teacher_cache = TeacherCache()

    @property
    def is_sharded(self) -> bool:
        """Whether this process holds a part of the model only: see :class:`~adamerge.model.sharding.ShardedModel`."""
        return self.weights.is_sharded

    @property
    def computes_in(self) -> str:
        """What decides the rounding of its passes: a dtype, and whether the base is in another."""
        base = "" if self.weights.base_dtype == "float32" else f", base in {self.weights.base_dtype}"
        return f"{self._runner.dtype or self.pool.compute_dtype}{base}"

    @property
    def encoder(self) -> nn.Module:
        """The encoder that was passed in."""
        return self._unregistered[0]

    def to_device(self, device: torch.device | str) -> "MergedModel":
        """Move coefficients, pool, heads and buffers; ``nn.Module.to`` reaches the coefficients only."""
        self.to(device)
        self.pool.to(device)
        for head in self.heads.values():
            head.to(device)
        self.encoder_buffers = {name: b.to(device) for name, b in self.encoder_buffers.items()}
        self.weights.forget()
        return self

    def set_buffers(self, values: Mapping[str, Tensor]) -> None:
        """Let the merged model run with other buffers than the base's, such as BatchNorm statistics.

        Args:
            values: Buffer name to value; names that the encoder lacks are left out.
        """
        buffers = self.encoder_buffers
        chosen = {name: t.to(buffers[name], copy=True) for name, t in values.items() if name in buffers}
        self.encoder_buffers = buffers | chosen

    def base_parameters(self) -> MutableMapping[str, Tensor]:
        """Return the base's own parameters and buffers, as :meth:`forward` takes them."""
        base, dtype = self.pool.base, self.weights.dtype
        rounded = base if dtype is None else self.pool.tensors_of(None, tuple(base), dtype)
        return self.weights.read(rounded.__getitem__, self.pool.buffers(self.encoder_buffers))

    def expert_parameters(self, expert: str) -> MutableMapping[str, Tensor]:
        """Return the raw expert's own parameters and buffers, as :meth:`forward` takes them; one model's memory."""
        parameters = self.pool.expert_parameters(expert)
        return self.weights.read(
            parameters.__getitem__, self.pool.buffers(self.encoder_buffers, expert), with_fixed=True
        )

    def raw_expert(self, expert: str) -> Mapping[str, Tensor]:
        """Return the raw expert as a step runs its teacher, for :meth:`outputs`: rounded, or beside the base."""
        return self.weights.expert(expert, self.pool.buffers(self.encoder_buffers, expert))

    def merge(self) -> dict[str, Tensor] | LazyTensors:
        """Return the merged parameters, differentiable in the coefficients; call once per step.

        Of a sharded model: whole and without gradient, each merged when it is asked for.
        """
        return self.weights.merge(self.coefficients)

    def forward(self, inputs: Inputs, params: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the encoder's features (B, F) under ``params`` (default: a fresh merge).

        Of a network whose result has none, its own logits (B, ..., C).
        """
        with self._swapped(self.merge() if params is None else self._of_encoder(params)):
            outputs = self._read(self._runner(self.encoder, inputs, plain=True)[0], inputs)
        return outputs.logits if outputs.features is None else outputs.features

    def logits(self, inputs: Inputs, task: str, params: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the logits (B, ..., C) of one task under ``params`` (default: a fresh merge)."""
        return self.outputs(inputs, task, params).logits

    def outputs(self, inputs: Inputs, task: str, params: Mapping[str, Tensor] | None = None) -> Outputs:
        """Return the outputs of one task, the rows that count among them, under ``params`` (default: a fresh merge).

        Args:
            inputs: (B, ...).
            task: The one whose head is applied, if there are heads.
            params: By the encoder's names, or a whole checkpoint by the names of the pool's files, such as
                ``adamerge.merge(pool, coefficients, detach=True)``.
        """
        with self._swapped(self.merge() if params is None else self._of_encoder(params)):
            return self._outputs({task: inputs}, (), plain=True)[task]

    def count_rows(self, inputs: Inputs) -> int:
        """Return how many rows of a batch count; B where all do."""
        valid = None if self.valid is None else self.valid(inputs)
        return size(inputs) if valid is None else int(valid.sum())

    @contextmanager
    def merged(
        self,
        values: Tensor,
        *,
        hidden_layers: Sequence[str] = (),
        micro_batch: MicroBatch = "auto",
        scale: float | Tensor = 1.0,
        needs_gradient: bool = True,
        on_gradient: Callable[[str, Tensor], None] | None = None,
    ) -> Iterator[MergedEncoder]:
        """Merge once, and let the encoder run forward and backward on that while the block lasts.

        Args:
            values: Coefficients (E, G); only their values are used.
            hidden_layers: Modules of the encoder to capture, by path or glob.
            micro_batch: Most inputs in one pass, in whole tasks; ``"auto"`` for a rule by the inputs' size and the
                device, None for no limit.
            scale: Factor on the losses in the backward pass, which the gradient is divided by (fp16).
            needs_gradient: False to compute losses only.
            on_gradient: Sees each merged parameter's name and gradient (*S), times ``scale``, before it is dropped.

        Example:
            >>> encoder = torch.nn.Linear(2, 2, bias=False)
            >>> pool = ExpertPool.from_state_dicts({"weight": torch.eye(2)}, {"cars": {"weight": 2 * torch.eye(2)}})
            >>> model = MergedModel(encoder, pool, Coefficients(pool, "task"), heads={"cars": torch.nn.Identity()})
            >>> with model.merged(torch.tensor([[0.5]])) as merged:
            ...     for inputs in merged.groups({"cars": torch.ones(3, 2)}):
            ...         merged.backward(merged(inputs)["cars"].logits.mean())
            >>> merged.gradient  # of 1 + coefficient
            tensor([[1.]])
        """
        coefficients = values.detach().clone().requires_grad_()
        leaves = self.weights.merged_leaves(coefficients)
        run = partial(self._outputs, hidden_layers=hidden_layers)
        products = self._runner.products(self.pool.device)
        merged = MergedEncoder(run, self.weights, leaves, coefficients, micro_batch, scale, products, on_gradient)
        with torch.set_grad_enabled(needs_gradient), self._swapped(leaves):
            yield merged

    @torch.no_grad()
    def expert_outputs(
        self, expert: str, batches: Iterable[tuple[str, Inputs]], hidden_layers: Sequence[str] = ()
    ) -> Iterator[Outputs]:
        """Yield the raw expert's outputs for batches of (task, inputs); its parameters are formed once.

        All processes of a sharded model must call, each for its own batches.
        """
        params = self.raw_expert(expert)
        for task, inputs, is_own in self.weights.padded(batches):
            with self._swapped(params):
                outputs = self._outputs({task: inputs}, hidden_layers, plain=True)[task]
            if is_own:
                yield outputs

    def teacher(self, task: str, inputs: Inputs, indices: Tensor, hidden_layers: Sequence[str] = ()) -> Outputs:
        """Return the compact outputs of the task's teacher, from the cache where it has all of ``indices``.

        Raises:
            InputError: If no expert teaches the task; or, of a sharded model, if the cache lacks one: in the midst of a
                step the encoder holds the merged weights.
        """
        cached = self.teacher_cache.get(task, indices)
        if cached is not None and all(fnmatch.filter(cached.hidden, layer) for layer in hidden_layers):
            return cached
        if self.is_sharded:
            raise InputError(
                f"Task {task!r}: the objective asks the expert in the midst of a step, which a sharded model cannot. "
                "Give the objective the class attribute uses_teacher = True, so that the experts are asked before."
            )
        outputs = next(iter(self.expert_outputs(self.teacher_of(task), [(task, inputs)], hidden_layers)))
        tensors = self.teacher_cache.kept(outputs)
        self.teacher_cache.put_tensors(task, indices, tensors)
        return outputs_of(tensors)

    def teacher_of(self, task: str) -> str:
        """Return the expert that teaches a task."""
        if task not in self.teachers:
            raise InputError(
                f"Task {task!r} has no expert of its own name to imitate; the pool has "
                f"{shorten(self.pool.expert_names)}. Name one: teachers={{{task!r}: ...}}."
            )
        return self.teachers[task]

    def _swapped(self, params: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        return self.weights.swapped(params, self.encoder_buffers)

    def _of_encoder(self, params: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return parameters by the encoder's names, of those that may be a whole checkpoint's by its names."""
        names = {name for name, _ in chain(self.encoder.named_parameters(), self.encoder.named_buffers())}
        unknown = params.keys() - names
        if not unknown or not unknown <= set(self.pool.source.keys):
            return params  # where a name is none of either, torch says which
        keys = {self.pool.keys.file_key(name): name for name in names if name in self.pool.keys}
        chosen = {name: params[key] for key, name in keys.items() if key in params}
        return {
            name: tensor.to(
                self.pool.device, self.weights.dtype_of(tensor.shape) if tensor.is_floating_point() else tensor.dtype
            )
            for name, tensor in (chosen | {name: params[name] for name in names if name in params}).items()
        }

    def _outputs(
        self, inputs: Mapping[str, Inputs], hidden_layers: Sequence[str], *, plain: bool = False
    ) -> dict[str, Outputs]:
        """Run the inputs of several tasks as one batch, divide it again, and apply each task's head."""
        joined = join(list(inputs.values()))
        output, hidden = self._runner(self.encoder, joined, hidden_layers, plain=plain)
        whole = self._read(output, joined)
        whole.hidden = {**whole.hidden, **hidden}
        if self._runner.dtype is not None:
            whole = whole.single()
        is_ambiguous = self.read is read_output and isinstance(output, Tensor)
        sizes = [size(batch) for batch in inputs.values()]
        return {
            task: self._headed(task, part, is_ambiguous) for task, part in zip(inputs, whole.split(sizes), strict=True)
        }

    def _read(self, output: Any, inputs: Inputs) -> Outputs:
        """Read the network's result, and say which rows count."""
        outputs = self.read(output, inputs)
        if self.valid is not None:
            outputs.valid = self.valid(inputs)
        if isinstance(inputs, Mapping) and PADDING in inputs:
            outputs.padding = inputs[PADDING].bool()
        return outputs

    def _headed(self, task: str, outputs: Outputs, is_ambiguous: bool) -> Outputs:
        """Apply a task's head to features (B, ..., F); without any heads the network's own logits stay.

        Args:
            task: The task.
            outputs: As read.
            is_ambiguous: Whether the network returned a bare tensor, of which only (B, F) says where the classes are.
        """
        if not self.heads:
            outputs.features = None if outputs.features is outputs.logits else outputs.features
        elif task not in self.heads:
            raise InputError(
                f"No head for task {task!r}; there are {shorten(self.heads)}.{did_you_mean(task, self.heads)}"
            )
        else:
            if outputs.features is None:
                raise InputError(f"Task {task!r}: it has a head, but the backbone's read() gives no features for it.")
            outputs.logits = self.heads[task](outputs.features)
        if is_ambiguous and outputs.logits.ndim > 2:
            raise InputError(
                f"Task {task!r}: expected logits (B, C), one row per input, found shape {tuple(outputs.logits.shape)}: "
                "which axis holds the classes is not known. Pool the features in the head, or give the backbone a "
                "method read(output, inputs) that returns logits (B, ..., C), the classes last."
            )
        return outputs
