"""The encoder while it runs on one merge: the middle of a step, from the inputs to the gradient of the coefficients.

Legend: B batch, E experts, G groups, *S the shape of a parameter.

    inputs (B, ...) of the tasks of a group --encoder(leaves)--> features --heads--> outputs     one pass per group
    loss --backward--> d loss / d leaves (*S) --pull back--> d loss / d coefficients (E, G)       as each is complete

Forward and backward passes happen while the leaves are in the encoder, so that activation checkpointing recomputes with
the merged weights. Nothing keeps a graph of the merge, and the gradients of a whole model never exist at once.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from adamerge.data.batch import Inputs, Outputs
from adamerge.errors import InputError
from adamerge.model.encoder import MicroBatch
from adamerge.model.weights import WholeWeights

Run = Callable[[Mapping[str, Inputs]], dict[str, Outputs]]  # inputs (B, ...) by task, as one pass


class MergedEncoder:
    """The encoder on the merge of :meth:`~adamerge.MergedModel.merged`: call it while that block lasts.

    Args:
        run: Runs the encoder on the leaves.
        weights: The model's.
        leaves: The merged parameters (*S), autograd leaves.
        coefficients: Those that they were merged with, (E, G), a leaf.
        micro_batch: See :func:`~adamerge.model.encoder.fused`.
        scale: Factor on the losses in the backward pass, which the gradient is divided by (fp16).
        products: What a backward pass runs under, see :func:`~adamerge.model.half_products.half_products`.
        on_gradient: Sees each merged parameter's name and gradient (*S), times ``scale``, before it is dropped.

    Attributes:
        coefficients: As given: what a loss takes from it directly counts in the gradient, too.
    """

    def __init__(
        self,
        run: Run,
        weights: WholeWeights,
        leaves: Mapping[str, Tensor],
        coefficients: Tensor,
        micro_batch: MicroBatch,
        scale: float | Tensor,
        products: Callable[[], AbstractContextManager[Any]],
        on_gradient: Callable[[str, Tensor], None] | None,
    ) -> None:
        self._run, self._weights, self._leaves = run, weights, leaves
        self._micro_batch, self._scale, self._on_gradient = micro_batch, scale, on_gradient
        self.coefficients, self._products = coefficients, products
        self._pull_back = weights.pull_back()

    def groups(self, inputs: Mapping[str, Inputs]) -> Iterator[Mapping[str, Inputs]]:
        """Yield, for each forward pass of a step, the tasks that share it, with their inputs (B, ...).

        Where processes hold parts of the weights all of them run the same passes, with zeros for tasks they lack.
        """
        self._tasks = inputs.keys()
        passes, groups = self._weights.passes(inputs, self._micro_batch)
        for number, tasks in enumerate(groups, 1):
            self._is_last = number == len(groups)
            yield {task: passes[task] for task in tasks}

    def __call__(self, inputs: Mapping[str, Inputs]) -> dict[str, Outputs]:
        """Run one group; return the outputs of this process's own tasks."""
        outputs = self._run(inputs)
        self._zero = self._weights.zero(outputs)
        return {task: output for task, output in outputs.items() if task in self._tasks}

    def forward(self, inputs: Inputs, task: str) -> Outputs:
        """Run a further pass of one task on the merged parameters.

        Raises:
            InputError: If processes hold parts of the weights.
        """
        if self._weights.is_sharded:
            raise InputError(
                "The objective runs further passes in a step (step.forward), whose number a sharded model cannot keep "
                "the same on all devices. Use trainer=ddp, or data.views for augmented images."
            )
        return self._run({task: inputs})[task]

    def backward(self, loss: Tensor | float) -> None:
        """Differentiate the loss of the group that ran last; nothing happens where autograd is off."""
        if not torch.is_grad_enabled():
            return
        total = self._zero + loss
        # Before the last, the gradients of the groups add up; in bfloat16 they would lose what the first ones hold.
        leaves = self._leaves if self._is_last or self._weights.dtype is not None else {}
        collect = self._pull_back.collect(leaves, self._on_gradient)
        with collect, torch.autocast(total.device.type, enabled=False), self._products():
            (total * self._scale).backward()

    @property
    def gradient(self) -> Tensor:
        """The gradient (E, G) of the sum of the losses so far; 0 where there was no backward pass."""
        gradient, direct = self._pull_back.result(), self.coefficients.grad
        return (gradient if direct is None else gradient + direct) / self._scale
