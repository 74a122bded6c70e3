"""Where and in what form task vectors live must not show in results beyond the rounding that was asked for."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from adamerge import Coefficients, ExpertPool, InputError, merge
from adamerge.model.granularity import Chunk
from adamerge.model.merge import _Merge, merge_into, pull_back
from adamerge.pool.low_rank import Factors, LowRank, rectangles
from adamerge.pool.stacks import Dense, Int8, encode
from adamerge.transforms import Trim
from tests.support.adapters import random_adapter
from tests.support.pools import GRANULARITIES, LORA_SHAPES, SHAPES, lora_files, passes, random_pool
from tests.support.toy import save_files

STORAGES = ["device", "ram", "stream"]


def cosine(first, second) -> float:
    return torch.cosine_similarity(first.flatten().double(), second.flatten().double(), dim=0).item()


def relative_error(found, exact, base) -> float:
    """Norm of the difference of two merges over the norm of what was added to the base."""
    error = sum((found[name] - exact[name]).square().sum().item() for name in exact)
    return (error / sum((exact[name] - base[name]).square().sum().item() for name in exact)) ** 0.5


# int8


def test_encode_bounds_the_error_by_half_a_level_of_each_row():
    rows = torch.randn(4, 9, 50) * torch.logspace(-6, 3, 9).view(9, 1)
    rows[2, 3] = 0
    codes, scales = encode(rows)
    assert codes.dtype == torch.int8
    assert codes.abs().amax(-1).unique().tolist() == [0, 127]
    error = (codes * scales.unsqueeze(-1) - rows).abs().amax(-1)
    assert (error <= rows.abs().amax(-1) / 254 * 1.0001).all()


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "merged_error", "gradient_error"),
    [(torch.float16, 3e-4, 1e-6), (torch.bfloat16, 2.5e-3, 1e-5), (torch.int8, 1e-2, 2e-4)],
    ids=str,
)
def test_narrow_dtypes_stay_within_their_errors(tmp_path, granularity, dtype, merged_error, gradient_error):
    exact, exact_gradient = passes(random_pool(tmp_path, storage="ram"), granularity)
    pool = random_pool(tmp_path, storage="ram", dtype=dtype)
    found, gradient = passes(pool, granularity)
    assert 0 < relative_error(found, exact, pool.base) < merged_error
    assert 1 - cosine(gradient, exact_gradient) < gradient_error


def test_int8_takes_a_quarter_and_leaves_vectors_and_short_rows_alone(tmp_path):
    exact, pool = random_pool(tmp_path, storage="ram"), random_pool(tmp_path, storage="ram", dtype=torch.int8)
    for name in ("m.bias", "m.one", "m.thin"):
        assert torch.equal(pool.task_vectors(name), exact.task_vectors(name))
    assert not torch.equal(pool.task_vectors("m.tall"), exact.task_vectors("m.tall"))
    short = 3 * 4 * sum(torch.Size(SHAPES[name]).numel() for name in ("bias", "one", "thin"))
    assert pool.nbytes - short < 0.29 * (exact.nbytes - short)  # tall: 33 codes and a scale per row
    assert pool.dtype_name == pool.report().dtype == "int8"
    assert pool.report().bytes == pool.nbytes


def test_int8_tiles_that_cut_rows_equal_the_whole(tmp_path):
    pool = random_pool(tmp_path, storage="ram", dtype=torch.int8)
    whole = pool.task_vectors("m.tall").flatten(1)
    for start, stop in ((0, 33), (5, 20), (30, 40), (7, 33 * 4 + 2), (33 * 2, 33 * 5), (0, 9001 * 33)):
        assert torch.equal(pool.tile("m.tall", start, stop), whole[:, start:stop])


def test_int8_load_forms_one_experts_parameter_at_a_time(tmp_path):
    shape = (256, 4096)  # more entries than the tiles that checks read
    base, experts = save_files(
        tmp_path, {"w": torch.zeros(shape)}, {f"e{i}": {"w": torch.randn(shape)} for i in range(8)}
    )
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ExpertPool.from_files(base, experts, storage="ram", dtype=torch.int8)
    stack = 8 * 4 * 256 * 4096
    assert max(event.self_cpu_memory_usage for event in profile.events()) < 0.6 * stack


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_int8_does_not_hide_damaged_experts(tmp_path, value):
    base, experts = save_files(tmp_path, {"w": torch.zeros(3, 40)}, {"a": {"w": torch.full((3, 40), value)}})
    with pytest.raises(InputError, match="NaN or infinite"):
        ExpertPool.from_files(base, experts, storage="ram", dtype=torch.int8)


# On a device. "meta" holds no values, but says where everything lies and that copies go the right way.


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("storage", [*STORAGES, "auto"])
def test_pool_follows_to_a_device_as_its_storage_says(tmp_path, storage, dtype):
    pool = random_pool(tmp_path, storage=storage, dtype=dtype)
    held = pool.nbytes
    before = {"stream": "stream"}.get(storage, "ram")
    assert pool.storage == before
    pool.to("meta")
    assert pool.storage == {"ram": "ram", "stream": "stream"}.get(storage, "device")
    for name in pool.names:
        assert pool.task_vectors(name).device.type == pool.base[name].device.type == "meta"
    on_host = {name for name, stack in pool._task_vectors.stacks.items() if _device(stack) == "cpu"}
    assert on_host == (set() if pool.storage == "device" else set(pool.names))
    assert pool.storage == "device" or pool.nbytes == held


def _device(stack) -> str:
    first = stack.data if isinstance(stack, Dense) else stack.codes if isinstance(stack, Int8) else stack.experts[0]
    return first.device.type


def test_auto_leaves_on_the_host_what_does_not_fit_the_device(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("adamerge.pool.task_vectors.free_device_memory", lambda device: 1000.0)
    with caplog.at_level("DEBUG", logger="adamerge"):
        pool = random_pool(tmp_path, storage="auto")
        assert pool.to("meta").storage == "ram"
        monkeypatch.setattr("adamerge.pool.task_vectors.free_device_memory", lambda device: 1e12)
        assert pool.to("meta").storage == "device"
    assert ["3 experts: ram" in r.message for r in caplog.records] == [True, False]
    assert "device" in caplog.records[-1].message


@pytest.mark.parametrize("storage", ["auto", "device"])
def test_streamed_start_is_formed_on_the_device(tmp_path, monkeypatch, storage):
    monkeypatch.setattr("adamerge.pool.task_vectors.free_memory", lambda: 8)
    pool = random_pool(tmp_path, storage=storage, dtype=torch.int8)
    assert (pool.storage, pool.nbytes) == ("stream", 0)
    pool.to("meta")
    assert pool.storage == "device"
    assert pool.nbytes > 0
    assert pool.dtype_name == "int8"


def test_transformed_pool_in_memory_moves_to_the_device(toy):
    pool = toy.pool(transform=Trim(0.5))
    assert pool.storage == "ram"
    assert pool.to("meta").storage == "device"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("storage", STORAGES)
def test_storages_on_a_gpu_agree_with_the_cpu(tmp_path, storage, dtype):
    pool = random_pool(tmp_path, storage=storage, dtype=dtype)
    merged, gradient = passes(pool, "row")
    pool.to("cuda")
    assert pool.storage == storage
    free = torch.cuda.memory_allocated()
    if storage != "device":
        assert all(_device(stack) == "cpu" for stack in pool._task_vectors.stacks.values())
        assert storage == "stream" or all(
            (s.data if isinstance(s, Dense) else s.codes).is_pinned() for s in pool._task_vectors.stacks.values()
        )
    on_gpu, gradient_on_gpu = passes(pool, "row")
    assert torch.cuda.memory_allocated() - free < 2**28
    for name in merged:
        torch.testing.assert_close(on_gpu[name].cpu(), merged[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient_on_gpu.cpu(), gradient, rtol=1e-4, atol=1e-2)


# Factored


def test_rectangles_cover_a_run_once_in_order():
    run = torch.arange(100)
    for start, stop in ((0, 7), (3, 5), (6, 8), (0, 100), (13, 99), (14, 28), (5, 21)):
        pieces = list(rectangles(start, stop, 7, run[start:stop]))
        assert len(pieces) <= 3
        assert torch.cat([piece.flatten() for _, _, piece in pieces]).tolist() == list(range(start, stop))
        for rows, columns, piece in pieces:
            assert torch.equal(piece, run[:98].view(-1, 7)[rows, columns]) or stop > 98


def test_expand_gives_every_entry_the_same_bits_in_any_tile():
    product = LowRank(torch.randn(300, 5), torch.randn(5, 1000))
    whole = product.expand(0, 300_000, torch.empty(300_000))
    torch.testing.assert_close(whole.view(300, 1000), product.up @ product.down, rtol=1e-5, atol=1e-5)
    for start, stop in ((0, 17), (999, 1001), (131_000, 132_500), (5, 299_999)):
        assert torch.equal(product.expand(start, stop, torch.empty(stop - start)), whole[start:stop])


def dense_twin(folder, base, experts):
    """The same pool of full checkpoints, the adapters merged in float64."""
    pool = ExpertPool.from_files(base, experts)
    state = load_file(base)
    full = {name: state | pool.expert_parameters(name) for name in experts}
    (folder / "dense").mkdir()
    return ExpertPool.from_files(*save_files(folder / "dense", state, full))


@pytest.mark.parametrize(
    "granularity", [*GRANULARITIES, Chunk(3), Chunk(5), Chunk({"a.weight": 0, "b.weight": 12})], ids=str
)
def test_factored_equals_dense_to_rounding(tmp_path, granularity):
    base, experts = lora_files(tmp_path)
    pool, dense = ExpertPool.from_files(base, experts), dense_twin(tmp_path, base, experts)
    assert set(pool.names) == set(dense.names) == {f"{name}.weight" for name in LORA_SHAPES}
    assert all(pool.factors(name) and dense.factors(name) is None for name in pool.names)
    results = []
    for each in (pool, dense):
        coefficients = Coefficients(each, granularity, init=0.1)
        labels = [(label, range(first, first + n)) for label, (first, n) in sorted(coefficients.index.labels.items())]
        values = torch.zeros(3, coefficients.index.size, dtype=torch.float64)
        generator = torch.Generator().manual_seed(1)
        for _, groups in labels:
            values[:, list(groups)] = torch.randn(3, len(groups), generator=generator, dtype=torch.float64)
        gradients = {
            n: torch.randn(each.shapes[n], generator=generator, dtype=torch.float64) for n in sorted(each.names)
        }
        out = {name: torch.empty(shape, dtype=torch.float64) for name, shape in each.shapes.items()}
        merge_into(out, each, coefficients.index, values)
        gradient = pull_back(each, coefficients.index, gradients)
        results.append((out, {label: gradient[:, list(groups)] for label, groups in labels}))
    for found, exact in zip(results[0], results[1], strict=True):
        assert set(found) == set(exact)
        for name in exact:
            torch.testing.assert_close(found[name], exact[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("granularity", ["task", "row", "column", Chunk(5)], ids=str)
def test_factored_merge_is_differentiable(tmp_path, granularity):
    pool = ExpertPool.from_files(*lora_files(tmp_path))
    coefficients = Coefficients(pool, granularity, init=0.2).double()

    def total(raw):
        merged = _Merge.apply(raw, pool, coefficients.index)
        return torch.cat([tensor.flatten() for tensor in merged])

    raw = torch.rand(3, coefficients.index.size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(total, (raw,), fast_mode=True)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_factored_passes_ignore_a_lower_matmul_precision(tmp_path, precision):
    pool = ExpertPool.from_files(*lora_files(tmp_path, torch.float32))
    exact, exact_gradient = passes(pool, "row")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        merged, gradient = passes(pool, "row")
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(merged[name], exact[name]) for name in exact)
    assert torch.equal(gradient, exact_gradient)


@pytest.mark.parametrize("storage", STORAGES)
def test_factored_pool_holds_factors_and_no_more_in_any_storage(tmp_path, storage):
    shapes = {"w": (256, 512)}
    save_file({"w.weight": torch.zeros(256, 512)}, tmp_path / "base.safetensors")
    experts = {f"e{i}": random_adapter(tmp_path / f"e{i}", shapes, 4, i) for i in range(8)}
    pool = ExpertPool.from_files(tmp_path / "base.safetensors", experts, storage=storage)
    factors = 8 * 4 * (256 + 512) * 4
    assert factors <= pool.nbytes < 1.05 * factors + 1024
    coefficients = Coefficients(pool, "row")
    tensors = {"w.weight": torch.ones(256, 512)}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        merge_into(tensors, pool, coefficients.index, coefficients().detach())
        pull_back(pool, coefficients.index, tensors)
    assert max(event.self_cpu_memory_usage for event in profile.events()) < 4 * 256 * 512 / 2


def test_factored_export_has_the_same_bytes_in_any_storage(tmp_path):
    base, experts = lora_files(tmp_path, torch.float32)
    exports = []
    for storage in STORAGES:
        pool = ExpertPool.from_files(base, experts, storage=storage)
        exports.append(merge(pool, Coefficients(pool, Chunk(5), init=0.3), detach=True))
    assert all(torch.equal(exports[0][key], other[key]) for other in exports for key in exports[0])


@pytest.mark.parametrize("granularity", ["layer", "row", "column", Chunk(5)], ids=str)
def test_pool_of_adapters_and_checkpoints_is_dense_and_the_same_in_any_storage(tmp_path, granularity):
    base, experts = lora_files(tmp_path, torch.float32)
    state = load_file(base)
    save_file({key: t + 0.1 * torch.randn_like(t) for key, t in state.items()}, tmp_path / "full.safetensors")
    experts["full"] = tmp_path / "full.safetensors"
    ram, stream = (ExpertPool.from_files(base, experts, storage=storage) for storage in ("ram", "stream"))
    assert all(ram.factors(name) is None for name in ram.names)
    assert set(ram.names) == set(state)
    (merged, gradient), (streamed, streamed_gradient) = passes(ram, granularity), passes(stream, granularity)
    assert all(torch.equal(merged[name], streamed[name]) for name in merged)
    assert torch.equal(gradient, streamed_gradient)
    own = ram.expert_parameters("e1")
    for name in ram.names:
        torch.testing.assert_close(ram.task_vectors(name)[1], own[name] - ram.base[name], rtol=1e-4, atol=1e-5)


def test_transform_of_a_low_rank_pool_sees_the_products(tmp_path):
    base, experts = lora_files(tmp_path)
    pool, raw = ExpertPool.from_files(base, experts, transform=Trim(0.5)), ExpertPool.from_files(base, experts)
    for name in pool.names:
        assert pool.factors(name) is None
        torch.testing.assert_close(
            pool.task_vectors(name), Trim(0.5)(name, raw.task_vectors(name)), rtol=1e-12, atol=1e-12
        )


def test_factors_give_back_the_experts():
    experts = [LowRank(torch.randn(4, r), torch.randn(r, 3)) for r in (2, 0, 1)]
    factors = Factors(experts)
    assert factors.owner.tolist() == [0, 0, 2]
    for mine, own in zip(factors.experts, experts, strict=True):
        assert torch.equal(mine.up, own.up)
        assert torch.equal(mine.down, own.down)


def test_factored_pool_moves_to_a_device(tmp_path):
    pool = ExpertPool.from_files(*lora_files(tmp_path), storage="stream").to("meta")
    assert pool.task_vectors("a.weight").device.type == pool.factors("a.weight").up.device.type == "meta"
