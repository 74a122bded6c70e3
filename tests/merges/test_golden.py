"""Merges against golden numbers of public reference implementations; see golden/README.md."""

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from adamerge import Coefficients, ExpertPool, MergedModel
from adamerge.data import Task, UnlabeledTasks
from adamerge.merges import merged_state_dict
from adamerge.merges.averages import ModelStock, TaskArithmetic, WeightAverage
from adamerge.merges.fisher import Fisher, add_expert, fisher_sums
from adamerge.merges.opcm import OPCM
from adamerge.merges.regmean import RegMeanPlusPlus, equations, solve
from adamerge.merges.singular import IsoC, IsoCTS, TSVMerge
from adamerge.merges.ties import TiesMerge
from adamerge.transforms import Ties as Elected
from adamerge.transforms import apply

GOLDEN = Path(__file__).parents[1] / "golden"
EXACT = {"rtol": 1e-9, "atol": 1e-11}  # float64 on both sides
ROUNDED = {"rtol": 1e-6, "atol": 1e-8}  # the references keep a part in float32
CONSTANTS = {"rtol": 1e-5, "atol": 1e-6}  # the reference runs in float32


@cache
def models():
    found = {}
    for key, tensor in load_file(GOLDEN / "inputs.safetensors").items():
        model, name = key.split(".", 1)
        found.setdefault(model, {})[name] = tensor.double()
    base = found.pop("base")
    return base, dict(sorted(found.items()))


@cache
def pool():
    return ExpertPool.from_state_dicts(*models())


def golden(file, prefix=""):
    tensors = load_file(GOLDEN / f"{file}.safetensors")
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def check(found, expected, **tolerance):
    assert expected
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].to(tensor.dtype), tensor, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def merged(rule):
    return merged_state_dict(pool(), rule)


def update(rule):
    """The merged task vector."""
    return {name: tensor - pool().base[name] for name, tensor in merged(rule).items()}


@pytest.mark.parametrize(
    ("file", "rule"), [("simple_average", WeightAverage()), ("task_arithmetic", TaskArithmetic(0.3))]
)
def test_averages_equal_reference(file, rule):
    check(merged(rule), golden(file), **EXACT)


@pytest.mark.parametrize("how", ["mean", "sum"])
def test_ties_of_the_model_equals_reference(how):
    check(update(TiesMerge(aggregate=how)), golden("ties_global", f"dis_{how}."), **EXACT)


def test_ties_per_tensor_equals_mergekit():
    expected = golden("mergekit_ties_per_tensor")
    assert set(merged(TiesMerge(scope="tensor"))) - set(expected) == {"logit_scale"}
    check(merged(TiesMerge(scope="tensor")), expected, **EXACT)


@pytest.mark.parametrize("case", ["a", "b", "c"])
@pytest.mark.parametrize("how", ["mean", "sum", "max"])
def test_ties_edge_cases_equal_reference(case, how):
    """Magnitudes that tie at the threshold, sums of zero, a majority of zero, an expert of zeros."""
    values = golden("ties_edge_cases", f"{case}.")
    x = values["x"].double()
    share = values["K"].item()
    density = share / 100 if share > 1 else share

    kept = apply(Elected(round(density, 6)), {"x": x})["x"]
    assert not (kept[~values["trim_mask"].bool()] != 0).any()
    parts = apply(Elected(round(density, 6), aggregate=how), {"x": x})["x"]
    check({"x": parts.sum(0)}, {"x": values[f"dis_{how}"].double()}, **EXACT)


@pytest.mark.parametrize(("file", "rule"), [("tsvm", TSVMerge), ("iso_c", IsoC), ("iso_cts", IsoCTS)])
def test_singular_merges_equal_reference(file, rule):
    check(update(rule(skip=())), golden(file, "merged."), **EXACT)
    authors = golden(file, "merged_original_repo.")
    assert set(authors) == {"text_projection"}
    check(update(rule()), authors, **EXACT)


def test_opcm_equals_reference_but_for_one_scale():
    """The reference never merges raw parameters, so the norm that sets its last scale is another one."""
    raw = ("positional_embedding", "text_projection", "logit_scale")
    expected = golden("opcm", "merged.")
    ours = update(OPCM(alpha=0.5))
    theirs = {name: tensor - pool().base[name] for name, tensor in expected.items()}
    names = [name for name in expected if name not in raw]

    def norm(tensors):
        return math.sqrt(sum(tensor.square().sum().item() for tensor in tensors))

    factor = norm(theirs[name] for name in names) / norm(ours[name] for name in names)
    check({name: factor * ours[name] for name in names}, {name: theirs[name] for name in names}, **EXACT)
    # Both scale the whole task vector to the experts' mean norm.
    base, experts = models()
    target = sum(norm(expert[name] - base[name] for name in base) for expert in experts.values()) / 4
    assert norm(ours.values()) == pytest.approx(target, rel=1e-12)
    assert norm(theirs.values()) == pytest.approx(target, rel=1e-9)


@pytest.mark.parametrize(
    ("prefix", "rule", "tolerance"),
    [
        ("mergekit_filterFalse.", ModelStock(), EXACT),
        ("mergekit_filterTrue.", ModelStock(per_row=True), EXACT),
        ("fusion_bench.", ModelStock(agreement="angle"), CONSTANTS),
    ],
)
def test_model_stock_equals_reference_where_experts_agree(prefix, rule, tolerance):
    """Where the mean cosine is negative the reference walks away from the base; ours stays there."""
    expected, found = golden("model_stock", prefix), merged(rule)
    compared = 0
    for name, tensor in expected.items():
        vectors = pool().task_vectors(name)
        shape = vectors.shape
        rows = shape[1] if rule.per_row and len(shape) > 2 else 1
        units = nn.functional.normalize(vectors.reshape(4, rows, -1), dim=-1)
        pairs = torch.einsum("irn,jrn->rij", units, units)[:, *torch.triu_indices(4, 4, 1)]
        agree = pairs.mean(1) > 0 if rule.agreement == "cosine" else pairs.clamp(-1, 1).acos().mean(1) < math.pi / 2
        ours, base = (t.reshape(rows, -1).to(tensor.dtype) for t in (found[name], pool().base[name]))
        torch.testing.assert_close(ours[agree], tensor.reshape(rows, -1)[agree], **tolerance)
        torch.testing.assert_close(ours[~agree], base[~agree], **tolerance)
        compared += int(agree.sum())
    assert compared > 10


@pytest.mark.parametrize("normalise", [False, True])
def test_fisher_merge_equals_reference(normalise):
    expected = golden("fisher_merging", f"normalize_{normalise}.")
    rule = Fisher(normalise=normalise, floor=1e-6)
    sums = {name: torch.zeros_like(tensor) for name, tensor in pool().base.items()}
    weights = {name: torch.zeros_like(tensor) for name, tensor in pool().base.items()}
    for row in range(4):
        information = {name: f.double() for name, f in golden("fisher_weights", f"fisher{row}.").items()}
        information.pop("logit_scale")  # the reference cannot take tensors without dimensions
        add_expert(sums, weights, information, lambda name, row=row: pool().task_vectors(name)[row], rule)
    found = {name: pool().base[name] + sums[name] / weights[name] for name in expected}
    check(found, expected, **(ROUNDED if normalise else EXACT))


@pytest.mark.parametrize("classifier", [0, 1])
def test_fisher_diagonal_is_exact(classifier):
    values = golden("fisher_estimation")
    params = {key.removeprefix("clf0."): v.double() for key, v in values.items() if key.startswith(f"clf{classifier}.")}
    params = {key.removeprefix(f"clf{classifier}."): v for key, v in params.items()}

    def logits(p, x):
        hidden = nn.functional.linear(x, p["fc1.weight"], p["fc1.bias"]).tanh()
        return nn.functional.linear(hidden, p["fc2.weight"], p["fc2.bias"])

    totals = {name: torch.zeros_like(tensor) for name, tensor in params.items()}
    examples = 0
    for information, count in fisher_sums(logits, params, values[f"x{classifier}"].double()):
        examples += count
        for name, tensor in information.items():
            totals[name] += tensor
    assert examples == 12
    expected = golden("fisher_estimation", f"exact_fisher{classifier}.")
    check({name: tensor / examples for name, tensor in totals.items()}, expected, **EXACT)


@pytest.mark.parametrize(("prefix", "off_diagonal"), [("a0.95.", 0.95), ("a1.0.", 1.0), ("bloomberg_a0.9.", 0.9)])
def test_regmean_solution_equals_reference(prefix, off_diagonal):
    grams = {key: tensor.double() for key, tensor in golden("regmean_grams").items()}
    modules = {key.split(".", 1)[1] for key in grams}
    expected = golden("regmean", prefix)
    for module in modules:
        name = f"{module}.weight"
        sides = [
            equations(grams[f"gram{row}.{module}"], pool().task_vectors(name)[row], off_diagonal, 0.0)
            for row in range(4)
        ]
        gram, right = (sum(parts) for parts in zip(*sides, strict=True))
        check({name: pool().base[name] + solve(gram, right)}, {name: expected[name]}, **ROUNDED)
    others = {name: tensor for name, tensor in expected.items() if name.removesuffix(".weight") not in modules}
    if others:
        check(merged(WeightAverage()), others, **ROUNDED)


class GoldenBlock(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.ln, self.fc1, self.fc2 = nn.LayerNorm(48), nn.Linear(48, hidden), nn.Linear(hidden, 48)

    def forward(self, x):
        return x + self.fc2(nn.functional.gelu(self.fc1(self.ln(x))))


class GoldenEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([GoldenBlock(64), GoldenBlock(32), GoldenBlock(16)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


def test_regmean_plus_plus_equals_reference():
    base, experts = models()

    def inside(tensors):
        return {name: tensor for name, tensor in tensors.items() if name.startswith("blocks.")}

    own = ExpertPool.from_state_dicts(inside(base), {name: inside(expert) for name, expert in experts.items()})
    inputs = {name: golden("regmean_plusplus")[f"x{i}"].float().flatten(0, 1) for i, name in enumerate(experts)}
    data = UnlabeledTasks({name: Task(adapt=TensorDataset(x)) for name, x in inputs.items()}, evaluation_batch_size=5)
    encoder = GoldenEncoder().double()
    encoder.register_forward_pre_hook(lambda _, args: (args[0].double(),))  # data sets give single precision
    model = MergedModel(encoder, own, Coefficients(own, "task"), {name: nn.Identity() for name in experts})
    found = merged_state_dict(own, RegMeanPlusPlus(ridge=0.0), model=model, data=data)
    check(found, golden("regmean_plusplus", "merged."), **ROUNDED)
