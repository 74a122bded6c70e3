"""The result of scoring one task."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Measure:
    """How a measure beside the score is shown: its unit, and whether lower values are better."""

    unit: str
    lower_is_better: bool


MEASURES = {
    "perplexity": Measure("", lower_is_better=True),
    "agreement": Measure("%", lower_is_better=False),
    "KL": Measure("nats", lower_is_better=True),
}


@dataclass(frozen=True)
class TaskScore:
    """One task's result.

    Attributes:
        accuracy: The score, a share in [0, 1]; higher is better.
        calibration_error: Expected calibration error in [0, 1]; None where there are no classes.
        correct: Each sample's part of the score, (N,): whether it is hit, or a share.
        metric: What the score is, such as ``exact match``.
        measures: What else was measured, such as ``perplexity``.
        kinds: How those are shown that are not in :data:`MEASURES`.
    """

    accuracy: float
    calibration_error: float | None
    correct: Tensor
    metric: str = "accuracy"
    measures: Mapping[str, float] = field(default_factory=dict)
    kinds: Mapping[str, Measure] = field(default_factory=dict)
