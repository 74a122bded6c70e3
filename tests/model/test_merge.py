import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from adamerge import Coefficients, ExpertPool, InputError, MergedModel, merge
from adamerge.model.encoder import EncoderOptions
from adamerge.model.granularity import Block, Chunk, Pattern
from adamerge.model.merge import merge_into, pull_back
from tests.support.toy import EXPERTS, make_toy, merge_by_formula, perturbed

GRANULARITIES = [
    "task",
    "block",
    "layer",
    Chunk(3),
    Chunk({"proj": 0, "stem.weight": 5}, default=2),
    "row",
    "column",
    Pattern({"down": r"down\.", "weights": r"weight$"}),
]
TOY = make_toy(torch.float64)
POOL = TOY.pool()
SEEDS = st.integers(0, 2**32 - 1)


def small_pool(seed: int = 0) -> ExpertPool:
    generator = torch.Generator().manual_seed(seed)
    base = {"blocks.0.w": (3, 4), "blocks.1.w": (2, 2, 2), "b": (3,), "s": ()}
    base = {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in base.items()}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ExpertPool.from_state_dicts(base, {"x": perturbed(base, 1.0), "y": perturbed(base, 1.0)})


def coefficients(granularity, pool=POOL, values=None) -> Coefficients:
    result = Coefficients(pool, granularity, init=0.0, constraint="none")
    if result.index.frozen:
        result._frozen = None  # the algebra holds for frozen groups as well
    result.assign(torch.randn_like(result.raw) if values is None else values)
    return result


def random(granularity, seed: int) -> tuple[Coefficients, dict[str, torch.Tensor]]:
    """Random coefficients, and a random gradient of the merged parameters."""
    torch.manual_seed(seed)
    return coefficients(granularity), {name: torch.randn_like(tensor) for name, tensor in POOL.base.items()}


# The formula


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_merge_equals_the_formula_entry_by_entry(granularity):
    chosen = coefficients(granularity)
    merged, expected = merge(POOL, chosen), merge_by_formula(POOL, chosen.index, chosen())
    assert list(merged) == list(POOL.names)
    for name in POOL.names:
        torch.testing.assert_close(merged[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "granularity"),
    [
        ((70_001,), "task"),
        ((70_001,), Chunk(3)),
        ((70_001,), "row"),
        ((2, 70_000), "row"),
        ((2, 70_000), "column"),
        ((70_000, 2), "row"),
        ((70_000, 2), "column"),
        ((300, 301), "column"),
        ((300, 301), "row"),
        ((2, 300, 151), "column"),
        ((2, 2, 1, 70_000), Chunk(3)),
    ],
    ids=str,
)
def test_merge_and_pull_back_of_large_tensors_equal_the_formula(shape, granularity):
    """Larger than a tile, so that tiles cut rows, columns and chunks."""
    base = {"w": torch.randn(shape, dtype=torch.float64)}
    pool = ExpertPool.from_state_dicts(base, {"x": perturbed(base), "y": perturbed(base)})
    chosen = coefficients(granularity, pool)
    expected = merge_by_formula(pool, chosen.index, chosen())
    torch.testing.assert_close(merge(pool, chosen)["w"], expected["w"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merge(pool, chosen, detach=True)["w"], expected["w"].detach(), rtol=1e-12, atol=1e-12)
    gradient = torch.randn_like(base["w"])
    (by_autograd,) = torch.autograd.grad((expected["w"] * gradient).sum(), chosen.raw)
    torch.testing.assert_close(pull_back(pool, chosen.index, {"w": gradient}), by_autograd, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merge_zero_coefficients_returns_base_bit_exactly(granularity, dtype, detach):
    pool = make_toy(dtype).pool()
    merged = merge(pool, Coefficients(pool, granularity, init=0.0), detach=detach)
    for name in pool.names:
        assert torch.equal(merged[name], pool.base[name])


@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("granularity", ["task", "layer", "row", "column"])
def test_merge_one_hot_coefficients_return_the_expert(expert, granularity):
    init = {name: float(name == expert) for name in EXPERTS}
    for detach in (True, False):
        merged = merge(POOL, Coefficients(POOL, granularity, init=init), detach=detach)
        for name in POOL.names:  # base + (expert - base): one rounding
            torch.testing.assert_close(merged[name], TOY.experts[expert][name], rtol=1e-14, atol=1e-15)


def test_merge_one_hot_of_half_precision_files_exports_the_expert_bit_exactly():
    toy = make_toy(torch.float16)
    pool = toy.pool()
    merged = merge(pool, Coefficients(pool, "task", init=[0.0, 1.0, 0.0]), detach=True)
    assert all(torch.equal(merged[name], toy.experts["green"][name]) for name in pool.names)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@given(seed=SEEDS, weight=st.floats(-2, 2))
def test_merge_is_affine_in_the_coefficients(granularity, seed, weight):
    first, _ = random(granularity, seed)
    second, _ = random(granularity, seed + 1)
    mixed = coefficients(granularity, values=weight * first.raw + (1 - weight) * second.raw)
    a, b, c = merge(POOL, first), merge(POOL, second), merge(POOL, mixed)
    for name in POOL.names:
        torch.testing.assert_close(c[name], weight * a[name] + (1 - weight) * b[name], rtol=1e-10, atol=1e-10)


@given(order=st.permutations(EXPERTS), seed=SEEDS)
@pytest.mark.parametrize("granularity", ["layer", "row"])
def test_merge_permuted_experts_with_permuted_coefficients_is_the_same(granularity, order, seed):
    chosen, gradient = random(granularity, seed)
    permuted = ExpertPool.from_state_dicts(TOY.base, {name: TOY.experts[name] for name in order})
    rows = [EXPERTS.index(name) for name in order]
    same = merge(permuted, coefficients(granularity, permuted, chosen.raw[rows]))
    for name, tensor in merge(POOL, chosen).items():
        torch.testing.assert_close(same[name], tensor, rtol=1e-12, atol=1e-12)
    pulled = pull_back(permuted, chosen.index, gradient)
    torch.testing.assert_close(pulled, pull_back(POOL, chosen.index, gradient)[rows], rtol=1e-10, atol=1e-10)


# The adjoint


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@given(seed=SEEDS)
def test_pull_back_is_the_adjoint_of_the_merge(granularity, seed):
    chosen, gradient = random(granularity, seed)
    merged = merge(POOL, chosen)
    left = sum(((merged[name] - POOL.base[name]) * gradient[name]).sum() for name in POOL.names)
    right = (chosen() * pull_back(POOL, chosen.index, gradient)).sum()
    assert left.item() == pytest.approx(right.item(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_pull_back_equals_autograd_through_the_formula(granularity):
    chosen, gradient = random(granularity, 0)
    expected = merge_by_formula(POOL, chosen.index, chosen())
    (by_autograd,) = torch.autograd.grad(sum((expected[n] * gradient[n]).sum() for n in POOL.names), chosen.raw)
    torch.testing.assert_close(pull_back(POOL, chosen.index, gradient), by_autograd, rtol=1e-10, atol=1e-10)


def test_pull_back_missing_gradients_count_as_zero():
    chosen, gradient = random("layer", 0)
    some = {"proj": gradient["proj"], "scale": None}
    zeros = {name: gradient[name] if name == "proj" else torch.zeros_like(gradient[name]) for name in gradient}
    assert torch.equal(pull_back(POOL, chosen.index, some), pull_back(POOL, chosen.index, zeros))
    assert not pull_back(POOL, chosen.index, {}).any()


def test_pull_back_strided_gradient_is_read_in_the_order_of_its_entries():
    chosen, gradient = random("row", 0)
    strided = {name: tensor.t().contiguous().t() if tensor.ndim == 2 else tensor for name, tensor in gradient.items()}
    assert not strided["proj"].is_contiguous()
    torch.testing.assert_close(pull_back(POOL, chosen.index, strided), pull_back(POOL, chosen.index, gradient))


@pytest.mark.parametrize(
    "granularity",
    ["task", "block", "layer", Chunk(2), Chunk({"blocks.0.w": 5, "b": 0}, default=2), "row", "column",
     Pattern({"blocks": "blocks"}), Block("w$")],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("constraint", ["none", "sigmoid"])
def test_merge_gradcheck(granularity, constraint):
    pool = small_pool()
    model = Coefficients(pool, granularity, init=0.3, constraint=constraint)

    class Merged(nn.Module):
        """Lets gradcheck swap the raw coefficients."""

        def __init__(self):
            super().__init__()
            self.coefficients = model

        def forward(self):
            return tuple(merge(pool, self.coefficients).values())

    raw = torch.rand_like(model.raw).requires_grad_()
    function = Merged()
    assert torch.autograd.gradcheck(
        lambda raw: torch.func.functional_call(function, {"coefficients.raw": raw}, ()), (raw,), eps=1e-6, atol=1e-7
    )


def test_merge_frozen_chunks_get_no_gradient_and_keep_their_value():
    pool = small_pool()
    chosen = Coefficients(pool, Chunk({"b": 0}, default=2), init=0.3, constraint="none")
    with torch.no_grad():
        chosen.raw.fill_(0.9)
    merged = merge(pool, chosen)
    torch.testing.assert_close(merged["b"], pool.base["b"] + 0.3 * pool.task_vectors("b").sum(0))
    torch.testing.assert_close(merged["s"], pool.base["s"] + 0.9 * pool.task_vectors("s").sum(0))
    sum(tensor.sum() for tensor in merged.values()).backward()
    frozen = list(chosen.index.frozen)
    assert not chosen.raw.grad[:, frozen].any()
    assert chosen.raw.grad.count_nonzero() == chosen.raw.numel() - 2 * len(frozen)


def test_merge_gradient_of_part_of_the_parameters_equals_the_formula():
    pool = small_pool()
    chosen = Coefficients(pool, "row")
    merge(pool, chosen)["b"].square().sum().backward()
    expected = merge_by_formula(pool, chosen.index, chosen())["b"].square().sum()
    torch.testing.assert_close(chosen.raw.grad, torch.autograd.grad(expected, chosen.raw)[0])


# Uses


def test_merge_and_pull_back_leave_the_number_of_threads_as_it_was():
    chosen, gradient = random("row", 0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        merge(POOL, chosen)
        pull_back(POOL, chosen.index, gradient)
        with pytest.raises(RuntimeError, match="invalid for input of size 1"):
            pull_back(POOL, chosen.index, {name: torch.zeros(1) for name in POOL.names})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_merge_into_overwrites_what_was_there_and_keeps_no_graph():
    chosen = coefficients("row")
    out = {name: torch.full_like(tensor, math.nan) for name, tensor in POOL.base.items()}
    pointers = {name: tensor.data_ptr() for name, tensor in out.items()}
    merge_into(out, POOL, chosen.index, chosen())
    for name, tensor in merge(POOL, chosen).items():
        assert torch.equal(out[name], tensor)
        assert out[name].data_ptr() == pointers[name]
        assert not out[name].requires_grad


@pytest.mark.parametrize("granularity", ["task", "row", "column"])
def test_merge_and_pull_back_ignore_autocast(granularity):
    pool = make_toy().pool()
    chosen = Coefficients(pool, granularity)
    gradient = {name: torch.randn_like(tensor) for name, tensor in pool.base.items()}
    plain, pulled = merge(pool, chosen), pull_back(pool, chosen.index, gradient)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(tensor, plain[name]) for name, tensor in merge(pool, chosen).items())
        assert torch.equal(pull_back(pool, chosen.index, gradient), pulled)


def test_merge_leaves_the_pool_as_it_was():
    pool = make_toy().pool()
    before = {name: (pool.base[name].clone(), pool.task_vectors(name).clone()) for name in pool.names}
    for detach in (True, False):
        for tensor in merge(pool, Coefficients(pool, "task"), detach=detach).values():
            tensor.detach().add_(1)
    for name, (base, task_vectors) in before.items():
        assert torch.equal(pool.base[name], base)
        assert torch.equal(pool.task_vectors(name), task_vectors)


def test_merge_detached_result_shares_no_memory_with_the_callers_tensors():
    toy = make_toy()
    pool = toy.pool(exclude=["proj"])
    for tensor in merge(pool, Coefficients(pool), detach=True).values():
        tensor.add_(1)
    assert torch.equal(toy.base["proj"], pool.fixed["proj"])
    assert toy.base["seen"] == 3


def test_merge_detached_has_no_gradient_and_agrees_with_the_differentiable_one():
    pool = make_toy().pool()
    chosen = Coefficients(pool, "column")
    detached = merge(pool, chosen, detach=True)
    for name, tensor in merge(pool, chosen).items():
        assert tensor.requires_grad
        assert not detached[name].requires_grad
        torch.testing.assert_close(detached[name], tensor.detach())  # float64 sums against float32 ones


@pytest.mark.parametrize("detach", [True, False])
def test_merge_coefficients_of_another_pool_are_refused(detach):
    pool = small_pool()
    two_of_three = ExpertPool.from_state_dicts(TOY.base, {name: TOY.experts[name] for name in EXPERTS[:2]})
    renamed = ExpertPool.from_state_dicts(TOY.base, {f"my_{name}": TOY.experts[name] for name in EXPERTS})
    wider = ExpertPool.from_state_dicts(
        {"blocks.0.w": torch.zeros(5, 4)},
        {"x": {"blocks.0.w": torch.ones(5, 4)}, "y": {"blocks.0.w": -torch.ones(5, 4)}},
    )
    narrow = ExpertPool.from_state_dicts(
        {"blocks.0.w": torch.zeros(2, 4)},
        {"x": {"blocks.0.w": torch.ones(2, 4)}, "y": {"blocks.0.w": -torch.ones(2, 4)}},
    )
    for made_for, used_with in ((pool, POOL), (two_of_three, POOL), (renamed, POOL), (wider, narrow), (narrow, wider)):
        with pytest.raises(InputError, match=r"The coefficients were made for another pool: .*expected .*, found"):
            merge(used_with, Coefficients(made_for, "row"), detach=detach)


def test_leaves_in_bfloat16_are_the_merge_rounded_and_gradients_sum_in_float32():
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(300, 200, generator=generator), "b": torch.randn(300, generator=generator)}
    experts = {e: {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in base.items()} for e in "abc"}
    pool = ExpertPool.from_state_dicts(base, experts)
    chosen = Coefficients(pool, "layer", init=0.3)
    exact = merge(pool, chosen)
    rounded = {name: torch.empty_like(tensor, dtype=torch.bfloat16) for name, tensor in base.items()}
    merge_into(rounded, pool, chosen.index, chosen().detach())
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in base)

    noise = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
    gradients = {name: noise[name] + 20 * pool.task_vectors(name).sum(0) for name in base}
    halves = {name: gradient.bfloat16() for name, gradient in gradients.items()}
    found = pull_back(pool, chosen.index, halves)
    torch.testing.assert_close(found, pull_back(pool, chosen.index, {n: g.float() for n, g in halves.items()}))
    expected = pull_back(pool, chosen.index, gradients)
    assert (found - expected).norm() <= 1e-3 * expected.norm()


def test_groups_of_a_step_do_not_add_up_in_bfloat16():
    encoder = torch.nn.Linear(2, 2, bias=False)
    pool = ExpertPool.from_state_dicts({"weight": torch.eye(2)}, {"a": {"weight": 2 * torch.eye(2)}})
    heads = {task: torch.nn.Identity() for task in ("large", "small")}
    options = EncoderOptions(compute_dtype="bfloat16")
    model = MergedModel(encoder, pool, Coefficients(pool, "task"), heads, options=options)
    with model.merged(torch.tensor([[0.5]]), micro_batch=1) as merged:
        assert merged._leaves["weight"].dtype == torch.bfloat16
        for inputs in merged.groups(dict.fromkeys(heads, torch.ones(1, 2))):
            for task, outputs in merged(inputs).items():
                assert outputs.logits.dtype == torch.float32
                merged.backward(outputs.logits.sum() / (1 if task == "large" else 1024))
    torch.testing.assert_close(merged.gradient, torch.tensor([[2 + 2 / 1024]]))
