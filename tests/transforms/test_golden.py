"""Transforms against outputs of the public reference implementations; see golden/README.md."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adamerge import Coefficients, ExpertPool, merge
from adamerge.model.starts import ModelStockStart
from adamerge.transforms import Breadcrumbs, Chain, Consensus, Lines, Magnitude, Pcb, Tall, Ties, Tsv, apply
from adamerge.transforms.dare import drop_entries
from adamerge.transforms.masks import tall_masks

GOLDEN = Path(__file__).parents[1] / "golden"
TIGHT = {"rtol": 1e-9, "atol": 1e-11}
SINGLE = {"rtol": 1e-5, "atol": 1e-6}  # the reference computes in float32


def golden(file: str, prefix: str = "") -> dict[str, torch.Tensor]:
    tensors = load_file(GOLDEN / f"{file}.safetensors")
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def inputs():
    tensors = load_file(GOLDEN / "inputs.safetensors")
    base = {key[5:]: tensor.double() for key, tensor in tensors.items() if key.startswith("base.")}
    stacks = {
        name: torch.stack([tensors[f"expert{e}.{name}"].double() for e in range(4)]) - base[name] for name in base
    }
    return base, stacks


BASE, TAU = inputs()


def check(found, expected, tolerance=TIGHT):
    assert set(found) >= set(expected)
    assert expected
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].to(tensor.dtype), tensor, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def summed(stacks):
    return {name: stack.sum(0) for name, stack in stacks.items()}


def averaged(stacks):
    """TIES' disjoint mean: over the experts whose entry is kept."""
    return {name: stack.sum(0) / (stack != 0).sum(0).clamp(min=1) for name, stack in stacks.items()}


# TIES


def test_ties_kept_entries_equal_adamergingpp():
    kept = apply(Ties(0.2), TAU)
    for expert in range(4):
        mask = golden("ties_adamergingpp_masks", f"kept{expert}.")
        check({name: (stack[expert] != 0).byte() for name, stack in kept.items()}, mask)
        check({name: stack[expert] for name, stack in kept.items()}, {n: TAU[n][expert] * m for n, m in mask.items()})


def test_ties_sum_and_mean_equal_the_reference_merges():
    kept = apply(Ties(0.2), TAU)
    check(summed(kept), golden("ties_global", "dis_sum."))
    check(averaged(kept), golden("ties_global", "dis_mean."))


def test_ties_model_trim_keeps_as_many_as_the_reference():
    kept = apply(Magnitude(1 - 2730 / 13649, scope="model"), TAU)
    for expert in range(4):
        assert sum(int((stack[expert] != 0).sum()) for stack in kept.values()) == 2730
        mask = golden("ties_adamergingpp_masks", f"trim{expert}.")
        check({name: (stack[expert] != 0).byte() for name, stack in kept.items()}, mask)


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_ties_edge_cases_equal_the_reference(case):
    """Equal magnitudes at the threshold, zero sums, a zero majority, an expert of zeros."""
    tensors = golden("ties_edge_cases", f"{case}.")
    density = tensors["K"].item() / 100 if tensors["K"] > 1 else tensors["K"].item()
    kept = apply(Ties(round(density, 6)), {"x": tensors["x"]})
    check(summed(kept), {"x": tensors["dis_sum"]})
    check(averaged(kept), {"x": tensors["dis_mean"]})


def test_ties_per_tensor_equals_mergekit():
    expected = golden("mergekit_ties_per_tensor")  # merged state dict, weights 1, divided by the counts
    mean = averaged(apply(Ties(0.2, scope="tensor"), TAU))
    check({name: BASE[name] + mean[name] for name in expected}, expected)


# DARE and magnitude pruning, given the reference's own random masks


def test_dare_drop_and_rescale_equal_fusion_bench():
    masks = [golden("dare_fusion_bench", f"mask{expert}.") for expert in range(4)]
    merged = {
        name: BASE[name]
        + 0.3 * sum(drop_entries(row, mask[name].bool(), 0.5) for row, mask in zip(stack, masks, strict=True))
        for name, stack in TAU.items()
    }
    check(merged, golden("dare_fusion_bench", "merged."))


def test_dare_drop_and_rescale_equal_mergelm():
    masks = golden("dare_mergelm", "random_mask.")
    check(
        {name: drop_entries(TAU[name][1], mask.bool(), 0.9) for name, mask in masks.items()},
        golden("dare_mergelm", "random."),
    )


def test_magnitude_pruning_equals_mergelm():
    expected = golden("dare_mergelm", "magnitude.")
    found = apply(Magnitude(0.9, rescale=True), {name: TAU[name] for name in expected})
    check({name: stack[1] for name, stack in found.items()}, expected)


# Breadcrumbs


@pytest.mark.parametrize("expert", [0, 1])
def test_breadcrumbs_rows_equal_the_authors_code(expert):
    found = apply(Breadcrumbs(keep=0.2, remove=0.1, scope="row"), TAU)
    expected = golden("breadcrumbs_original", f"mask{expert}.")
    check({name: (stack[expert] != 0).byte() for name, stack in found.items()}, expected)


def test_breadcrumbs_tensors_equal_mergekit():
    found = apply(Breadcrumbs(keep=0.7, remove=0.1), TAU)
    check({name: (stack[0] != 0).byte() for name, stack in found.items()}, golden("breadcrumbs_mergekit", "g10."))


def test_breadcrumbs_small_removal_zeroes_no_whole_tensor():
    """The reference does, where ``int(remove * n)`` is 0."""
    found = apply(Breadcrumbs(keep=0.9, remove=0.01), TAU)
    expected = golden("breadcrumbs_mergekit", "g1.")
    zeroed = {name for name, mask in expected.items() if not mask.any()}
    assert zeroed
    check(
        {name: (found[name][0] != 0).byte() for name in expected if name not in zeroed},
        {name: mask for name, mask in expected.items() if name not in zeroed},
    )
    for name in zeroed:
        assert (found[name][0] != 0).sum() == int(0.9 * found[name][0].numel())


# TALL masks, PCB, LiNeS, TSV


@pytest.mark.parametrize("agree", [1, 2, 3])
def test_tall_masks_and_consensus_equal_the_reference(agree):
    masks = {name: tall_masks(stack, 0.4).byte() for name, stack in TAU.items()}
    for expert in range(4):
        check({name: mask[expert] for name, mask in masks.items()}, golden("tall_consensus", f"mask{expert}."))
    found = apply(Consensus(0.4, agree), TAU)
    for expert in range(4):
        kept = golden("tall_consensus", f"consensus{agree}.")
        check({n: stack[expert] for n, stack in found.items()}, {n: TAU[n][expert] * mask for n, mask in kept.items()})
    if agree == 2:
        check(summed(found), golden("tall_consensus", "consensus2_tv."))


def test_tall_gives_each_task_its_part_of_the_sum():
    found = apply(Tall(0.4), TAU)
    masks = golden("tall_consensus", "mask1.")
    check({n: stack[1] for n, stack in found.items()}, {n: TAU[n].sum(0) * mask for n, mask in masks.items()})


@pytest.mark.parametrize(
    ("reference", "transform", "scale", "tolerance"),
    [
        ("root", Pcb(), 1.0, TIGHT),
        ("nlp", Pcb(ratio=0.1, clip=0.01), 1.0, SINGLE),
        ("vision", Pcb(ratio=0.05, clip=0.01, balance="normalised"), 1.2, SINGLE),
    ],
)
def test_pcb_equals_the_authors_code(reference, transform, scale, tolerance):
    found = summed(apply(transform, TAU))
    check({n: scale * tensor for n, tensor in found.items()}, golden("pcb_merging", f"{reference}."), tolerance)


def test_lines_equals_the_authors_code():
    check(summed(apply(Lines(beta=0.5), TAU)), golden("lines", "sum."))  # alpha 1 / 4 by its own rule
    on_mean = Chain([Ties(0.2, aggregate="mean"), Lines(beta=0.5)])
    check(summed(apply(on_mean, TAU)), golden("lines", "ties."))
    ties = {name: tensor.unsqueeze(0) for name, tensor in golden("ties_global", "dis_mean.").items()}
    check(summed(apply(Lines(0.38549955922158535, 0.5), ties)), golden("lines", "ties."))


def test_tsv_sum_equals_the_reference_merge():
    check(summed(apply(Tsv(average=()), TAU)), golden("tsvm", "merged."))
    averaged_too = apply(Tsv(), TAU)
    check(summed(averaged_too), golden("tsvm", "merged_original_repo."))


def test_tsv_parts_equal_the_single_task_vectors():
    found = apply(Tsv(average=()), TAU)
    matrices = {name: tensor for name, tensor in golden("tsvm_single_task", "t1.").items() if tensor.ndim == 2}
    check({name: found[name][1] for name in matrices}, matrices, SINGLE)


def test_model_stock_start_equals_mergekit():
    experts = {f"e{e}": {name: BASE[name] + stack[e] for name, stack in TAU.items()} for e in range(4)}
    pool = ExpertPool.from_state_dicts(BASE, experts)
    expected = golden("model_stock", "mergekit_filterFalse.")
    negative = [name for name, value in ModelStockStart()(pool).items() if value == 0]  # clipped here, not there
    merged = merge(pool, Coefficients(pool, "layer", init="model_stock", constraint="none"), detach=True)
    check(merged, {name: tensor for name, tensor in expected.items() if name not in negative})
    assert len(negative) < len(expected) / 2
