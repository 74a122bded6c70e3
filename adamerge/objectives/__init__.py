"""What is minimized: scalar losses on unlabeled data, one file each.

An objective is any callable that takes a :class:`~adamerge.TaskStep` and returns a scalar; it
is chosen by import path (``objective._target_=my_package.MyObjective``). Frozen dataclasses serve
well: a wrong option then fails when the run is set up.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from adamerge.errors import InputError, check_call
from adamerge.model.task_step import TaskStep


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


def check_objective(objective: object) -> None:
    """Check that an objective can be called with one step, without calling it.

    Raises:
        InputError: If it cannot, or its ``hidden_layers`` are not a list of texts.
    """
    if not callable(objective) or isinstance(objective, type):
        raise InputError(f"objective: expected a callable that takes a TaskStep, found {objective!r}.")
    check_call("objective", objective, ["step"], "Give further arguments a default or set them in __init__.")
    layers = getattr(objective, "hidden_layers", ())
    if isinstance(layers, str) or not all(isinstance(layer, str) for layer in layers):
        raise InputError(
            f"Objective {type(objective).__name__}.hidden_layers: expected a list of module paths or globs, found "
            f"{layers!r}; "
            "write [...] around a single one."
        )
