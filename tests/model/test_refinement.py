"""Importance, the allocation of chunks, and starts from coefficients of other groups."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adamerge import Coefficients, ExpertPool, InputError, merge
from adamerge.model import refinement
from adamerge.model.coefficients import load_coefficients, save_coefficients
from adamerge.model.granularity import Chunk, Pattern
from adamerge.model.refinement import ImportanceChunks, Refinement, allocate, importance, transfer
from tests.support.toy import make_toy, merge_by_formula


def pool_of(**task_vectors):
    """A pool of two experts whose task vectors are given, over a base of zeros."""
    base = {name: torch.zeros_like(pair[0]) for name, pair in task_vectors.items()}
    experts = {e: {name: pair[i] for name, pair in task_vectors.items()} for i, e in enumerate("ab")}
    return ExpertPool.from_state_dicts(base, experts)


def random(coefficients, low=0.05, high=0.9):
    """Give coefficients random values; return them."""
    torch.manual_seed(1)
    values = torch.rand_like(coefficients.raw) * (high - low) + low
    if type(coefficients.constraint).__name__ == "Simplex":
        values = values / values.sum(0)
    coefficients.assign(values)
    return coefficients


def test_importance_by_hand():
    pool = pool_of(
        big=(torch.full((2, 3), 1.0), torch.full((2, 3), -2.0)), small=(torch.tensor([4.0]), torch.tensor([1.0]))
    )
    coefficients = Coefficients(pool, "layer", constraint="none")
    coefficients.assign(torch.tensor([[0.5, 1.0], [-0.25, 0.0]]))
    # big: 0.5 x 1 x 6 + 0.25 x 2 x 6 = 6; small: 1 x 4 x 1 + 0 = 4
    assert importance(pool, coefficients) == pytest.approx({"big": 0.6, "small": 0.4})


@pytest.mark.parametrize("granularity", ["task", "block", "layer", "chunk", "row", "column"])
def test_importance_sums_the_l1_mass_of_each_entrys_own_coefficient(toy, granularity, monkeypatch):
    monkeypatch.setattr(refinement, "CACHED", 7)
    pool = toy.pool()
    coefficients = random(Coefficients(pool, granularity))
    absolute = merge_by_formula(
        ExpertPool.from_state_dicts(
            {name: torch.zeros_like(t) for name, t in pool.base.items()},
            {e: {name: pool.task_vectors(name)[i].abs() for name in pool.names} for i, e in enumerate(toy.experts)},
        ),
        coefficients.index,
        coefficients().detach().abs(),
    )
    total = sum(t.sum().item() for t in absolute.values())
    expected = {name: t.sum().item() / total for name, t in absolute.items()}
    assert importance(pool, coefficients) == pytest.approx(expected, rel=1e-5)


def test_importance_reads_tiles_only(toy, monkeypatch):
    monkeypatch.setattr(refinement, "CACHED", 10)
    pool, widths = toy.pool(), []
    tile = pool.tile

    def counted(name, start, stop, **options):
        widths.append(stop - start)
        return tile(name, start, stop, **options)

    monkeypatch.setattr(pool, "tile", counted)
    monkeypatch.setattr(pool, "task_vectors", None)
    importance(pool, Coefficients(pool, "layer"))
    assert max(widths) == 10
    assert sum(widths) == sum(t.numel() for t in pool.base.values())


def test_importance_of_coefficients_that_are_all_zero_is_refused(toy_pool):
    with pytest.raises(InputError, match="all coefficients of the first stage are 0"):
        importance(toy_pool, Coefficients(toy_pool, "layer", init=0.0))


def test_allocate_by_hand():
    shares = {"a": 0.5, "b": 0.3, "c": 0.15, "d": 0.05}
    assert allocate(shares, budget=1.0, kappa=1.0) == {"a": 2, "b": 1, "c": 0, "d": 0}  # 4 x share: 2, 1.2, .6, .2
    assert allocate(shares, budget=2.0, kappa=1.0) == {"a": 4, "b": 2, "c": 1, "d": 0}
    assert allocate(shares, budget=1.0, kappa=0.0) == {"a": 1, "b": 1, "c": 1, "d": 1}
    # squares .25, .09, .0225, .0025 of .365, times 4
    assert allocate(shares, budget=1.0, kappa=2.0) == {"a": 2, "b": 0, "c": 0, "d": 0}


def test_allocate_even_shares_do_not_lose_a_chunk_to_rounding():
    for count in range(1, 200):
        assert set(allocate(dict.fromkeys(map(str, range(count)), 1 / count), 1.0, 1.0).values()) == {1}


@settings(max_examples=60)
@given(
    st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=12),
    st.floats(0.01, 8),
    st.floats(0, 500),
)
def test_allocate_stays_within_the_budget(masses, budget, kappa):
    shares = {str(i): mass / sum(masses) for i, mass in enumerate(masses)}
    pieces = allocate(shares, budget, kappa)
    assert sum(pieces.values()) <= budget * len(shares) * (1 + 1e-8)
    assert all(number >= 0 for number in pieces.values())
    order = sorted(shares, key=shares.get)
    assert [pieces[name] for name in order] == sorted(pieces.values())


def test_importance_chunks_refine_freezes_what_gets_no_chunk(toy_pool, caplog):
    with caplog.at_level("INFO"):
        chunk = ImportanceChunks(budget=1.0).refine(toy_pool, Coefficients(toy_pool, "layer"))
    frozen = [name for name, number in chunk.pieces.items() if number == 0]
    assert frozen
    index = chunk(toy_pool.shapes)
    assert len(index.frozen) == len(frozen)
    assert (
        f"{sum(chunk.pieces.values())} in {len(chunk.pieces) - len(frozen)} tensors, {len(frozen)} tensors frozen"
        in caplog.text
    )
    assert isinstance(ImportanceChunks(), Refinement)
    assert not isinstance(Chunk(), Refinement)


def test_importance_chunks_never_asks_for_more_pieces_than_entries(toy_pool):
    chunk = ImportanceChunks(budget=1e6, kappa=0).refine(toy_pool, Coefficients(toy_pool, "layer"))
    assert chunk.pieces == {name: math.prod(shape) for name, shape in toy_pool.shapes.items()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, r"granularity\.budget: expected a number > 0, found 0"),
        ({"budget": float("nan")}, r"granularity\.budget"),
        ({"kappa": -1}, r"granularity\.kappa: expected a number >= 0, found -1"),
    ],
)
def test_importance_chunks_wrong_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        ImportanceChunks(**options)


def test_importance_chunks_without_a_first_stage_or_a_budget_is_refused(toy_pool):
    with pytest.raises(InputError, match=r"needs coefficients learned before.*first_stage"):
        Coefficients(toy_pool, ImportanceChunks())
    with pytest.raises(InputError, match=r"granularity\.budget: 0\.01 leaves all \d+ tensors without a chunk"):
        ImportanceChunks(budget=0.01).refine(toy_pool, Coefficients(toy_pool, "layer"))


CONSTRAINTS = ["box", "clamp", "sigmoid", "simplex", "none"]


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("finer", ["row", "column", Chunk(5), Chunk({"proj": 0, "stem.weight": 0}, default=3)])
def test_transfer_to_finer_groups_merges_the_same_weights(toy, constraint, finer):
    pool = toy.pool()
    first = random(Coefficients(pool, "layer", constraint=constraint))
    init = 1 / 3 if constraint == "simplex" else 0.3
    second = Coefficients(pool, finer, init=init, constraint=constraint)
    second.warm_start(transfer(first, second.index))
    before, after = merge(pool, first, detach=True), merge(pool, second, detach=True)
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-6, atol=1e-6)
    trained = torch.ones(second.index.size, dtype=torch.bool)
    trained[list(second.index.frozen)] = False
    assert torch.equal(second.initial[:, trained], Coefficients(pool, finer, init, constraint).initial[:, trained])
    assert torch.equal(second.initial[:, ~trained], second().detach()[:, ~trained])


def test_transfer_values_at_the_bounds_keep_a_gradient(toy_pool):
    first = Coefficients(toy_pool, "layer", constraint="clamp")
    first.assign(torch.randint(0, 2, first.raw.shape).float())
    for constraint in ("clamp", "box", "sigmoid"):
        second = Coefficients(toy_pool, Chunk(3), constraint=constraint)
        second.warm_start(transfer(first, second.index))
        torch.testing.assert_close(second(), transfer(first, second.index), rtol=0, atol=2e-6)
        second().sum().backward()
        assert (second.raw.grad > 0).all()


def test_transfer_within_a_group_is_exact_and_across_groups_the_mean_over_entries(toy_pool):
    first = random(Coefficients(toy_pool, "layer"))
    finer = transfer(first, Chunk(4)(toy_pool.shapes))
    for group, name in enumerate(toy_pool.names):
        for piece in Chunk(4)(toy_pool.shapes).segments[name]:
            assert (finer[:, piece.first : piece.first + piece.groups] == first().detach()[:, group : group + 1]).all()
    sizes = torch.tensor([math.prod(shape) for shape in toy_pool.shapes.values()]).float()
    coarse = transfer(first, Pattern({"rest": "."})(toy_pool.shapes))
    torch.testing.assert_close(coarse[:, 0], (first().detach() * sizes).sum(1) / sizes.sum())


def test_warm_start_outside_the_constraint_is_said(toy_pool, caplog):
    coefficients = Coefficients(toy_pool, "layer")
    coefficients.warm_start(torch.full_like(coefficients.raw, 1.5))
    assert "outside the constraint" in caplog.text
    assert (coefficients() == 1).all()


def test_refined_coefficients_survive_their_file(toy, tmp_path):
    pool = toy.pool()
    first = random(Coefficients(pool, "layer"))
    chunk = ImportanceChunks(budget=1.5).refine(pool, first)
    second = Coefficients(pool, chunk, constraint="sigmoid")
    second.warm_start(transfer(first, second.index))
    with torch.no_grad():
        second.raw += 0.1
    save_coefficients(second, tmp_path / "coefficients.json", pool)
    assert json.loads((tmp_path / "coefficients.json").read_text())["granularity"]["pieces"] == chunk.pieces
    loaded = load_coefficients(tmp_path / "coefficients.json", make_toy().pool())
    assert torch.equal(loaded().detach(), second().detach())
