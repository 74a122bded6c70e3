"""Initial coefficients from rules."""

import pytest
import torch

from adamerge import Coefficients, InputError
from adamerge.model.starts import DepthStart, ModelStockStart
from tests.support.toy import Toy


def test_lines_start_grows_with_depth(toy: Toy):
    coefficients = Coefficients(toy.pool(), "layer", init="lines", constraint="none")
    by_name = dict(zip(coefficients.group_names, coefficients().detach().T, strict=True))
    torch.testing.assert_close(by_name["stem.weight"], torch.full((3,), 1 / 3))
    torch.testing.assert_close(by_name["blocks.0.up.weight"], torch.full((3,), 1 / 3))
    torch.testing.assert_close(by_name["blocks.1.up.weight"], torch.full((3,), 1 / 3 + 0.5))


@pytest.mark.parametrize("granularity", ["task", "block", "chunk", "row", "column"])
def test_start_over_any_granularity_averages_by_entries(toy: Toy, granularity):
    pool = toy.pool()
    values = {name: torch.rand(3) for name in pool.names}
    coefficients = Coefficients(pool, granularity, init=lambda pool: values, constraint="none")
    found = coefficients().detach()
    sizes = {name: pool.base[name].numel() for name in pool.names}
    if granularity == "task":
        mean = sum(values[name] * size for name, size in sizes.items()) / sum(sizes.values())
        torch.testing.assert_close(found, mean.unsqueeze(1))
    elif granularity != "block":
        for name, groups in coefficients.groups.items():
            torch.testing.assert_close(found[:, groups], values[name].unsqueeze(1).expand(3, len(groups)))


def test_model_stock_start_is_high_where_experts_agree(toy: Toy):
    common = torch.randn_like(toy.base["proj"])
    for expert in toy.experts.values():
        expert["proj"] = toy.base["proj"] + common + 0.01 * torch.randn_like(common)
    values = ModelStockStart()(toy.pool())
    assert values["proj"] == pytest.approx(1 / 3, abs=1e-3)  # t = 1: their average
    assert all(0 <= value < 0.3 for name, value in values.items() if name not in ("proj", "scale"))


def test_model_stock_start_of_one_expert_is_one(toy: Toy):
    toy.experts = {"red": toy.experts["red"]}
    assert set(ModelStockStart()(toy.pool()).values()) == {1.0}


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("line", r"init.*'model_stock', found 'line'\. Did you mean 'lines'\?"),
        (DepthStart(pattern="x{9}"), "matches no parameter"),
        (lambda pool: {}, r"init: parameter '.*': expected a number, or 3, from the rule, found 0"),
        (lambda pool: dict.fromkeys(pool.names, torch.ones(2)), "or 3, from the rule, found 2"),
    ],
)
def test_start_that_does_not_fit_is_refused(toy: Toy, init, message):
    with pytest.raises(InputError, match=message):
        Coefficients(toy.pool(), init=init)
