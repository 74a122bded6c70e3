"""Shared fixtures: one toy problem, in float32 and float64."""

import io
import os
import sys
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from rich.console import Console

from adamerge import Coefficients, ExpertPool, MergedModel
from adamerge.system import progress
from tests.support.command_line import arguments as arguments
from tests.support.command_line import configs as configs
from tests.support.command_line import listed_benchmark as listed_benchmark
from tests.support.interrupts import uninterrupted as uninterrupted
from tests.support.toy import Toy, make_toy

hypothesis.settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    max_examples=15,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # a loaded machine is no fault of a test
)
hypothesis.settings.load_profile("repeatable")

# On tensors this small, threads that wait for each other make a step up to ten times slower; in processes too.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's cache, and the key of the user's configurations, out of the tests, and the tests out of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Forget the modules that a test has written and imported; the next may write others of the same names."""
    before = set(sys.modules)
    yield
    written = str(tmp_path_factory.getbasetemp())
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(written):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def toy() -> Toy:
    return make_toy()


@pytest.fixture
def toy64() -> Toy:
    return make_toy(torch.float64)


@pytest.fixture
def toy_backbone(toy: Toy) -> torch.nn.Module:
    return toy.encoder


@pytest.fixture
def toy_pool(toy: Toy) -> ExpertPool:
    return toy.pool()


@pytest.fixture
def toy_batch(toy: Toy) -> dict[str, torch.Tensor]:
    return toy.inputs


@pytest.fixture
def toy_model(toy: Toy) -> MergedModel:
    pool = toy.pool()
    return toy.model(pool, Coefficients(pool, "layer"))


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal that bars are drawn on, whose text can be read."""
    text = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=text, force_terminal=True, width=120))
    monkeypatch.setattr(progress, "is_drawn", lambda: True)
    return text
