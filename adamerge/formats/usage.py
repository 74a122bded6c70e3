"""What a format tells the model card, and the comparison of what was loaded back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from adamerge.errors import GuardError


@dataclass(frozen=True)
class Usage:
    """How an export is used.

    Attributes:
        library: Its name for the Hub's ``library_name``; None where the Hub knows none.
        pipeline: The Hub's ``pipeline_tag``.
        files: File name to what it holds.
        code: Python that loads the model from the folder ``FOLDER`` and runs it.
        notes: Further sentences, such as what could not be written.
        preprocessing: What images go through, ready for JSON.
    """

    library: str | None
    pipeline: str
    files: Mapping[str, str]
    code: str
    notes: tuple[str, ...] = ()
    preprocessing: Mapping[str, Any] = field(default_factory=dict)


def check_equal(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-4) -> None:
    """Compare outputs of what was loaded back with those of the merge.

    Args:
        found: Of the foreign library.
        expected: Of the merge, in float32.
        what: Of what these are outputs, for the message.
        tolerance: Largest difference, as a share of the largest expected value.

    Raises:
        GuardError: If they differ.
    """
    scale = float(expected.abs().max())
    difference = float((found.float() - expected).abs().max()) if found.shape == expected.shape else float("inf")
    if not difference <= tolerance * max(scale, 1e-6):
        raise GuardError(
            f"{what}, loaded back, differs from the merge by {difference:.2g} where values reach {scale:.2g}, so "
            "nothing was exported. Please report it, with the versions in merge.json."
        )
