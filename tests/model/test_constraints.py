import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adamerge import InputError
from adamerge.model.constraints import Box, Clamp, Sigmoid, Simplex, Unconstrained, by_name, project_onto_simplex

values = st.floats(-3, 3, width=32)


def columns(experts: int):
    return st.lists(values, min_size=experts, max_size=experts).map(lambda v: torch.tensor(v).double().unsqueeze(1))


points = st.integers(1, 6).flatmap(columns)


def gradient(constraint, raw: float) -> float:
    leaf = torch.tensor([[raw]], requires_grad=True)
    constraint.forward(leaf).sum().backward()
    return leaf.grad.item()


# Clamp and Box


@pytest.mark.parametrize(
    ("raw", "value", "slope"),
    [(-0.01, 0.0, 0.0), (0.0, 0.0, 1.0), (0.4, 0.4, 1.0), (1.0, 1.0, 1.0), (1.01, 1.0, 0.0)],
)
def test_clamp_gradient_is_one_at_both_bounds_and_zero_outside(raw, value, slope):
    assert Clamp().forward(torch.tensor([[raw]])).item() == pytest.approx(value)
    assert gradient(Clamp(), raw) == slope


def test_clamp_own_bounds_are_inclusive():
    assert [gradient(Clamp(-1, 2), raw) for raw in (-1.5, -1.0, 2.0, 2.5)] == [0.0, 1.0, 1.0, 0.0]


def descend(constraint, raw: float, steps: int) -> float:
    """Minimize (coefficient - 0.5)^2 from a raw value, as an optimizer with the constraint would."""
    leaf = torch.nn.Parameter(torch.tensor([[raw]]))
    optimizer = torch.optim.SGD([leaf], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (constraint.forward(leaf) - 0.5).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            leaf.copy_(constraint.project(leaf))
    return constraint.forward(leaf).item()


def test_clamp_raw_value_below_zero_is_dead_and_box_recovers():
    assert descend(Clamp(), -0.01, 50) == 0.0
    assert descend(Box(), -0.01, 50) == pytest.approx(0.5, abs=1e-3)


def test_clamp_value_at_the_bound_is_alive():
    assert descend(Clamp(), 0.0, 50) == pytest.approx(0.5, abs=1e-3)
    assert descend(Clamp(), 1.0, 50) == pytest.approx(0.5, abs=1e-3)


def test_box_project_is_the_nearest_point_and_forward_is_free():
    raw = torch.tensor([[-0.2, 0.3, 1.7]])
    assert torch.equal(Box().project(raw), torch.tensor([[0.0, 0.3, 1.0]]))
    assert torch.equal(Box().forward(raw), raw)


@pytest.mark.parametrize("kind", [Clamp, Box])
@pytest.mark.parametrize(("low", "high"), [(1, 0), (0, 0), (0, math.inf), (math.nan, 1)])
def test_bounds_out_of_order_or_not_finite_are_refused(kind, low, high):
    with pytest.raises(
        InputError, match=rf"constraint: expected finite bounds low < high, found low={low}, high={high}"
    ):
        kind(low, high)


# Simplex


@settings(max_examples=80)
@given(points)
def test_project_onto_simplex_is_feasible_and_idempotent(points):
    projected = project_onto_simplex(points)
    assert (projected >= 0).all()
    torch.testing.assert_close(projected.sum(0), torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(project_onto_simplex(projected), projected)


@settings(max_examples=80)
@given(points)
def test_project_onto_simplex_is_nearest(points):
    """Compare with the best of all faces: on each, the nearest point has a closed form."""
    experts, best = len(points), math.inf
    for size in range(1, experts + 1):
        for face in itertools.combinations(range(experts), size):
            on_face = torch.zeros_like(points)
            on_face[list(face)] = points[list(face)] - (points[list(face)].sum() - 1) / size
            if (on_face >= 0).all():
                best = min(best, (points - on_face).norm().item())
    assert (points - project_onto_simplex(points)).norm().item() == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("size", [1e8, 1e20, 1e30])
def test_project_onto_simplex_huge_values_pick_the_largest(size):
    projected = project_onto_simplex(torch.tensor([[size], [0.0], [-size]]))
    assert torch.equal(projected, torch.tensor([[1.0], [0.0], [0.0]]))


def test_project_onto_simplex_nan_stays_nan_in_its_column_for_the_guard():
    projected = project_onto_simplex(torch.tensor([[math.nan, 0.9], [0.3, 0.3]]))
    assert projected[:, 0].isnan().any()
    torch.testing.assert_close(projected[:, 1], torch.tensor([0.8, 0.2]))


def test_project_onto_simplex_columns_are_independent():
    points = torch.tensor([[0.9, 3.0, 0.2], [0.3, -1.0, 0.2]])
    expected = torch.tensor([[0.8, 1.0, 0.5], [0.2, 0.0, 0.5]])
    torch.testing.assert_close(project_onto_simplex(points), expected)


@settings(max_examples=80)
@given(points)
def test_simplex_at_most_is_feasible_nearest_and_idempotent(points):
    projected = Simplex("at_most").project(points)
    assert (projected >= 0).all()
    assert projected.sum() <= 1 + 1e-9
    positive = points.clamp(min=0)
    if positive.sum() <= 1:
        assert torch.equal(projected, positive), "the nearest non-negative point lies inside"
    else:
        torch.testing.assert_close(projected, project_onto_simplex(points))
    torch.testing.assert_close(Simplex("at_most").project(projected), projected)


def test_simplex_unknown_total_is_refused():
    with pytest.raises(InputError, match=r"constraint\.total: expected 'equal' or 'at_most', found 'half'"):
        Simplex("half")


# All


@pytest.mark.parametrize("constraint", [Unconstrained(), Clamp(), Box(), Sigmoid(), Simplex(), Simplex("at_most")])
def test_forward_after_inverse_keeps_allowed_values(constraint):
    allowed = torch.tensor([[0.2, 0.5, 1.0], [0.8, 0.5, 0.0]])
    # float32; sigmoid moves 0 and 1 inside by 1e-6
    torch.testing.assert_close(constraint.forward(constraint.inverse(allowed)), allowed, rtol=0, atol=2e-6)


@pytest.mark.parametrize("constraint", [Clamp(), Box(), Sigmoid(), Simplex(), Simplex("at_most")])
def test_inverse_of_forbidden_values_gives_allowed_finite_ones(constraint):
    result = constraint.forward(constraint.inverse(torch.tensor([[-3.0, 0.5], [7.0, 2.0]])))
    assert torch.isfinite(result).all()
    assert ((result >= 0) & (result <= 1)).all()


def test_sigmoid_is_differentiable_from_its_bounds():
    raw = Sigmoid().inverse(torch.tensor([[0.0], [1.0]])).requires_grad_()
    Sigmoid().forward(raw).sum().backward()
    assert (raw.grad > 0).all()


def test_unconstrained_changes_nothing():
    raw = torch.tensor([[-5.0, 9.0]])
    for method in (Unconstrained().forward, Unconstrained().inverse, Unconstrained().project):
        assert torch.equal(method(raw), raw)


def test_by_name_unknown_lists_and_suggests():
    with pytest.raises(InputError, match=r"constraint: .*found 'clmap'\. Did you mean 'clamp'\?"):
        by_name("clmap")
