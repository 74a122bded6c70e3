"""Laws of the merges: identities, permutations, scales; and what data-driven rules see of a model."""

import dataclasses
import functools
from pathlib import Path

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from adamerge import Coefficients, ExpertPool, InputError, MergedModel
from adamerge.merges import merged_state_dict
from adamerge.merges.activations import linear_inputs
from adamerge.merges.averages import LayerSwapping, MetricsWeighted, ModelStock, TaskArithmetic, WeightAverage
from adamerge.merges.calibration import batches
from adamerge.merges.doge import DOGE
from adamerge.merges.fisher import Fisher
from adamerge.merges.opcm import OPCM, project_off
from adamerge.merges.regmean import RegMean, RegMeanPlusPlus
from adamerge.merges.singular import IsoC, IsoCTS, TSVMerge, polar
from adamerge.merges.ties import TiesMerge
from adamerge.merges.wudi import WUDI, quadratic
from tests.support.fits import make_data
from tests.support.toy import EXPERTS, make_toy

SYMMETRIC = {
    "average": WeightAverage(),
    "arithmetic": TaskArithmetic(),
    "stock": ModelStock(),
    "stock_rows": ModelStock(per_row=True, agreement="angle"),
    "ties": TiesMerge(),
    "ties_tensor": TiesMerge(scope="tensor", aggregate="max"),
    "tsvm": TSVMerge(),
    "iso_c": IsoC(),
    "iso_cts": IsoCTS(),
    "wudi": WUDI(steps=20),
    "wudi_average": WUDI(steps=20, rest="average"),
    "doge": DOGE(steps=20),
}
WITH_DATA = {
    "fisher": Fisher(examples=6),
    "fisher_draws": Fisher(examples=6, draws=2),
    "regmean": RegMean(examples=6),
    "regmean++": RegMeanPlusPlus(examples=6),
}
# Equal for task vectors of any size, so that tau -> c tau gives merged -> c merged.
HOMOGENEOUS = [name for name in SYMMETRIC if name != "doge"]  # DOGE divides by the norms


def updates(base, experts, rule):
    pool = ExpertPool.from_state_dicts(base, experts)
    merged = merged_state_dict(pool, rule)
    return {name: merged[name] - base[name] for name in pool.names}


def close(first, second, scale=1.0):
    for name in first:
        torch.testing.assert_close(first[name], scale * second[name], rtol=1e-6, atol=1e-9, msg=lambda m, n=name: n + m)


@functools.cache
def toy(seed=0):
    return make_toy(torch.float64, seed=seed)


@pytest.mark.parametrize("rule", SYMMETRIC)
@settings(max_examples=5)  # of the six orders
@given(order=st.permutations(EXPERTS), seed=st.integers(0, 3))
def test_merge_does_not_depend_on_the_order_of_experts(rule, order, seed):
    data = toy(seed)
    found = updates(data.base, {name: data.experts[name] for name in order}, SYMMETRIC[rule])
    close(found, updates(data.base, data.experts, SYMMETRIC[rule]))


@pytest.mark.parametrize("rule", HOMOGENEOUS)
@given(scale=st.sampled_from([0.01, 0.5, 3.0]))
def test_merge_scales_with_the_task_vectors(rule, scale):
    data = toy()
    scaled = {
        name: {k: torch.lerp(data.base[k], v, scale) if v.is_floating_point() else v for k, v in expert.items()}
        for name, expert in data.experts.items()
    }
    close(updates(data.base, scaled, SYMMETRIC[rule]), updates(data.base, data.experts, SYMMETRIC[rule]), scale)


@pytest.mark.parametrize(
    "rule",
    [
        WeightAverage(), TaskArithmetic(1.0), MetricsWeighted({"red": 3.0}), ModelStock(), TiesMerge(density=1.0),
        TSVMerge(), OPCM(), LayerSwapping("red", "red", bottom=0, top=0), WUDI(rest="average", skip=()),
    ],
)  # fmt: skip
def test_merge_of_one_expert_is_that_expert(rule):
    data = toy()
    close(
        updates(data.base, {"red": data.experts["red"]}, rule),
        {name: data.experts["red"][name] - data.base[name] for name in data.base},
    )


def test_weighted_average_with_power_zero_is_the_average():
    data = toy()
    scores = {"red": 0.1, "green": 5.0, "blue": 70.0}
    close(
        updates(data.base, data.experts, MetricsWeighted(scores, 0.0)),
        updates(data.base, data.experts, WeightAverage()),
    )
    expected = sum(s * (data.experts[n]["proj"] - data.base["proj"]) for n, s in scores.items()) / 75.1
    torch.testing.assert_close(updates(data.base, data.experts, MetricsWeighted(scores))["proj"], expected)
    best = updates(data.base, data.experts, MetricsWeighted(scores, -1e3))
    close(best, {name: data.experts["red"][name] - data.base[name] for name in best})


def test_layer_swapping_takes_each_block_from_its_expert():
    base = {f"blocks.{i}.w": torch.zeros(2) for i in range(6)} | {"stem": torch.zeros(2)}
    experts = {name: {key: torch.full((2,), value) for key in base} for name, value in (("o", 1.0), ("i", 3.0))}
    merged = merged_state_dict(ExpertPool.from_state_dicts(base, experts), LayerSwapping("o", "i", 1, 2, 1))
    assert [merged[f"blocks.{i}.w"][0].item() for i in range(6)] == [1, 2, 3, 2, 1, 1]
    assert merged["stem"][0] == 1


def test_singular_merges_make_directions_orthonormal():
    data = toy()
    found = updates(data.base, data.experts, IsoC())["blocks.0.up.weight"]
    values = torch.linalg.svdvals(found)
    torch.testing.assert_close(values, values.mean().expand_as(values))
    matrix = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(polar(matrix).T @ polar(matrix), torch.eye(3, dtype=torch.float64))


def test_tsvm_of_low_rank_task_vectors_takes_their_rank_only():
    """Beyond an expert's rank the singular vectors are arbitrary: none of them may enter."""
    rank_one = [torch.outer(torch.eye(8)[i], torch.eye(6)[i]).double() for i in range(2)]
    base = {"w": torch.zeros(8, 6, dtype=torch.float64)}
    found = updates(base, {str(i): {"w": m} for i, m in enumerate(rank_one)}, TSVMerge())["w"]
    torch.testing.assert_close(found, rank_one[0] + rank_one[1])


def test_opcm_removes_what_is_merged_already():
    merged, update = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    left, values, right = torch.linalg.svd(merged, full_matrices=True)
    full = left.T @ update @ right.T
    rank = int((values.cumsum(0) / values.sum() > 0.5).float().argmax())
    full.diagonal().fill_(0)
    full[:rank, :rank] = 0
    torch.testing.assert_close(project_off(merged, update, 0.5), left @ full @ right)
    torch.testing.assert_close(project_off(merged, merged, 0.5), torch.zeros_like(merged), atol=1e-12, rtol=0)


def test_opcm_keeps_the_mean_norm_and_depends_on_the_order():
    data = toy()
    found = updates(data.base, data.experts, OPCM())
    norm = sum(tensor.square().sum() for tensor in found.values()).sqrt()
    own = [sum((expert[n] - data.base[n]).square().sum() for n in found).sqrt() for expert in data.experts.values()]
    torch.testing.assert_close(norm, sum(own) / 3)
    assert any(
        not torch.allclose(tensor, found[name])
        for seed in range(3)
        for name, tensor in updates(data.base, data.experts, OPCM(seed=seed)).items()
    )


def interference(merged, stack):
    return sum(((merged - m) @ m.T).square().sum() / m.square().sum() for m in stack)


def test_wudi_lowers_interference_towards_its_closed_form():
    stack = torch.randn(3, 5, 4, dtype=torch.float64)
    base = {"w": torch.zeros(5, 4, dtype=torch.float64)}
    experts = {str(i): {"w": m} for i, m in enumerate(stack)}
    total, curvature, pull = quadratic(iter(stack))
    best = pull @ torch.linalg.inv(curvature)
    gradient = torch.func.grad(interference)(total, stack)
    torch.testing.assert_close(gradient, 2 * (total @ curvature - pull))
    steps = [interference(updates(base, experts, WUDI(steps=n))["w"], stack) for n in (0, 20, 200)]
    assert steps[0] > steps[1] > steps[2] > interference(best, stack)
    torch.testing.assert_close(updates(base, experts, WUDI(steps=3000, lr=0.01))["w"], best, atol=1e-3, rtol=0)
    assert torch.equal(updates(base, experts, WUDI(skip=["w"]))["w"], base["w"])


def tables():
    """A base and two experts of GPT-2's names that changed some rows of its tables, and every matrix."""
    shapes = {"wte.weight": (50, 8), "wpe.weight": (6, 8), "h.0.mlp.c_fc.weight": (8, 8), "lm_head.weight": (9, 8)}
    base = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    experts = {}
    for expert in ("a", "b"):
        experts[expert] = {name: tensor.clone() for name, tensor in base.items()}
        for name, changed in (("wte.weight", 5), ("wpe.weight", 3), ("h.0.mlp.c_fc.weight", 8), ("lm_head.weight", 9)):
            experts[expert][name][:changed] += torch.randn(changed, 8, dtype=torch.float64)
    return base, experts


@pytest.mark.parametrize("rule", [TSVMerge(), IsoC(), IsoCTS(), OPCM(), WUDI(rest="average"), DOGE(rest="average")],
                         ids=lambda rule: type(rule).__name__)  # fmt: skip
def test_rows_that_no_expert_changed_stay_whatever_the_rule(rule):
    base, experts = tables()
    updated = updates(base, experts, rule)
    for name, changed in (("wte.weight", 5), ("wpe.weight", 3)):
        moved = updated[name].norm(dim=1)
        assert moved[:changed].min() > 1e-3
        assert moved[changed:].max() < 1e-12


@pytest.mark.parametrize("rule", [TSVMerge(), IsoC(), IsoCTS()], ids=lambda rule: type(rule).__name__)
def test_spectral_rules_average_tables_of_tokens_and_heads_by_any_name(rule):
    base, experts = tables()
    mean = updates(base, experts, WeightAverage())
    updated = updates(base, experts, rule)
    for name in ("wte.weight", "lm_head.weight"):
        torch.testing.assert_close(updated[name], mean[name])
    assert not torch.allclose(updated["h.0.mlp.c_fc.weight"], mean["h.0.mlp.c_fc.weight"])
    everything = updates(base, experts, dataclasses.replace(rule, skip=()))
    assert not torch.allclose(everything["lm_head.weight"], mean["lm_head.weight"])


def test_doge_lowers_conflicts_and_starts_off_the_shared_directions():
    stack = torch.randn(3, 8, 7, dtype=torch.float64)
    rule = DOGE(steps=40, lr=1e-2, subspace=2)
    scales = 0.07 / stack.flatten(1).norm(dim=1)

    def conflict(change):
        gap = stack - torch.einsum("e,emn->mn", scales, stack) - scales.sum() * change
        return (stack * gap).sum(2).square().sum()

    change = rule._learn(stack, scales)
    assert conflict(change) < conflict(torch.zeros_like(change))
    still = DOGE(steps=0)._merge(stack, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(still, torch.einsum("e,emn->mn", scales, stack))


@pytest.fixture
def assembled():
    data = make_toy(torch.float64)
    pool = data.pool()
    model = data.model(pool, Coefficients(pool, "task"))
    streams = make_data(count=8, evaluation_batch_size=3)
    for stream in streams.streams.values():
        stream._preprocess = None
    for task in streams.tasks.values():
        images, labels = task.dataset.tensors
        task.dataset.tensors = (images.double(), labels)
    return data, pool, model, streams


@pytest.mark.parametrize("rule", WITH_DATA)
def test_data_rules_keep_what_experts_agree_on_and_need_data(rule, assembled):
    data, pool, model, streams = assembled
    before = {name: tensor.clone() for name, tensor in pool.base.items()}
    with pytest.raises(InputError, match="needs unlabeled data"):
        merged_state_dict(pool, WITH_DATA[rule])
    first = merged_state_dict(pool, WITH_DATA[rule], model=model, data=streams)
    again = merged_state_dict(pool, WITH_DATA[rule], model=model, data=streams)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pool.base.items())
    # One and the same change in all experts is what every merge returns.
    shift = {name: tensor + 0.1 if tensor.is_floating_point() else tensor for name, tensor in data.base.items()}
    near = {
        name: {k: v + 1e-9 * i for k, v in shift.items() if v.is_floating_point()} for i, name in enumerate(EXPERTS)
    }
    floats = {name: tensor for name, tensor in data.base.items() if tensor.is_floating_point()}
    alike = ExpertPool.from_state_dicts(floats, near)
    model = MergedModel(data.encoder, alike, Coefficients(alike, "task"), data.heads)
    merged = merged_state_dict(alike, WITH_DATA[rule], model=model, data=streams)
    for name in alike.names:
        torch.testing.assert_close(merged[name], shift[name], atol=1e-6, rtol=0)


def test_fisher_draws_tend_to_the_exact_diagonal(assembled):
    _, pool, model, streams = assembled
    exact = merged_state_dict(pool, Fisher(examples=4), model=model, data=streams)
    few = merged_state_dict(pool, Fisher(examples=4, draws=1), model=model, data=streams)
    many = merged_state_dict(pool, Fisher(examples=4, draws=300), model=model, data=streams)

    def distance(found):
        return sum((found[name] - exact[name]).square().sum().item() for name in pool.names)

    assert distance(many) < 0.2 * distance(few)


def test_data_rule_without_data_for_an_expert_names_it(assembled):
    data, pool, _, streams = assembled
    teachers = dict.fromkeys(EXPERTS, "red")
    model = data.model(pool, Coefficients(pool, "task"), teachers=teachers)
    with pytest.raises(InputError, match="Expert 'green' has no data"):
        merged_state_dict(pool, RegMean(), model=model, data=streams)


def test_calibration_samples_the_stream_without_repeats():
    data = make_data(count=40, evaluation_batch_size=7)
    found = torch.cat(list(batches(data, "red", 10)))
    assert len(found) == 10
    assert len({tuple(x.flatten().tolist()) for x in found}) == 10
    assert torch.equal(found, torch.cat(list(batches(data, "red", 10))))


def towers():
    clip = open_clip.CLIP(
        embed_dim=8,
        vision_cfg={"image_size": 8, "patch_size": 4, "width": 12, "layers": 2, "head_width": 6},
        text_cfg={"context_length": 4, "vocab_size": 8, "width": 8, "heads": 2, "layers": 1},
    )
    return {
        "open_clip": (clip.visual, "transformer.resblocks", "attn"),
        "torchvision": (VisionTransformer(8, 4, 2, 2, 12, 24, num_classes=3), "encoder.layers", "self_attention"),
    }


@pytest.mark.parametrize("library", ["open_clip", "torchvision"])
def test_attention_inputs_are_captured(library):
    """Hooks on the projections inside nn.MultiheadAttention never fire; their inputs must be seen all the same."""
    encoder, path, name = towers()[library]
    encoder = encoder.double().eval()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    seen = {}
    with torch.no_grad():
        expected = encoder(images)
        with linear_inputs(encoder, dict(encoder.named_parameters()), lambda rows, x: seen.update({rows: x})) as params:
            found = torch.func.functional_call(encoder, params, (images,))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(encoder(images), expected)  # no hook is left
        block = next(iter(encoder.get_submodule(path).children()))
        prefix = f"{path}.{next(n for n, _ in encoder.get_submodule(path).named_children())}.{name}"
        attention = block.get_submodule(name)
        by_name = {rows.name: (rows, x) for rows, x in seen.items()}
        rows, inputs = by_name[f"{prefix}.in_proj_weight"]
        assert (rows.start, rows.stop) == (0, 36)
        out = by_name[f"{prefix}.out_proj.weight"][1]
        query, key, value = nn.functional.linear(inputs, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)

        def heads(x):
            return x.unflatten(-1, (2, 6)).transpose(1, 2)

        weights = (heads(query) @ heads(key).transpose(-1, -2) / 6**0.5).softmax(-1)
        torch.testing.assert_close(out, (weights @ heads(value)).transpose(1, 2).flatten(-2))
    linear = [n for n, m in encoder.named_modules() if isinstance(m, nn.Linear)]
    assert {n for n, _ in encoder.named_parameters() if n.endswith("in_proj_weight")} < set(by_name)
    assert {f"{n}.weight" for n in linear} <= set(by_name)


def test_cross_attention_has_three_sets_of_inputs():
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    seen = []
    query, key = torch.randn(1, 2, 4), torch.randn(1, 3, 4)
    with linear_inputs(attention, dict(attention.named_parameters()), lambda rows, _: seen.append(rows)) as params:
        found = torch.func.functional_call(attention, params, (query, key, key))[0]
    torch.testing.assert_close(found, attention(query, key, key)[0])
    assert [tuple(rows) for rows in seen] == [
        ("in_proj_weight", 0, 4), ("in_proj_weight", 4, 8), ("in_proj_weight", 8, 12), ("out_proj.weight", 0, 4),
    ]  # fmt: skip


def test_regmean_plus_plus_refuses_modules_that_are_no_chain(assembled):
    _, pool, model, streams = assembled
    with pytest.raises(InputError, match="expected the path of a ModuleList"):
        merged_state_dict(pool, RegMeanPlusPlus(blocks="stem"), model=model, data=streams)


def test_merged_state_dict_keeps_what_does_not_merge():
    data = make_toy()
    merged = merged_state_dict(data.pool(exclude=["stem.*"]), WeightAverage())
    assert list(merged) == list(data.base)
    assert torch.equal(merged["stem.weight"], data.base["stem.weight"])
    assert torch.equal(merged["seen"], data.base["seen"])
    assert not torch.equal(merged["proj"], data.base["proj"])


def test_merged_state_dict_gives_a_tied_alias_the_merged_value():
    weight = torch.zeros(2)
    base = {"a": weight, "b": weight}
    experts = {str(i): {"a": torch.full((2,), i), "b": torch.full((2,), i)} for i in (1.0, 2.0)}
    merged = merged_state_dict(ExpertPool.from_state_dicts(base, experts), WeightAverage())
    assert merged["a"].tolist() == merged["b"].tolist() == [1.5, 1.5]


def test_merged_state_dict_refuses_a_rule_that_leaves_parameters_out():
    pool = make_toy().pool()
    with pytest.raises(InputError, match="leaves out"):
        merged_state_dict(pool, lambda pool: iter([("proj", pool.base["proj"])]))
    with pytest.raises(InputError, match="expected each of the pool's parameters once"):
        merged_state_dict(pool, lambda pool: iter([("proj", pool.base["scale"])]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TiesMerge(density=0), "TiesMerge.density"),
        (lambda: TiesMerge(aggregate="median"), r"TiesMerge\.aggregate: expected .* found 'median'"),
        (lambda: TSVMerge(scale="big"), "TSVMerge.scale: expected a number"),
        (lambda: TSVMerge(skip="proj"), "TSVMerge.skip: expected a list"),
        (lambda: WUDI(steps=1.5), "WUDI.steps: expected a whole number"),
        (lambda: RegMean(off_diagonal=2), "RegMean.off_diagonal"),
        (lambda: Fisher(examples=0), "Fisher.examples"),
        (lambda: LayerSwapping("a", "b", blocks="("), "is not a regular expression"),
        (lambda: MetricsWeighted({"a": -1.0}), "MetricsWeighted.scores.a"),
    ],
)
def test_rule_option_out_of_range_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_rules_name_experts_that_are_not_there():
    pool = make_toy().pool()
    with pytest.raises(InputError, match="Did you mean 'green'"):
        merged_state_dict(pool, LayerSwapping("red", "gren"))
    with pytest.raises(InputError, match="one score for each"):
        merged_state_dict(pool, MetricsWeighted({"red": 1.0}))


@pytest.mark.parametrize("rule", [TiesMerge(), OPCM(), TSVMerge()])
def test_merge_of_streamed_experts_equals_that_in_memory(rule, tmp_path: Path):
    from tests.support.toy import save_files

    data = make_toy()
    base, experts = save_files(tmp_path, data.base, data.experts)
    found = [
        merged_state_dict(ExpertPool.from_files(base, experts, storage=storage), rule) for storage in ("ram", "stream")
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_layer_swapping_orders_blocks_by_number_not_by_name():
    names = [f"blocks.{i}.w" for i in sorted(range(12), key=str)]
    base = {name: torch.zeros(2) for name in names}
    pool = ExpertPool.from_state_dicts(
        base, {"a": {name: torch.ones(2) for name in names}, "b": {name: torch.full((2,), 2.0) for name in names}}
    )
    merged = dict(LayerSwapping(outer="a", inner="b", bottom=3, top=3)(pool))
    assert [int(merged[f"blocks.{i}.w"][0]) for i in range(12)] == [1] * 3 + [2] * 6 + [1] * 3
