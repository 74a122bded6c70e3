"""What a format tells the model card, and the comparison of what was loaded back."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from adamerge.errors import GuardError
from adamerge.results.formats.merged import Merged


@dataclass(frozen=True)
class Usage:
    """How an export is used.

    Attributes:
        library: Its name for the Hub's ``library_name``; None where the Hub knows none.
        pipeline: The Hub's ``pipeline_tag``.
        files: File name to what it holds.
        code: Python that loads the model from the folder ``FOLDER`` and runs it.
        head: Python that goes on from there to a task's classes; empty where no zero-shot head lies in the folder.
        notes: Further sentences, such as what could not be written.
        preprocessing: What images go through, ready for JSON.
    """

    library: str | None
    pipeline: str
    files: Mapping[str, str]
    code: str
    notes: tuple[str, ...] = ()
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    head: str = ""


def head_code(merged: Merged, features: str = "") -> str:
    """Return Python that applies the first task's zero-shot head to ``features``; empty where there is none.

    Args:
        merged: The merge.
        features: Python that computes them; empty where :attr:`Usage.code` does.
    """
    task = next((task for task, head in merged.heads.items() if set(head) == {"weight", "scale"}), None)
    if task is None:
        return ""
    classes = "classes" in (merged.info.get(task) or {})
    lines = [
        *(["import json", ""] if classes else []),
        "from safetensors import safe_open",
        "from torch.nn.functional import normalize",
        "",
        *([features] if features else []),
        f"task = {json.dumps(task, ensure_ascii=False)}",
        'with safe_open("FOLDER/heads.safetensors", "pt") as heads:',
        '    weight, scale = (heads.get_tensor(f"{task}/{name}").float() for name in ("weight", "scale"))',
        *(['    classes = json.loads(heads.metadata()["adamerge_tasks"])[task]["classes"]'] if classes else []),
        "logits = scale * normalize(features, dim=-1) @ weight",
        *(["print(classes[logits[0].argmax()])"] if classes else []),
    ]
    return "\n".join(lines)


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
