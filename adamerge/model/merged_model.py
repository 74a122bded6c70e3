"""The functional-call wrapper: an encoder whose parameters are the merge of a pool.

Legend: B batch, F features, C classes, E experts, G groups.

One step (:meth:`MergedModel.step`):

    coefficients (E, G) --merge_into--> leaves {name: (*S)}          once per step
    all tasks' inputs --encoder(leaves)--> features --heads--> logits   fused where shapes agree
    losses --backward--> d loss / d leaves                            inside the same functional call
    pull_back --> d loss / d coefficients (E, G)                      one pass over the task vectors

Forward and backward share one functional call, so that activation checkpointing recomputes with the
merged weights, and nothing keeps a graph of the merge: work and memory are linear in E.
"""

import copy
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adamerge.data.batch import Outputs
from adamerge.errors import InputError, did_you_mean, shorten
from adamerge.model.calls import MicroBatch, call_with, check_names, fused
from adamerge.model.coefficients import Coefficients
from adamerge.model.encoder import EncoderOptions, Runner
from adamerge.model.merge import PullBack, merge, merge_into
from adamerge.model.teachers import TeacherCache
from adamerge.pool.pool import ExpertPool


@dataclass
class TaskStep:
    """All that an objective sees of one task's batch: "unlabeled" is a type, not a promise.

    Attributes:
        task: Its name.
        inputs: (B, ...).
        indices: Positions of the samples in the task's stream, (B,).
        outputs: The merged model's, with gradient.
        coefficients: (E, G), a leaf: for anchors and regularisers; its gradient is added.
        initial: The coefficients before the first step, (E, G); the same after a resume.
        num_tasks: Batches in the step: what regularises the coefficients divides by it, to count once.
    """

    task: str
    inputs: Tensor
    indices: Tensor
    outputs: Outputs
    coefficients: Tensor
    _teacher: Callable[[str, Tensor, Tensor], Outputs] = field(repr=False)
    _forward: Callable[[Tensor, str], Outputs] = field(repr=False)
    initial: Tensor | None = None
    num_tasks: int = 1
    _asked: Outputs | None = field(default=None, init=False, repr=False)

    def teacher(self) -> Outputs:
        """Return the outputs of the task's own raw expert for ``inputs``, without gradient, cached by index."""
        if self._asked is None:
            self._asked = self._teacher(self.task, self.inputs, self.indices)
        return self._asked

    def forward(self, inputs: Tensor) -> Outputs:
        """Run a further pass through the merged parameters (augmented views), with gradient."""
        return self._forward(inputs, self.task)


@dataclass
class StepResult:
    """Losses by task (detached scalars) and the gradient of their weighted sum, (E, G)."""

    losses: dict[str, Tensor]
    gradient: Tensor


class MergedModel(nn.Module):
    """An encoder that runs on merged parameters; the coefficients are its only parameters.

    The encoder lends its code, not its weights: it is not registered here, is never changed except
    for being put into eval mode, and need not move to the device.

    Args:
        encoder: The shared network; its parameters and buffers are named as in the pool.
        pool: Base and experts.
        coefficients: Made for ``pool``.
        heads: Task to its frozen classifier, features (B, F) to logits (B, C); copied.
        teachers: Task to the expert that teaches it; default the expert of the same name.
        options: How a step runs the encoder; default as it is.

    Raises:
        InputError: If names or shapes of encoder and pool differ, the coefficients are another pool's,
            a teacher is unknown, or the options name modules that the encoder lacks.

    Attributes:
        heads: Task to head, on the pool's device.

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
    ) -> None:
        super().__init__()
        coefficients.check(pool)
        check_names(encoder, pool)
        self.coefficients = coefficients
        # In a tuple and a dict, so that nn.Module does not register them: they must not enter
        # checkpoints, optimizers or the broadcasts of distributed training.
        self._unregistered = (encoder.eval(),)
        self._runner = Runner(encoder, options or EncoderOptions())
        self.heads = {task: copy.deepcopy(head).eval().requires_grad_(False) for task, head in heads.items()}
        self.pool = pool
        self._buffers_of_encoder = pool.buffers({name: b.detach().clone() for name, b in encoder.named_buffers()})
        self._fixed = [name for name, _ in encoder.named_parameters() if name in pool.fixed]
        self._leaves: dict[str, Tensor] = {}
        self.teachers = {task: task for task in heads if task in pool.expert_names} | dict(teachers or {})
        for task, expert in self.teachers.items():
            if expert not in pool.expert_names:
                raise InputError(
                    f"teachers[{task!r}]: no expert {expert!r} in the pool.{did_you_mean(expert, pool.expert_names)}"
                )
        self.teacher_cache = TeacherCache()

    @property
    def is_sharded(self) -> bool:
        """Whether this process holds a part of the model only: see :mod:`adamerge.model.sharded_model`."""
        return False

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
        self._buffers_of_encoder = {name: b.to(device) for name, b in self._buffers_of_encoder.items()}
        self._leaves = {}
        return self

    def set_buffers(self, values: Mapping[str, Tensor]) -> None:
        """Let the merged model run with other buffers than the base's, such as BatchNorm statistics.

        Args:
            values: Buffer name to value; names that the encoder lacks are left out.
        """
        own = self._buffers_of_encoder
        self._buffers_of_encoder = own | {name: t.to(own[name], copy=True) for name, t in values.items() if name in own}

    @property
    def encoder_buffers(self) -> dict[str, Tensor]:
        """The buffers that the merged model runs with, by the encoder's names."""
        return dict(self._buffers_of_encoder)

    def base_parameters(self) -> MutableMapping[str, Tensor]:
        """Return the base's own parameters and buffers, as :meth:`forward` takes them."""
        return {**self.pool.base, **self.pool.buffers(self._buffers_of_encoder)}

    def merge(self) -> dict[str, Tensor]:
        """Return the merged parameters, differentiable in the coefficients; call once per step."""
        return merge(self.pool, self.coefficients)

    def forward(self, inputs: Tensor, params: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the encoder's features (B, F) under ``params`` (default: a fresh merge)."""
        features: Tensor = self._call(
            lambda encoder: self._runner(encoder, inputs, plain=True)[0], self.merge() if params is None else params
        )
        return features

    def logits(self, inputs: Tensor, task: str, params: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the logits (B, C) of one task's head under ``params`` (default: a fresh merge)."""
        logits: Tensor = self._head(task)(self(inputs, params))
        return logits

    def step(
        self,
        inputs: Mapping[str, Tensor],
        loss: Callable[[str, Outputs, Tensor, Callable[[Tensor, str], Outputs]], Tensor],
        *,
        values: Tensor,
        weights: Mapping[str, float] | None = None,
        hidden_layers: Sequence[str] = (),
        micro_batch: MicroBatch = "auto",
        scale: float | Tensor = 1.0,
        needs_gradient: bool = True,
        on_gradient: Callable[[str, Tensor], None] | None = None,
    ) -> StepResult:
        """Run forward and backward of all tasks on one merge, and contract the gradient once.

        Args:
            inputs: Task to inputs (B, ...); tasks whose inputs agree in shape share one forward.
            loss: ``(task, outputs, coefficients leaf, forward) -> scalar``.
            values: Coefficients (E, G); only their values are used.
            weights: Task to the factor of its loss in the gradient, default 1.
            hidden_layers: Modules of the encoder to capture, by path or glob.
            micro_batch: Most inputs in one fused forward, in whole tasks; ``"auto"`` for a rule by the inputs'
                size and the device, None for no limit.
            scale: Factor on the losses in the backward pass that the gradient is divided by (fp16).
            needs_gradient: False to compute the losses only; the gradient is 0 then.
            on_gradient: Sees each merged parameter's name and gradient (*S), times ``scale``, before it is dropped.

        Returns:
            Losses by task, unweighted, and the gradient with respect to ``values``.
        """
        leaves = self._merged_leaves(values.detach())
        anchor = values.detach().clone().requires_grad_()
        gradient = self._pull_back()
        losses: dict[str, Tensor] = {}
        passes, groups = self._passes(inputs, micro_batch)

        def run(encoder: nn.Module) -> None:
            def outputs(tasks: Mapping[str, Tensor]) -> dict[str, Outputs]:
                batches = list(tasks.values())
                joined = torch.cat(batches) if len(batches) > 1 else batches[0]
                features, hidden = self._runner(encoder, joined, hidden_layers)
                return self._split(features, hidden, {task: len(batch) for task, batch in tasks.items()})

            def forward(batch: Tensor, task: str) -> Outputs:
                self._check_forward()
                return outputs({task: batch})[task]

            for i, tasks in enumerate(groups):
                found = outputs({task: passes[task] for task in tasks})
                total = self._nothing(found)
                for task, output in found.items():
                    if task not in inputs:
                        continue
                    value = loss(task, output, anchor, forward)
                    losses[task] = value.detach()
                    total = total + value * (weights or {}).get(task, 1.0)
                if not needs_gradient:
                    continue
                complete = leaves if i + 1 == len(groups) else {}  # before, the gradients of the groups add up
                with gradient.collect(complete, on_gradient), torch.autocast(values.device.type, enabled=False):
                    (total * scale).backward()

        with torch.set_grad_enabled(needs_gradient):
            self._call(run, leaves)
        result = gradient.result()
        if anchor.grad is not None:
            result += anchor.grad
        return StepResult(losses, result / scale)

    def expert_parameters(self, expert: str) -> MutableMapping[str, Tensor]:
        """Return the raw expert's own parameters and buffers, as :meth:`forward` takes them; one model's memory."""
        own = self.pool.expert_parameters(expert)
        params = {name: own[name] for name in (*self.pool.names, *self._fixed)}
        return params | self.pool.buffers(self._buffers_of_encoder, expert)

    @torch.no_grad()
    def expert_outputs(
        self, expert: str, batches: Iterable[tuple[str, Tensor]], hidden_layers: Sequence[str] = ()
    ) -> Iterator[Outputs]:
        """Yield the raw expert's outputs for batches of (task, inputs); its parameters are formed once."""
        params = self.expert_parameters(expert)
        for task, inputs in batches:

            def run(encoder: nn.Module, task: str = task, inputs: Tensor = inputs) -> Outputs:
                features, hidden = self._runner(encoder, inputs, hidden_layers, plain=True)
                return self._split(features, hidden, {task: len(inputs)})[task]

            yield self._call(run, params)

    def teacher(self, task: str, inputs: Tensor, indices: Tensor, hidden_layers: Sequence[str] = ()) -> Outputs:
        """Return the outputs of the task's teacher, from the cache where it has all of ``indices``.

        Raises:
            InputError: If no expert teaches the task.
        """
        cached = self.teacher_cache.get(task, indices)
        if cached is None or not all(fnmatch.filter(cached.hidden, layer) for layer in hidden_layers):
            output = next(iter(self.expert_outputs(self.teacher_of(task), [(task, inputs)], hidden_layers)))
            self.teacher_cache.put(task, indices, output)
            return output
        return cached

    def teacher_of(self, task: str) -> str:
        """Return the expert that teaches a task."""
        if task not in self.teachers:
            raise InputError(
                f"Task {task!r} has no expert of its own name to imitate; the pool has "
                f"{shorten(self.pool.expert_names)}. Name one: teachers={{{task!r}: ...}}."
            )
        return self.teachers[task]

    def _passes(
        self, inputs: Mapping[str, Tensor], micro_batch: MicroBatch
    ) -> tuple[Mapping[str, Tensor], list[list[str]]]:
        """Return what runs through the encoder in a step, by task, and which tasks share a pass."""
        return inputs, fused(inputs, micro_batch)

    def _nothing(self, outputs: Mapping[str, Outputs]) -> Tensor:
        """Return the 0 that a pass's losses are added to."""
        return torch.zeros((), device=next(iter(outputs.values())).features.device)

    def _pull_back(self) -> PullBack:
        return PullBack(self.pool, self.coefficients.index)

    def _check_forward(self) -> None:
        """Refuse further passes in a step where they cannot be."""

    def _merged_leaves(self, values: Tensor) -> Mapping[str, Tensor]:
        """Merge into tensors that are kept from step to step, as autograd leaves."""
        if not self._leaves:
            self._leaves = {name: torch.empty_like(t).requires_grad_() for name, t in self.pool.base.items()}
        for leaf in self._leaves.values():
            leaf.grad = None  # left over where a loss raised
        torch.clear_autocast_cache()  # it may hold the leaves' last values in half precision
        merge_into(
            {name: leaf.detach() for name, leaf in self._leaves.items()}, self.pool, self.coefficients.index, values
        )
        return self._leaves

    def _call(self, function: Callable[[nn.Module], Any], params: Mapping[str, Tensor]) -> Any:
        """Run ``function(encoder)`` with parameters and buffers swapped in for its duration."""
        tensors = {name: self.pool.fixed[name] for name in self._fixed} | self._buffers_of_encoder | dict(params)
        return call_with(self.encoder, tensors, function)

    def _split(self, features: Tensor, hidden: Mapping[str, Tensor], tasks: Mapping[str, int]) -> dict[str, Outputs]:
        """Divide a fused batch among its tasks, and apply their heads."""
        sizes = list(tasks.values())
        pieces = {name: tensor.split(sizes) for name, tensor in hidden.items()}
        return {
            task: Outputs(self._head(task)(part), part, {name: piece[i] for name, piece in pieces.items()})
            for i, (task, part) in enumerate(zip(tasks, features.split(sizes), strict=True))
        }

    def _head(self, task: str) -> nn.Module:
        if task not in self.heads:
            raise InputError(
                f"No head for task {task!r}; there are {shorten(self.heads)}.{did_you_mean(task, self.heads)}"
            )
        return self.heads[task]
