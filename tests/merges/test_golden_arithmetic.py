"""Golden numbers of a public reference implementation; see golden/README.md."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adamerge import Coefficients, ExpertPool, merge

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def pool() -> ExpertPool:
    models = {}
    for key, tensor in load_file(GOLDEN / "inputs.safetensors").items():
        model, name = key.split(".", 1)
        models.setdefault(model, {})[name] = tensor.double()
    return ExpertPool.from_state_dicts(models.pop("base"), dict(sorted(models.items())))


@pytest.mark.parametrize(("reference", "init"), [("simple_average", "mean"), ("task_arithmetic", 0.3)])
@pytest.mark.parametrize("granularity", ["task", "layer", "row", "column"])
@pytest.mark.parametrize("detach", [True, False])
def test_merge_of_golden_inputs_equals_reference(pool, reference, init, granularity, detach):
    expected = load_file(GOLDEN / f"{reference}.safetensors")
    merged = merge(pool, Coefficients(pool, granularity, init=init), detach=detach)
    assert set(merged) == set(expected)
    for name, tensor in expected.items():
        # float64 sums of four terms in another order: a few ulps
        torch.testing.assert_close(
            merged[name].detach(), tensor, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_golden_inputs_hold_a_tensor_without_dimensions(pool):
    assert pool.shapes["logit_scale"] == ()
    assert pool.task_vectors("logit_scale").shape == (4,)
