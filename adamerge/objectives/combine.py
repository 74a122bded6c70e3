"""A weighted sum of objectives."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add

from torch import Tensor

from adamerge.errors import InputError, did_you_mean
from adamerge.model.task_step import TaskStep
from adamerge.objectives import Objective


@dataclass(frozen=True)
class Combine:
    """A weighted sum of objectives, each by a name of your choice.

    It captures what any of its terms captures, and asks the experts if any of them does.

    Args:
        terms: Name to objective.
        weights: Name to the factor of that term, default 1.

    Example:
        >>> from adamerge.objectives.entropy import Entropy
        >>> from adamerge.objectives.imitation import Imitation
        >>> objective = Combine({"sure": Entropy(), "like_the_expert": Imitation()}, weights={"sure": 0.1})
        >>> objective.uses_teacher
        True
    """

    terms: Mapping[str, Objective]
    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not self.terms:
            raise InputError("objective.terms: expected at least one objective (name to objective), found none.")
        for name, term in self.terms.items():
            if not callable(term):
                raise InputError(f"objective.terms.{name}: expected an objective (with _target_), found {term!r}.")
        for name in self.weights or {}:
            if name not in self.terms:
                raise InputError(f"objective.weights: no term {name!r}.{did_you_mean(name, self.terms)}")

    @property
    def hidden_layers(self) -> tuple[str, ...]:
        """What the terms capture, each once."""
        layers = [layer for term in self.terms.values() for layer in getattr(term, "hidden_layers", ())]
        return tuple(dict.fromkeys(layers))

    @property
    def uses_teacher(self) -> bool:
        """Whether a term asks the experts."""
        return any(getattr(term, "uses_teacher", False) for term in self.terms.values())

    @property
    def uses_labels(self) -> bool:
        """Whether a term uses labels."""
        return any(getattr(term, "uses_labels", False) for term in self.terms.values())

    def __call__(self, step: TaskStep) -> Tensor:
        """Return the weighted sum of the terms' losses."""
        weights = self.weights or {}
        return reduce(add, (term(step) * weights.get(name, 1.0) for name, term in self.terms.items()))
