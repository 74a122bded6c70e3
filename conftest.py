"""Names that the examples in docstrings may use."""

from typing import Any

import pytest
import torch

import adamerge


@pytest.fixture(autouse=True)
def _example_names(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace.update({name: getattr(adamerge, name) for name in adamerge.__all__}, torch=torch)
