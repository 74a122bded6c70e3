"""Laws of the transforms: identity, permutation, scale; their statistics by streaming; and what they refuse."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from adamerge import ExpertPool, InputError
from adamerge.pool.describe import describe
from adamerge.transforms import (
    Awd,
    Breadcrumbs,
    Chain,
    Consensus,
    Dare,
    EqualNorms,
    Lines,
    Magnitude,
    Pcb,
    Prepared,
    RandomDirections,
    Tall,
    Ties,
    Trim,
    Tsv,
    apply,
    check_transform,
)
from adamerge.transforms.awd import redundant_vector
from adamerge.transforms.dare import dare_mask
from adamerge.transforms.depth import relative_depths
from adamerge.transforms.protocol import Stacks
from adamerge.transforms.selection import kth_smallest

NAMES = ("stem", "blocks.0.w", "blocks.1.w", "scale")
ALL = [
    Awd(), Breadcrumbs(), Breadcrumbs(scope="row"), Consensus(), Dare(), EqualNorms(), EqualNorms("tensor"), Lines(),
    Magnitude(), Magnitude(scope="model", rescale=True), Pcb(), Pcb(0.05, 0.01, "normalised"), Tall(), Ties(),
    Ties(scope="tensor"), Trim(), Tsv(), Chain([Ties(), Lines()]), Chain([Trim(0.5), Dare(), EqualNorms()]),
    RandomDirections(),
]  # fmt: skip
# Those whose rule depends on the size of task vectors, by their mathematics.
ABSOLUTE = (Pcb, Awd)


def random_stacks(experts=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"stem": (7,), "blocks.0.w": (9, 8), "blocks.1.w": (6, 2, 3, 2), "scale": ()}
    return {name: torch.randn(experts, *shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def integers(draw_values):
    """Sums of whole numbers are exact, so that the order of the experts cannot show in rounding."""
    return {
        name: torch.from_numpy(values.reshape(len(values), *shape)).double()
        for (name, shape), values in zip({"stem": (4,), "blocks.0.w": (3, 4)}.items(), draw_values, strict=True)
    }


whole = st.integers(2, 5).flatmap(
    lambda experts: st.tuples(*(hnp.arrays(np.int64, (experts, n), elements=st.integers(-4, 4)) for n in (4, 12)))
)


def ident(transform):
    return json.dumps(describe(transform))[:60]


# For every transform


@pytest.mark.parametrize("transform", ALL, ids=ident)
def test_transform_keeps_names_shapes_dtype_and_its_input(transform):
    for dtype in (torch.float32, torch.float64):
        stacks = random_stacks(dtype=dtype)
        before = {name: stack.clone() for name, stack in stacks.items()}
        result = apply(transform, stacks)
        assert list(result) == list(NAMES)
        for name, stack in result.items():
            assert (stack.shape, stack.dtype) == (before[name].shape, dtype)
            assert torch.equal(stacks[name], before[name])


@pytest.mark.parametrize("transform", ALL, ids=ident)
def test_transform_follows_a_permutation_of_the_experts(transform):
    stacks, order, names = random_stacks(), [2, 0, 1], ["a", "b", "c"]
    result = apply(transform, stacks, names)
    permuted = apply(transform, {n: s[order] for n, s in stacks.items()}, [names[e] for e in order])
    for name, stack in result.items():
        torch.testing.assert_close(permuted[name], stack[order], rtol=1e-9, atol=1e-9)


@given(whole, st.randoms(use_true_random=False), st.sampled_from([0.05, 0.2, 0.5, 1.0]))
def test_ties_of_whole_numbers_follows_any_permutation_exactly(values, random, density):
    stacks = integers(values)
    order = list(range(len(values[0])))
    random.shuffle(order)
    for scope in ("model", "tensor"):
        result = apply(Ties(density, scope), stacks)
        permuted = apply(Ties(density, scope), {name: stack[order] for name, stack in stacks.items()})
        assert all(torch.equal(permuted[name], stack[order]) for name, stack in result.items())


@pytest.mark.parametrize("transform", [t for t in ALL if not isinstance(t, ABSOLUTE)], ids=ident)
@pytest.mark.parametrize("factor", [0.25, 8.0])  # exact in binary
def test_transform_scales_with_the_task_vectors(transform, factor):
    result = apply(transform, random_stacks())
    scaled = apply(transform, {name: factor * stack for name, stack in random_stacks().items()})
    for name, stack in result.items():
        torch.testing.assert_close(scaled[name], factor * stack, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "transform",
    [Ties(1.0), Dare(0), Magnitude(0), Trim(1.0), Breadcrumbs(1, 0), EqualNorms(), Lines(1.0, 0), Awd(), Tsv(),
     Consensus(agree=1), Tall(), Chain([Trim(1.0), Dare(0)])],
    ids=ident,
)  # fmt: skip
def test_transform_of_one_expert_is_the_identity_where_it_should_be(transform):
    stacks = random_stacks(experts=1)
    for name, stack in apply(transform, stacks).items():
        torch.testing.assert_close(stack, stacks[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "transform",
    [Dare(0), Magnitude(0, rescale=True), Magnitude(0, "model"), Trim(1.0), Breadcrumbs(1, 0), Breadcrumbs(1, 0, "row"),
     Lines(1.0, 0), Awd(steps=0), Consensus(threshold=0, agree=3)],
    ids=ident,
)  # fmt: skip
def test_transform_with_neutral_options_is_the_identity(transform):
    stacks = random_stacks()
    assert all(torch.equal(stack, stacks[name]) for name, stack in apply(transform, stacks).items())


@pytest.mark.parametrize("transform", [t for t in ALL if getattr(t, "elementwise", False)], ids=ident)
def test_elementwise_transform_by_tiles_equals_the_whole(transform):
    stacks = random_stacks()
    prepared = Prepared(transform, Stacks(stacks, "abc"))
    for name, stack in stacks.items():
        flat = stack.reshape(3, -1)
        tiles = [prepared(name, flat[:, start : start + 5].clone()) for start in range(0, flat.shape[1], 5)]
        # exp and tanh may round differently in a vector's tail
        torch.testing.assert_close(torch.cat(tiles, 1), prepared(name, flat.clone()), rtol=1e-14, atol=0)


# TIES


@given(whole)
def test_ties_kept_entries_are_the_raw_ones_and_agree_in_sign(values):
    stacks = integers(values)
    for name, stack in apply(Ties(0.4), stacks).items():
        kept = stack != 0
        assert torch.equal(stack[kept], stacks[name][kept])
        assert not ((stack > 0).any(0) & (stack < 0).any(0)).any()


def test_ties_counts_over_the_whole_model():
    stacks = {"small": torch.full((2, 50), 0.1), "large": torch.linspace(1, 2, 50).repeat(2, 1)}
    result = apply(Ties(0.1), stacks)
    assert not result["small"].any()
    assert (result["large"] != 0).sum(1).tolist() == [11, 11]  # int(0.1 * 100) + 1, as the released codes
    assert (apply(Ties(0.1, "tensor"), stacks)["small"] != 0).sum(1).tolist() == [5, 5]


def test_ties_zero_sum_takes_the_majority_sign():
    cancel = torch.tensor([[1.0, 1.0, 1.0], [-1.0, 2.0, 2.0]])
    assert apply(Ties(1.0), {"w": cancel})["w"][:, 0].tolist() == [1.0, 0.0]
    assert apply(Ties(1.0), {"w": -cancel})["w"][:, 0].tolist() == [-1.0, 0.0]
    assert apply(Ties(1.0), {"w": cancel[:, :1]})["w"][:, 0].tolist() == [0.0, -1.0]  # no majority: negative


# Magnitude


@pytest.mark.parametrize("shape", [(3, 10, 7), (3, 9), (3,), (2, 4, 3, 2, 2)])
def test_trim_keeps_exactly_the_largest(shape):
    tau = torch.randn(shape)
    trimmed = Trim(0.3)("w", tau.clone())
    for before, after in zip(tau.reshape(shape[0], -1), trimmed.reshape(shape[0], -1), strict=True):
        kept = after != 0
        assert kept.sum() == max(1, int(0.3 * tau[0].numel()))
        assert torch.equal(after[kept], before[kept])
        assert kept.all() or before[kept].abs().min() >= before[~kept].abs().max()


def test_trim_ties_keep_the_first():
    assert Trim(0.5)("w", torch.tensor([[1.0, -1.0, 1.0, 1.0]])).tolist() == [[1.0, -1.0, 0.0, 0.0]]


@pytest.mark.parametrize(("scope", "left"), [("tensor", {"a": 50, "b": 50}), ("model", {"a": 0, "b": 100})])
def test_magnitude_scope_decides_where_entries_are_lost(scope, left):
    stacks = {"a": torch.linspace(1, 2, 100).view(1, 100), "b": torch.linspace(3, 4, 100).view(1, 100)}
    result = apply(Magnitude(0.5, scope, rescale=True), stacks)
    assert {name: int((stack != 0).sum()) for name, stack in result.items()} == left
    assert torch.equal(result["b"][result["b"] != 0], 2 * stacks["b"][result["b"] != 0])


@given(
    hnp.arrays(np.float64, st.tuples(st.integers(1, 3), st.integers(1, 40)), elements=st.floats(-1e300, 1e300)),
    st.data(),
)
def test_kth_smallest_by_streaming_equals_sorting(values, data):
    tensor = torch.from_numpy(values)
    rank = data.draw(st.integers(1, tensor.shape[1]))
    for given_ in (tensor, tensor.clamp(-1e30, 1e30).float()):
        found = kth_smallest(lambda given_=given_: given_.split(7, dim=1), rank)
        assert torch.equal(found, given_.sort(1).values[:, rank - 1])


def test_kth_smallest_is_exact_among_many_close_values():
    values = (1 + torch.arange(300_000) * 1e-7).float()[torch.randperm(300_000)].view(2, -1)
    for rank in (1, 30_000, 149_999, 150_000):
        found = kth_smallest(lambda: values.split(1 << 15, dim=1), rank)
        assert torch.equal(found, values.sort(1).values[:, rank - 1])


# DARE


def test_dare_mask_depends_on_seed_expert_and_parameter_alone():
    masks = {
        key: dare_mask(0.5, *key, (1000,))
        for key in [(0, "mnist", "w"), (1, "mnist", "w"), (0, "latin", "w"), (0, "mnist", "v")]
    }
    assert torch.equal(masks[0, "mnist", "w"], dare_mask(0.5, 0, "mnist", "w", (1000,)))
    different = list(masks.values())
    for i, first in enumerate(different):
        for second in different[:i]:
            assert 0.4 < (first == second).float().mean() < 0.6


def test_dare_mask_is_the_same_everywhere():
    """Recorded values: a change would silently give another merge on replay."""
    kept = dare_mask(0.75, 3, "mnist", "visual.proj", (4, 5)).flatten().nonzero().flatten().tolist()
    assert kept == [6, 8, 9, 10, 16, 19]


@pytest.mark.parametrize("drop", [0.1, 0.5, 0.9])
def test_dare_keeps_the_expected_share_and_the_mean(drop):
    tau = {"w": torch.ones(2, 100, 1000)}
    result = apply(Dare(drop), tau)["w"]
    assert result.unique().tolist() == pytest.approx([0.0, 1 / (1 - drop)])
    # 100,000 draws: five standard deviations
    spread = 5 * (drop / (1 - drop) / 100_000) ** 0.5
    assert (result.mean((1, 2)) - 1).abs().max() < spread


def test_dare_with_other_experts_beside_it_gives_the_same():
    stacks = random_stacks()
    full = apply(Dare(0.4, seed=5), stacks, ["a", "b", "c"])
    alone = apply(Dare(0.4, seed=5), {"blocks.0.w": stacks["blocks.0.w"][1:2]}, ["b"])
    assert torch.equal(alone["blocks.0.w"][0], full["blocks.0.w"][1])


# Random directions


def test_random_directions_keep_the_norm_of_each_tensor_and_nothing_else():
    stacks = random_stacks()
    stacks["blocks.0.w"][1] = 0  # an expert that did not change it
    result = apply(RandomDirections(), stacks)
    for name, stack in result.items():
        norms, before = (s.reshape(len(s), -1).norm(dim=1) for s in (stack, stacks[name]))
        torch.testing.assert_close(norms, before)
    assert not result["blocks.0.w"][1].any()
    large = {"w": torch.ones(2, 100, 100), "v": torch.ones(2, 100, 100)}
    rows = torch.cat([stack.reshape(2, -1) for stack in [*large.values(), *apply(RandomDirections(), large).values()]])
    cosines = torch.nn.functional.normalize(rows) @ torch.nn.functional.normalize(rows).T
    assert cosines[4:].sub(torch.eye(8)[4:]).abs().max() < 0.05  # five standard deviations of 1 / sqrt(10,000)


def test_random_directions_depend_on_seed_and_names_alone():
    stacks = random_stacks()
    full = apply(RandomDirections(5), stacks, ["a", "b", "c"])
    alone = apply(RandomDirections(5), {"blocks.0.w": stacks["blocks.0.w"][1:2]}, ["b"])
    assert torch.equal(alone["blocks.0.w"][0], full["blocks.0.w"][1])
    assert not torch.equal(apply(RandomDirections(6), stacks, ["a", "b", "c"])["stem"], full["stem"])
    assert torch.equal(apply(RandomDirections(), {"w": torch.ones(1, 4)})["w"].sign(), torch.tensor([[-1.0, -1, 1, 1]]))


# Masks, depth, norms


def test_consensus_needs_as_many_experts():
    with pytest.raises(InputError, match=r"transform\.agree: expected at most 3, the number of experts, found 4"):
        apply(Consensus(agree=4), random_stacks())


def test_relative_depths_follow_numbers_and_towers():
    names = [f"visual.blocks.{i}.w" for i in (0, 10, 2)] + [f"text.blocks.{i}.w" for i in (1, 0)] + ["proj"]
    assert list(relative_depths(names).values()) == [0.0, 1.0, 0.5, 1.0, 0.0, 0.0]
    stages = ["layer1.0.conv", "layer1.1.conv", "layer2.0.conv", "fc.weight"]
    assert list(relative_depths(stages).values()) == [0.0, 0.5, 1.0, 0.0]
    assert relative_depths(["blocks.0.w"]) == {"blocks.0.w": 0.0}


@pytest.mark.parametrize(
    ("pattern", "message"), [("nothing", "matches no parameter, .*Names look like 'stem'"), ("(", "regular expression")]
)
def test_lines_without_blocks_is_refused(pattern, message):
    with pytest.raises(InputError, match=message):
        apply(Lines(pattern=pattern), random_stacks())


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_ties_averaged_sums_to_the_mean_of_its_merge(scope):
    stacks = random_stacks()
    elected, averaged = (apply(Ties(0.4, scope, aggregate), stacks) for aggregate in ("sum", "mean"))
    for name, stack in elected.items():
        count = (stack != 0).sum(0)
        expected = torch.where(count > 0, stack.sum(0) / count.clamp(min=1), 0)
        torch.testing.assert_close(averaged[name].sum(0), expected)


def test_lines_after_ties_makes_up_for_what_was_trimmed():
    stacks = random_stacks()
    trimmed = apply(Ties(), stacks)
    found = apply(Chain([Ties(), Lines(beta=0)]), stacks)
    raw, left = (sum(stack.sum(0).abs().sum() for stack in s.values()) for s in (stacks, trimmed))
    for name, stack in found.items():
        torch.testing.assert_close(stack, trimmed[name] * (raw / left / 3))


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_equal_norms_are_equal_and_keep_the_mean(scope):
    stacks = random_stacks()
    result = apply(EqualNorms(scope), stacks)
    for names in [NAMES] if scope == "model" else [[name] for name in NAMES]:
        before, after = (torch.cat([s[n].reshape(3, -1) for n in names], 1).norm(dim=1) for s in (stacks, result))
        torch.testing.assert_close(after, before.mean().expand(3))


def test_equal_norms_leave_an_unchanged_tensor_at_zero():
    stacks = {"w": torch.tensor([[0.0, 0.0], [3.0, 4.0]])}
    assert apply(EqualNorms("tensor"), stacks)["w"].tolist() == [[0.0, 0.0], [1.5, 2.0]]


# AWD and TSV


def test_awd_by_gram_matrix_equals_gradient_descent_on_the_vector():
    stacks = random_stacks()
    flat = torch.cat([stack.reshape(3, -1) for stack in stacks.values()], 1)
    flat = 0.1 * (flat + flat[:1])  # norms and correlations at which delta grows
    delta = torch.zeros(flat.shape[1], dtype=torch.float64)
    for step in range(40):
        delta.requires_grad_()
        unit = torch.nn.functional.normalize(flat - delta, dim=1)
        cosines = (unit @ unit.T).abs()
        loss = (cosines.sum() - cosines.trace()) / 6
        if step:
            loss = loss + 0.1 * delta.norm()
        delta = (delta - 0.02 * torch.autograd.grad(loss, delta)[0]).detach()
    found = redundant_vector(flat @ flat.T, penalty=0.1, step_size=0.02, steps=40) @ flat
    assert delta.norm() > 0.05
    torch.testing.assert_close(found, delta, rtol=1e-8, atol=1e-10)


def test_awd_makes_task_vectors_more_orthogonal():
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(200, generator=generator)
    stacks = {"w": 0.05 * (torch.randn(4, 200, generator=generator) + common)}  # norms near 1

    def overlap(stack):
        unit = torch.nn.functional.normalize(stack, dim=1)
        return ((unit @ unit.T).abs().sum() - 4) / 12

    result = apply(Awd(), stacks)["w"]
    assert overlap(result) < 0.7 * overlap(stacks["w"])
    moved = stacks["w"] - result
    torch.testing.assert_close(moved, moved[:1].expand(4, 200))  # one vector for all


def test_tsv_of_low_rank_experts_stays_finite_and_keeps_them_where_they_are_orthogonal():
    q, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    stacks = {"w": torch.stack([torch.outer(q[:, e], q[:, e + 3]) * (e + 1) for e in range(3)])}
    torch.testing.assert_close(apply(Tsv(), stacks)["w"], stacks["w"])
    zeros = {"w": torch.zeros(2, 4, 4)}
    assert not apply(Tsv(), zeros)["w"].any()


# What is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Trim(0), r"transform\.density: expected a number in \(0, 1\], found 0"),
        (lambda: Trim(-1), r"transform\.density"),
        (lambda: Ties(1.5), r"transform\.density: expected a number in \(0, 1\], found 1\.5"),
        (lambda: Ties(20), r"transform\.density"),
        (lambda: Ties(scope="layer"), r"transform\.scope: expected .* found 'layer'"),
        (lambda: Dare(1.0), r"transform\.drop: expected a number in \[0, 1\), found 1\.0"),
        (lambda: Dare(seed=0.5), r"transform\.seed: expected a whole number, found 0\.5"),
        (lambda: Magnitude("half"), r"transform\.drop"),
        (lambda: Breadcrumbs(0.9, 0.2), r"expected a sum of at most 1, found 0\.9 \+ 0\.2"),
        (lambda: Consensus(agree=0), r"transform\.agree: expected a whole number >= 1, found 0"),
        (lambda: Tall(-1), r"transform\.threshold: expected a number >= 0, found -1"),
        (lambda: Pcb(clip=0.6), r"transform\.clip: expected a number in \[0, 0\.5\)"),
        (lambda: Pcb(balance="x"), r"transform\.balance"),
        (lambda: Lines(beta=float("nan")), r"transform\.beta: expected a number, found nan"),
        (lambda: Awd(steps=1.5), r"transform\.steps: expected a whole number >= 0"),
        (lambda: Tsv("*.weight"), r"transform\.average: expected a list of globs"),
        (lambda: Chain([]), r"transform\.transforms: expected a list of transforms"),
        (lambda: Chain([3]), r"transform: expected a callable \(name, task_vectors\), found 3"),
    ],
)
def test_transform_option_out_of_range_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_transform_with_another_signature_is_refused():
    with pytest.raises(InputError, match=r"expected a call with .*\(name, task_vectors\), found \(task_vectors\)"):
        check_transform(lambda task_vectors: task_vectors)
    with pytest.raises(InputError, match=r"found <class"):
        check_transform(Trim)


@pytest.mark.parametrize("transform", ALL, ids=ident)
def test_transform_description_survives_json_and_holds_every_option(transform):
    described = describe(transform)
    assert json.loads(json.dumps(described)) == described
    assert described["name"] == type(transform).__name__.lower()
    if isinstance(transform, Dare | RandomDirections):
        assert describe(replace(transform, seed=1)) != described


def test_pool_as_a_source_equals_stacks_in_memory(toy):
    raw = toy.pool()
    stacks = {name: raw.task_vectors(name) for name in raw.names}
    for transform in ALL:
        pool = ExpertPool.from_state_dicts(toy.base, toy.experts, transform=transform)
        expected = apply(transform, stacks, raw.expert_names)
        for name in pool.names:
            torch.testing.assert_close(pool.task_vectors(name), expected[name], rtol=1e-6, atol=1e-8)
        gone = set(raw.names) - set(pool.names)
        assert all(not expected[name].any() for name in gone)


def test_pcb_of_a_hundred_experts_is_finite():
    stacks = {"w": torch.randn(100, 50, generator=torch.Generator().manual_seed(0))}
    assert torch.isfinite(apply(Pcb(), stacks)["w"]).all()
