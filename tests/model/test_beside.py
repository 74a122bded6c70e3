"""Adapters beside the base: the merged engine's outputs and gradients, without its weights."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from adamerge import Coefficients, ExpertPool, InputError, MergedModel
from adamerge.model.encoder import EncoderOptions
from adamerge.model.granularity import Chunk
from adamerge.model.quantized import PACKAGES, quantized
from tests.support.adapters import write_adapter

GROUPS = ["task", "block", "layer", "row", "column", "rank"]


class Small(nn.Module):
    """Embedding, convolution, attention with packed projections, linear layers, a norm."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, 6, padding_idx=0)
        self.mix = nn.Conv1d(6, 6, 3, padding=1, padding_mode="circular")
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.out = nn.Linear(6, 4, bias=False)

    def forward(self, ids):
        x = self.mix(self.words(ids).transpose(1, 2)).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        for block in self.blocks:
            x = x + functional.gelu(block(self.norm(x)))
        return self.out(x.mean(1))


class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, stride=2)
        self.grouped = nn.Conv2d(5, 5, 1, groups=5)
        self.out = nn.Linear(5, 4)

    def forward(self, x):
        return self.out(self.grouped(self.stem(x).relu()).mean((2, 3)))


def pool_of(network, folder, targets, dense=(), ranks=(2, 3)):
    """Return a pool of adapters of modules of a network, in float64; some parameters come whole in one of them."""
    torch.manual_seed(1)
    base = {name: tensor.double().contiguous() for name, tensor in network.state_dict().items()}
    save_file(base, folder / "base.safetensors")
    experts = {}
    for seed, rank in enumerate(ranks):
        tensors = {}
        for name in targets:
            module = network.get_submodule(name)
            (rows, *rest) = module.weight.shape
            if isinstance(module, nn.Embedding):
                tensors[f"{name}.lora_embedding_A"] = torch.randn(rank, rows)
                tensors[f"{name}.lora_embedding_B"] = torch.randn(*rest, rank)
            else:
                tensors[f"{name}.lora_A.weight"] = torch.randn(rank, *rest)
                tensors[f"{name}.lora_B.weight"] = torch.randn(rows, rank, *[1] * (len(rest) - 1))
        whole = {
            f"{name}.{key}": torch.randn_like(p)
            for name in dense
            for key, p in network.get_submodule(name).named_parameters()
        }
        experts[f"task{seed}"] = write_adapter(
            folder / f"task{seed}", {**tensors, **whole}, r=rank, lora_alpha=rank, modules_to_save=list(dense) or None
        )
    return ExpertPool.from_files(folder / "base.safetensors", experts)


def step(network, pool, groups, batches, engine, **options):
    """Return outputs and gradient of two groups of a step."""
    coefficients = Coefficients(pool, groups)
    torch.manual_seed(2)
    values = torch.randn_like(coefficients.raw)
    heads = {task: nn.Identity() for task in batches}
    model = MergedModel(network, pool, coefficients, heads, options=EncoderOptions(engine=engine, **options))
    outputs = {}
    with model.merged(values, micro_batch=2) as merged:
        for inputs in merged.groups(batches):
            found = merged(inputs)
            merged.backward(sum((o.logits**2).sum() for o in found.values()))
            outputs |= {task: output.logits.detach() for task, output in found.items()}
    return outputs, merged.gradient


def agree(network, pool, groups, batches, **options):
    network.double()
    expected, gradient = step(network, pool, groups, batches, "merged")
    found, other = step(network, pool, groups, batches, "beside", **options)
    for task in batches:
        torch.testing.assert_close(found[task], expected[task], rtol=1e-10, atol=1e-10)
    assert gradient.abs().max() > 1
    torch.testing.assert_close(other, gradient, rtol=1e-10, atol=1e-10 * float(gradient.abs().max()))


@pytest.fixture
def ids():
    return {task: torch.randint(0, 7, (2, 5)) for task in ("task0", "task1")}


TARGETS = ["words", "mix", "blocks.0", "out"]


@pytest.mark.parametrize("groups", GROUPS)
def test_step_beside_the_base_is_the_step_on_merged_weights(tmp_path, ids, groups):
    network = Small()
    agree(network, pool_of(network, tmp_path, TARGETS, dense=["norm"]), groups, ids)


@pytest.mark.parametrize("groups", GROUPS)
def test_images_go_through_convolutions_beside(tmp_path, groups):
    network = Pictures()
    pool = pool_of(network, tmp_path, ["stem", "out"])
    agree(network, pool, groups, {task: torch.randn(2, 3, 9, 8, dtype=torch.float64) for task in ("task0", "task1")})


def test_attention_with_packed_projections_merges_densely(tmp_path, ids):
    network = Small()
    agree(network, pool_of(network, tmp_path, ["blocks.1", "attention.out_proj"]), "row", ids)


def test_recomputed_blocks_give_the_same(tmp_path, ids):
    network = Small()
    agree(network, pool_of(network, tmp_path, TARGETS), "row", ids, checkpoint=True)


def test_groups_of_rows_may_be_uneven(tmp_path, ids):
    network = Small()
    agree(
        network,
        pool_of(network, tmp_path, ["blocks.0", "blocks.1"]),
        Chunk({"blocks.0.weight": 3, "blocks.1.weight": 2}),
        ids,
    )


def test_experts_answer_with_their_adapter_alone(tmp_path, ids):
    network = Small()
    pool = pool_of(network, tmp_path, TARGETS, dense=["norm"])
    heads = {task: nn.Identity() for task in ids}
    merged, beside = (
        MergedModel(network.double(), pool, Coefficients(pool), heads, options=EncoderOptions(engine=engine))
        for engine in ("merged", "beside")
    )
    for expert in ids:
        (expected,), (found,) = (
            list(model.expert_outputs(expert, list(ids.items())[:1])) for model in (merged, beside)
        )
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-10, atol=1e-10)
    assert not torch.equal(expected.logits, next(iter(beside.expert_outputs("task0", ids.items()))).logits)


def test_teacher_in_the_midst_of_a_step_is_the_raw_expert(tmp_path, ids):
    network = Small()
    pool = pool_of(network, tmp_path, TARGETS, dense=["norm"])
    answers = {}
    for engine in ("merged", "beside"):
        model = MergedModel(
            network.double(), pool, Coefficients(pool), dict.fromkeys(ids, nn.Identity()),
            options=EncoderOptions(engine=engine),
        )  # fmt: skip
        with model.merged(model.coefficients().detach()) as merged:
            first = merged.forward(ids["task0"], "task0").logits
            asked = model.teacher("task0", ids["task0"], torch.arange(2)).logits
            base = model.outputs(ids["task0"], "task0", model.base_parameters()).logits
            again = merged.forward(ids["task0"], "task0").logits
            answers[engine] = torch.stack([first, asked, base, again])
    torch.testing.assert_close(answers["beside"], answers["merged"], rtol=1e-10, atol=1e-10)
    assert torch.equal(answers["beside"][0], answers["beside"][3])


def test_layer_that_takes_its_members_weights_by_itself_merges_densely(tmp_path):
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0, batch_first=True)
    network = nn.Sequential(nn.TransformerEncoder(layer, 1, enable_nested_tensor=True), nn.Flatten())
    pool = pool_of(network, tmp_path, ["0.layers.0.linear1"])
    inputs = {"task0": torch.randn(2, 3, 6, dtype=torch.float64)}
    with pytest.raises(InputError, match=r"beside needs weights of Linear"):
        step(network.double(), pool, "row", inputs, "beside")
    assert torch.equal(step(network, pool, "row", inputs, "auto")[1], step(network, pool, "row", inputs, "merged")[1])


def test_step_makes_nothing_of_a_weights_shape(tmp_path):
    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in kept:
                    made.add(tuple(tensor.shape))
            return result

    network = nn.Sequential(nn.Linear(50, 60, bias=False), nn.ReLU(), nn.Linear(60, 70, bias=False))
    pool = pool_of(network, tmp_path, ["0", "2"])
    network.double()
    kept, made = {tensor.untyped_storage().data_ptr() for tensor in pool.base.values()}, set()
    with Shapes():
        step(network, pool, "layer", {"task0": torch.randn(2, 50, dtype=torch.float64)}, "beside")
    assert {(2, 60), (2, 70)} <= made
    assert not made & {(60, 50), (50, 60), (70, 60), (60, 70)}


def test_what_beside_cannot_do_is_refused_by_name(tmp_path, ids):
    class Bypass(Small):
        def forward(self, ids):
            return functional.linear(self.words(ids).mean(1), self.out.weight)

    network = Small()
    pool = pool_of(network, tmp_path, TARGETS)
    with pytest.raises(InputError, match=r"divides rows of .*blocks\.0\.weight.*Set encoder\.engine=merged"):
        step(network, pool, Chunk(5), ids, "beside")
    state = network.state_dict()
    whole = ExpertPool.from_state_dicts(state, {"task0": {name: tensor + 1 for name, tensor in state.items()}})
    expected = step(network, whole, "task", ids, "merged")[1]
    assert torch.equal(step(network, whole, "task", ids, "auto")[1], expected)
    with pytest.raises(InputError, match=r"beside needs weights of Linear"):
        step(network, whole, "task", ids, "beside")
    with pytest.raises(InputError, match=r"cannot follow 'out\.weight'"):
        step(Bypass().double(), pool, "task", ids, "beside")

    class Joined(Small):
        def forward(self, ids):
            return functional.linear(self.words(ids).mean(1), torch.cat([self.out.weight, self.blocks[0].weight]))

    with pytest.raises(InputError, match=r"cannot follow 'out\.weight'"):
        step(Joined().double(), pool, "task", ids, "beside")
    with pytest.raises(InputError, match=r"compiled code does not follow beside"):
        EncoderOptions(engine="beside", compile=True)
    with pytest.raises(InputError, match=r"encoder\.engine"):
        EncoderOptions(engine="besides")


def test_half_precision_runs_beside_as_on_merged_weights(tmp_path, ids):
    network, folder = Small(), tmp_path
    pool_of(network, folder, TARGETS)
    base = {name: tensor.float() for name, tensor in network.state_dict().items()}
    save_file(base, folder / "base.safetensors")
    pool = ExpertPool.from_files(folder / "base.safetensors", {task: folder / task for task in ids})
    exact = step(network.float(), pool, "row", ids, "merged")[1]
    with torch.autocast("cpu", torch.bfloat16):
        merged, beside = (step(network, pool, "row", ids, engine)[1] for engine in ("merged", "beside"))
    errors = [float((gradient - exact).norm() / exact.norm()) for gradient in (merged, beside)]
    assert errors[1] < 2 * errors[0] < 0.2


@pytest.mark.parametrize(("dtype", "bits", "error"), [("int8", 8, 0.01), ("nf4", 4, 0.2)])
def test_quantised_base_learns_as_its_dequantised_copy(tmp_path, ids, dtype, bits, error):
    pytest.importorskip(PACKAGES[dtype])
    network, folder = Small(), tmp_path
    pool_of(network, folder, TARGETS)
    rounded = {name: tensor.float() for name, tensor in network.state_dict().items()}
    save_file(rounded, folder / "base.safetensors")
    pool = ExpertPool.from_files(folder / "base.safetensors", {task: folder / task for task in ids})
    for name in ("blocks.0.weight", "out.weight"):  # the linear ones of what has an update beside it
        held = quantized(rounded[name], dtype)
        assert (held.shape, held.dtype) == (rounded[name].shape, torch.float32)
        assert held.qdata.nbytes == rounded[name].numel() * bits // 8
        assert 0 < (held.dequantize() - rounded[name]).abs().max() < rounded[name].abs().max() * error
        rounded[name] = held.dequantize()
    save_file(rounded, folder / "dequantised.safetensors")
    copy = ExpertPool.from_files(folder / "dequantised.safetensors", {task: folder / task for task in ids})
    for groups in ("layer", "row"):
        expected, gradient = step(network.float(), copy, groups, ids, "beside")
        found, other = step(network, pool, groups, ids, "beside", base_dtype=dtype)
        for task in ids:
            torch.testing.assert_close(found[task], expected[task], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
        assert not torch.allclose(step(network, pool, groups, ids, "beside")[1], gradient, rtol=1e-4)
    with pytest.raises(InputError, match=rf"encoder\.base_dtype: {dtype} .*encoder\.engine=beside"):
        EncoderOptions(base_dtype=dtype)


def test_nf4_weight_is_its_dequantised_values_to_all_but_linear_layers():
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    weight, bias, x = (
        torch.randn(5, 7),
        torch.randn(5),
        torch.randn(3, 7, requires_grad=True),
    )  # 35: half a byte is left
    held = quantized(weight, "nf4")
    values = held.dequantize()
    assert torch.equal(held * 1, values)
    assert type(held * 1) is torch.Tensor
    for autocast, tolerance in ((False, 1e-6), (True, 0.02)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found, expected = (functional.linear(x, matrix, bias) for matrix in (held, values))
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        gradients = [torch.autograd.grad(y.float().square().sum(), x)[0] for y in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=tolerance, atol=20 * tolerance)
