"""What an objective is given: one task's batch, the merged model's outputs for it, and what it may ask for."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from adamerge.data.batch import Inputs, Outputs


@dataclass
class TaskStep:
    """All that an objective sees of one task's batch: "unlabeled" is a type, not a promise.

    Attributes:
        task: Its name.
        inputs: (B, ...), a tensor or a mapping.
        indices: Positions of the samples in the task's stream, (B,).
        outputs: The merged model's, with gradient.
        coefficients: (E, G), a leaf: for anchors and regularisers; its gradient is added.
        initial: The coefficients before the first step, (E, G); the same after a resume.
        num_tasks: Batches in the step: what regularises the coefficients divides by it, to count once.
    """

    task: str
    inputs: Inputs
    indices: Tensor
    outputs: Outputs
    coefficients: Tensor
    _teacher: Callable[[str, Inputs, Tensor], Outputs] = field(repr=False)
    _forward: Callable[[Inputs, str], Outputs] = field(repr=False)
    initial: Tensor | None = None
    num_tasks: int = 1
    _asked: Outputs | None = field(default=None, init=False, repr=False)

    def teacher(self) -> Outputs:
        """Return the outputs of the task's own raw expert for ``inputs``, without gradient, cached by index.

        They are compact: where not all rows count they hold those that do alone, in the order of
        :meth:`Outputs.rows <adamerge.Outputs.rows>` and :meth:`Outputs.compact <adamerge.Outputs.compact>`.
        """
        if self._asked is None:
            self._asked = self._teacher(self.task, self.inputs, self.indices)
        return self._asked

    def forward(self, inputs: Inputs) -> Outputs:
        """Run a further pass through the merged parameters (augmented views), with gradient."""
        return self._forward(inputs, self.task)
