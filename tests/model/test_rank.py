"""Coefficients by singular direction: what directions are, and that merge, gradient and files follow them."""

import logging

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from adamerge import Coefficients, ExpertPool, InputError, merge
from adamerge.model.coefficients import load_coefficients, save_coefficients
from adamerge.model.encoder import EncoderOptions
from adamerge.model.granularity import Rank
from adamerge.model.merge import pull_back
from adamerge.model.merged_model import MergedModel
from adamerge.model.refinement import importance, transfer
from adamerge.pool.low_rank import LowRank, directions
from adamerge.pool.part import PoolPart
from adamerge.results.formats.peft import write_adapter
from tests.support.adapters import random_adapter

SHAPES = {"tall": (7, 4), "wide": (3, 2, 4), "bias": (5,), "scale": ()}


def pool_of(seed=0, **options):
    """Return a pool of whole experts in float64."""
    generator = torch.Generator().manual_seed(seed)
    states = [
        {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()} for _ in range(3)
    ]
    return ExpertPool.from_state_dicts(states[0], {"a": states[1], "b": states[2]}, **options)


def by_formula(pool, coefficients):
    """theta0 + sum over experts and directions of lambda s u v^T, by torch's own decomposition."""
    values, merged = coefficients(), {}
    for name, shape in pool.shapes.items():
        first, count = coefficients.index.labels[name]
        total = pool.base[name].clone()
        for e, change in enumerate(pool.task_vectors(name)):
            if len(shape) < 2:
                total = total + values[e, first] * change
                continue
            u, s, v = torch.linalg.svd(change.flatten(1), full_matrices=False)
            kept = values[e, first : first + count] * s[:count]
            total = total + ((u[:, :count] * kept) @ v[:count]).view(shape)
        merged[name] = total
    return merged


def close(found, expected):
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-10)


def random_coefficients(pool, granularity="rank"):
    coefficients = Coefficients(pool, granularity, constraint="none")
    torch.manual_seed(3)
    coefficients.assign(torch.randn_like(coefficients.raw))
    return coefficients


@pytest.mark.parametrize("ranks", [None, 2])
def test_merge_gradient_and_export_are_those_of_the_singular_value_decomposition(ranks):
    pool = pool_of()
    coefficients = random_coefficients(pool, Rank(ranks))
    sizes = {"tall": ranks or 4, "wide": ranks or 3, "bias": 1, "scale": 1}
    assert {name: count for name, (_, count) in coefficients.index.labels.items()} == sizes
    expected = by_formula(pool, coefficients)
    close(merge(pool, coefficients), expected)
    close(merge(pool, coefficients, detach=True), expected)
    gradients = {name: torch.randn_like(tensor) for name, tensor in expected.items()}
    (wanted,) = torch.autograd.grad([expected[n] for n in gradients], [coefficients.raw], list(gradients.values()))
    torch.testing.assert_close(pull_back(pool, coefficients.index, gradients), wanted, rtol=1e-10, atol=1e-10)


def test_equal_coefficients_of_all_directions_are_those_of_the_layer():
    pool = pool_of()
    close(merge(pool, Coefficients(pool, "rank", [0.3, 0.7])), merge(pool, Coefficients(pool, "layer", [0.3, 0.7])))


def test_directions_of_a_product_do_not_depend_on_its_factors():
    torch.manual_seed(0)
    up, down, mix = (torch.randn(*shape, dtype=torch.float64) for shape in ((6, 3), (3, 8), (3, 3)))
    one = directions(LowRank(up, down), 9)
    two = directions(LowRank(torch.cat([up @ mix, up], 1), torch.cat([mix.inverse() @ down, 0 * down])), 3)
    whole = directions(up @ down, 3)
    assert one.up.shape == (6, 3)
    for k in range(3):
        expected = one.up[:, k : k + 1] @ one.down[k : k + 1]
        for found in (two, whole):
            torch.testing.assert_close(found.up[:, k : k + 1] @ found.down[k : k + 1], expected, rtol=0, atol=1e-10)
    sizes = torch.linalg.svdvals(up @ down)[:3]
    torch.testing.assert_close(one.up.norm(dim=0) * one.down.norm(dim=1), sizes, rtol=1e-10, atol=0)
    assert directions(LowRank.zero((4, 5), torch.float64), 2).up.shape == (4, 0)


def test_share_that_is_left_out_is_told(caplog):
    pool = pool_of()
    with caplog.at_level(logging.WARNING):
        Coefficients(pool, Rank(4))
    assert not caplog.records
    Coefficients(pool, Rank(1))
    sizes = {n: [torch.linalg.svdvals(t.flatten(1)) for t in pool.task_vectors(n)] for n in ("tall", "wide")}
    kept = {n: sum(float(s[0] ** 2) for s in of) for n, of in sizes.items()}
    whole = {n: sum(float((s**2).sum()) for s in of) for n, of in sizes.items()}
    share = (sum(kept.values()) / sum(whole.values())) ** 0.5
    least = min(kept, key=lambda n: kept[n] / whole[n])
    assert f"keep {100 * share:.1f} % of the norm" in caplog.text
    assert f"of '{least}', the least, {100 * (kept[least] / whole[least]) ** 0.5:.1f} %" in caplog.text


def test_file_gives_the_same_merge_and_belongs_to_its_ranks(tmp_path):
    pool = pool_of()
    coefficients = random_coefficients(pool, Rank(2))
    save_coefficients(coefficients, tmp_path / "c.json", pool)
    loaded = load_coefficients(tmp_path / "c.json", pool_of())
    assert loaded.granularity == Rank(2)
    assert loaded.group_names[:3] == ["tall[0]", "tall[1]", "wide[0]"]
    first, second = merge(pool, coefficients, detach=True), merge(pool_of(), loaded, detach=True)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_start_from_coarser_coefficients_is_the_same_merge():
    pool = pool_of()
    layer, rank = random_coefficients(pool, "layer"), Coefficients(pool, "rank", constraint="none")
    rank.assign(transfer(layer, rank.index))
    close(merge(pool, rank), merge(pool, layer))
    learned = random_coefficients(pool)
    assert torch.equal(transfer(learned, rank.index), learned())
    for index in (layer.index, Rank(2).of(pool)):
        with pytest.raises(InputError, match=r"init: .* 4 singular directions of 'tall'"):
            transfer(learned, index)
    with pytest.raises(InputError, match=r"importance goes by entries"):
        importance(pool, learned)


def test_parts_of_rows_make_up_the_whole():
    pool = pool_of()
    coefficients = random_coefficients(pool)
    index, values = coefficients.index, coefficients().detach()
    gradients = {name: torch.randn(shape, dtype=torch.float64) for name, shape in pool.shapes.items()}
    sums = torch.zeros_like(values)
    for number in range(2):
        ranges = {}
        for name, shape in pool.shapes.items():
            (rows, *_), width = shape or (1,), max(1, torch.Size(shape[1:]).numel())
            cut = [0, -(-rows // 2), rows]
            ranges[name] = range(cut[number] * width, cut[number + 1] * width)
        part = PoolPart(pool, ranges, index.directions)
        pieces = {n: gradients[n].reshape(-1)[r.start : r.stop] for n, r in ranges.items()}
        sums += pull_back(part, index.part(ranges), pieces)
    torch.testing.assert_close(sums, pull_back(pool, index, gradients), rtol=1e-12, atol=1e-12)


def test_adapters_have_their_ranks_and_merge_into_one_adapter(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    save_file(network.state_dict(), tmp_path / "base.safetensors")
    shapes, ranks = {"0": (5, 6), "1": (4, 5)}, {"a": 1, "b": 3}
    experts = {e: random_adapter(tmp_path / e, shapes, r, seed=r, lora_alpha=r) for e, r in ranks.items()}
    pool = ExpertPool.from_files(tmp_path / "base.safetensors", experts)
    coefficients = random_coefficients(pool)
    assert coefficients.index.labels == {"0.weight": (0, 3), "1.weight": (3, 3)}
    expected = by_formula(pool, coefficients)
    close(merge(pool, coefficients), expected)
    gradient = pull_back(pool, coefficients.index, {n: torch.ones_like(t) for n, t in expected.items()})
    assert torch.equal(gradient[0] == 0, torch.tensor([False, True, True] * 2))
    adapter = write_adapter(pool, coefficients, network, tmp_path / "merged")
    assert adapter.ranks == {"0": 4, "1": 4}
    again = ExpertPool.from_files(tmp_path / "base.safetensors", {"merged": tmp_path / "merged"})
    for name, tensor in expected.items():
        torch.testing.assert_close(again.expert_parameters("merged")[name], tensor, rtol=1e-6, atol=1e-6)
    experts["b"] = random_adapter(tmp_path / "c", shapes, 1)
    lower = ExpertPool.from_files(tmp_path / "base.safetensors", experts)
    with pytest.raises(InputError, match="other ranks"):
        merge(lower, coefficients)


@pytest.mark.parametrize("ranks", [0, 1.5, "all"])
def test_number_of_directions_is_checked(ranks):
    with pytest.raises(InputError, match=r"granularity\.ranks"):
        Rank(ranks)


def test_whole_experts_run_beside_by_their_directions():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    state = network.state_dict()
    experts = {e: {n: t + torch.randn_like(t) for n, t in state.items()} for e in ("a", "b")}
    x, answers = torch.randn(5, 4, dtype=torch.float64), []
    for engine in ("merged", "beside", "auto"):
        pool = ExpertPool.from_state_dicts(state, experts)
        coefficients = random_coefficients(pool, Rank(2))
        heads = dict.fromkeys(experts, nn.Identity())
        model = MergedModel(network, pool, coefficients, heads, options=EncoderOptions(engine=engine))
        with model.merged(coefficients().detach()) as merged:
            for inputs in merged.groups({"a": x}):
                output = merged(inputs)["a"].logits
                merged.backward((output**2).sum())
        teacher = next(iter(model.expert_outputs("a", [("a", x)]))).logits
        answers.append((output.detach(), merged.gradient, teacher))
        assert model.weights.gives_gradients == (engine != "beside")
    for beside, expected in zip(answers[1], answers[0], strict=True):
        torch.testing.assert_close(beside, expected, rtol=1e-10, atol=1e-10)
