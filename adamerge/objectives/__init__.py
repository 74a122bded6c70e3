"""What is minimized: scalar losses on unlabeled data, one file each.

An objective is any callable that takes a :class:`~adamerge.model.TaskStep` and returns a scalar; it
is chosen by import path (``objective._target_=my_package.MyObjective``). Frozen dataclasses serve
well: a wrong option then fails when the run is set up.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from adamerge.model import TaskStep


@runtime_checkable
class Objective(Protocol):
    """A scalar loss of one task's batch.

    Attributes:
        hidden_layers: Modules of the encoder, by path or glob, whose outputs it needs in
            ``step.outputs.hidden``; ``()`` for none.
    """

    @property
    def hidden_layers(self) -> Sequence[str]:
        """Modules whose outputs are captured."""
        ...

    def __call__(self, step: TaskStep) -> Tensor:
        """Return the loss, a scalar that depends on the merged model's outputs."""
        ...
