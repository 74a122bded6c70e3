"""Run folders, pools and configurations as strangers leave them: each command ends in time, in a line, as it should.

The fast run tries a few cases; ``pytest -m slow -s tests/test_fuzz_runs.py`` tries 2,000, and prints a table.
"""

from collections import Counter
from pathlib import Path

import pytest

from tests.support.hostile_runs import attempt, cases, make_world

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux does")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A finished run, a pool and a model, of which each case gets a copy."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("count", [6, pytest.param(2000, marks=pytest.mark.slow)])
def test_commands_stand_what_strangers_leave(world, tmp_path, count):
    tried, short = Counter(), {}
    for case in cases(1 if count > 100 else 0, count, world):
        tried[case.kind] += 1
        if problem := attempt(case, world, tmp_path / "case"):
            short[f"{case.kind}, {case.name}"] = problem
            print(f"{case.kind}, {case.name}: {problem}", flush=True)
    for kind in sorted(tried):
        print(f"{kind}: {tried[kind]} tried, {sum(name.startswith(kind) for name in short)} short")
    assert not short
