"""What makes the engine fast must not show in its results: tiles, storages, early contraction, reused memory."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from adamerge import Coefficients, MergedModel
from adamerge.model.encoder import fused
from adamerge.model.merge import PullBack, merge_into, pull_back
from tests.support.pools import GRANULARITIES, passes, random_pool
from tests.support.toy import EXPERTS, ToyEncoder, make_toy, run_engine, squares


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stream_equals_ram_bit_for_bit(tmp_path, granularity, file_dtype):
    ram, ram_gradient = passes(random_pool(tmp_path, file_dtype=file_dtype, storage="ram"), granularity)
    stream, stream_gradient = passes(random_pool(tmp_path, file_dtype=file_dtype, storage="stream"), granularity)
    assert all(torch.equal(ram[name], stream[name]) for name in ram)
    assert torch.equal(ram_gradient, stream_gradient)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_bfloat16_storage_stays_within_its_error(tmp_path, granularity):
    exact, exact_gradient = passes(random_pool(tmp_path, storage="ram"), granularity)
    half, half_gradient = passes(random_pool(tmp_path, storage="ram", dtype=torch.bfloat16), granularity)
    for name in exact:  # 3 task vectors of size up to 6, each rounded to 8 bits and weighted by at most 1
        torch.testing.assert_close(half[name], exact[name], rtol=0, atol=3 * 6 * 2**-8)
    cosine = nn.functional.cosine_similarity(half_gradient.flatten(), exact_gradient.flatten(), dim=0)
    assert cosine > 0.9999


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_passes_ignore_a_lower_matmul_precision(tmp_path, precision):
    pool = random_pool(tmp_path, storage="ram")
    exact, exact_gradient = passes(pool, "row")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        merged, gradient = passes(pool, "row")
    finally:
        torch.set_float32_matmul_precision(before)
    for name in exact:
        torch.testing.assert_close(merged[name], exact[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, exact_gradient, rtol=1e-4, atol=1e-3)  # sums of 50,001 terms


@pytest.mark.parametrize("storage", ["ram", "stream"])
def test_passes_allocate_no_more_than_tiles(tmp_path, storage):
    pool = random_pool(tmp_path, storage=storage)
    passes(pool, "layer")
    index = Coefficients(pool, "layer").index
    values = torch.rand(3, index.size)
    tensors = {name: torch.ones(shape) for name, shape in pool.shapes.items()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        merge_into(tensors, pool, index, values)
        pull_back(pool, index, tensors)
    assert sum(max(0, event.self_cpu_memory_usage) for event in profile.events()) < 4096


def test_repeated_steps_keep_their_memory():
    toy = make_toy()
    pool = toy.pool()
    model = toy.model(pool, Coefficients(pool))
    seen = []
    for _ in range(3):
        run_engine(model, toy.inputs, squares)
        seen.append({name: leaf.data_ptr() for name, leaf in model.weights.leaves.items()})
        assert all(leaf.grad is None for leaf in model.weights.leaves.values())
    assert seen[0] == seen[1] == seen[2]


def test_step_contracts_each_gradient_as_it_arrives(monkeypatch):
    toy = make_toy()
    pool = toy.pool()
    model = toy.model(pool, Coefficients(pool))
    alive = []
    add = PullBack.add

    def spy(self, name, gradient):
        alive.append(sum(leaf.grad is not None for leaf in model.weights.leaves.values()))
        add(self, name, gradient)

    monkeypatch.setattr(PullBack, "add", spy)
    run_engine(model, toy.inputs, squares)
    assert alive == [1] * len(pool.names)


def test_step_two_steps_under_one_autocast_see_the_new_weights():
    toy = make_toy()
    pool = toy.pool()
    model = toy.model(pool, Coefficients(pool))
    points = [torch.full((3, model.coefficients.index.size), value) for value in (0.1, 0.9)]

    def gradient(values):
        result = run_engine(model, toy.inputs, squares, values=values)
        assert result.gradient.dtype == torch.float32
        return result.gradient

    apart = []
    for values in points:
        with torch.autocast("cpu", torch.bfloat16):
            apart.append(gradient(values))
    with torch.autocast("cpu", torch.bfloat16):
        together = [gradient(values) for values in points]
    assert torch.equal(apart[0], together[0])
    assert torch.equal(apart[1], together[1])
    exact = gradient(points[1])
    assert nn.functional.cosine_similarity(exact.flatten(), apart[1].flatten(), dim=0) > 0.999


class Checkpointed(ToyEncoder):
    """The toy encoder, recomputing its blocks in the backward pass."""

    reentrant = False

    def forward(self, images):
        x = self.stem(images).flatten(1)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x @ self.proj * self.scale + self.offset


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("micro_batch", ["auto", 4])
def test_step_activation_checkpointing_gives_the_same_gradient(reentrant, micro_batch):
    toy = make_toy(torch.float64)
    pool = toy.pool()
    encoder = Checkpointed().double()
    encoder.reentrant = reentrant
    results = []
    for network in (toy.encoder, encoder):
        model = MergedModel(network, pool, Coefficients(pool, "row"), toy.heads)
        step = run_engine(model, toy.inputs, squares, micro_batch=micro_batch)
        results.append(step.gradient)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


def test_fused_auto_closes_a_group_before_it_grows_too_large():
    images = {task: torch.empty(n, 3, 224, 224) for task, n in zip("abcd", (1, 16, 16, 40), strict=True)}
    assert fused(images, "auto") == [["a", "b"], ["c"], ["d"]]
    assert fused(images, None) == [["a", "b", "c", "d"]]
    assert fused(images, 32) == [["a", "b"], ["c"], ["d"]]
    assert fused({task: torch.empty(32, 3, 28, 28) for task in EXPERTS}, "auto") == [list(EXPERTS)]


def test_fused_unlike_inputs_stay_apart():
    inputs = {"a": torch.empty(1, 3), "b": torch.empty(1, 4), "c": torch.empty(2, 3), "d": torch.empty(1, 3).double()}
    assert fused(inputs, "auto") == [["a", "c"], ["b"], ["d"]]


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["ram", "stream"])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_passes_on_a_gpu_agree_with_the_cpu(tmp_path, storage, granularity):
    pool = random_pool(tmp_path, storage=storage)
    merged, gradient = passes(pool, granularity)
    on_gpu, gradient_on_gpu = passes(pool.to("cuda"), granularity)
    for name in merged:
        torch.testing.assert_close(on_gpu[name].cpu(), merged[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient_on_gpu.cpu(), gradient, rtol=1e-4, atol=1e-2)
