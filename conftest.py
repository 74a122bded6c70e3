"""Names that the examples in docstrings may use."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import adamerge

# On the import path on purpose, and not only because pytest begins it with this folder: configurations of tests name
# classes of tests, and what would come from the working directory by accident is refused.
sys.path.append(str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _example_names(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace.update({name: getattr(adamerge, name) for name in adamerge.__all__}, torch=torch)
