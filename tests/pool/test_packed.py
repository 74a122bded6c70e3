"""Packed task vectors: written in tiles, read through the map, and only for the pool they belong to."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adamerge import Coefficients, ExpertPool, InputError, merge
from adamerge.model.coefficients import load_coefficients, save_coefficients
from adamerge.pool.pack import write_packed
from adamerge.pool.packed import METADATA, SCALES, PackedFile
from adamerge.transforms import Trim
from tests.support.pools import GRANULARITIES, SHAPES, lora_files, passes, random_pool
from tests.support.toy import EXPERTS, save_files


def packed_twin(folder, dtype=None, **options) -> ExpertPool:
    """The random pool, read from its packed file."""
    write_packed(random_pool(folder), folder / "packed.safetensors", dtype)
    return random_pool(folder, task_vectors=folder / "packed.safetensors", **options)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_packed_float32_equals_ram_bit_for_bit(tmp_path, granularity):
    ram, ram_gradient = passes(random_pool(tmp_path, storage="ram"), granularity)
    pool = packed_twin(tmp_path)
    assert (pool.storage, pool.report().storage, pool.nbytes) == ("packed", "packed", 0)
    packed, packed_gradient = passes(pool, granularity)
    assert all(torch.equal(ram[name], packed[name]) for name in ram)
    assert torch.equal(ram_gradient, packed_gradient)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("storage", ["auto", "ram"])
def test_packed_narrow_dtypes_equal_those_in_memory(tmp_path, dtype, storage):
    ram, ram_gradient = passes(random_pool(tmp_path, storage="ram", dtype=dtype), "row")
    pool = packed_twin(tmp_path, dtype, storage=storage)
    assert pool.storage == {"auto": "packed", "ram": "ram"}[storage]
    assert pool.dtype_name == str(dtype).removeprefix("torch.")
    packed, packed_gradient = passes(pool, "row")
    assert all(torch.equal(ram[name], packed[name]) for name in ram)
    assert torch.equal(ram_gradient, packed_gradient)


def test_float32_tiles_are_views_of_the_map_where_rows_are_aligned(tmp_path):
    base, experts = save_files(
        tmp_path,
        {"even": torch.zeros(8, 32), "odd": torch.zeros(5, 3)},
        {name: {"even": torch.randn(8, 32), "odd": torch.randn(5, 3)} for name in "abc"},
    )
    path = write_packed(ExpertPool.from_files(base, experts), tmp_path / "packed.safetensors")
    pool = ExpertPool.from_files(base, experts, task_vectors=path)
    first, second = pool.tile("even", 0, 100), pool.tile("even", 0, 100)
    assert first.data_ptr() == second.data_ptr()
    assert pool.tile("odd", 0, 15).data_ptr() != pool.tile("odd", 0, 15, reuse=True).data_ptr()


def test_file_is_plain_safetensors_of_stacks(tmp_path):
    pool = random_pool(tmp_path)
    path = write_packed(pool, tmp_path / "deep" / "packed.safetensors", torch.int8)
    tensors = load_file(path)
    assert set(tensors) == set(pool.names) | {f"m.{name}{SCALES}" for name in ("wide", "tall", "conv")}
    assert tensors["m.conv"].dtype == torch.int8
    assert tensors["m.conv" + SCALES].shape == (3, 5)
    assert torch.equal(tensors["m.bias"], pool.task_vectors("m.bias"))
    for name in pool.names:
        assert tensors[name].shape == (3, *pool.shapes[name])
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()[METADATA])
    assert facts["hashes"] == pool.hashes()
    assert facts["experts"] == list(pool.expert_names)
    assert [p.name for p in path.parent.iterdir()] == ["packed.safetensors"]


def test_writing_holds_tiles_not_stacks(tmp_path):
    pool = random_pool(tmp_path, experts=8, storage="stream")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        write_packed(pool, tmp_path / "packed.safetensors", torch.bfloat16)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    stack = 8 * 4 * torch.Size(SHAPES["tall"]).numel()
    assert largest < 0.6 * stack


def test_failed_write_leaves_the_earlier_file(tmp_path):
    base, experts = save_files(tmp_path, {"w": torch.zeros(2, 3)}, {"a": {"w": torch.full((2, 3), 1e6)}})
    pool, path = ExpertPool.from_files(base, experts), tmp_path / "packed.safetensors"
    before = write_packed(pool, path).read_bytes()
    with pytest.raises(InputError, match=r"float16 overflows in the task vectors of 'w'; use bfloat16"):
        write_packed(pool, path, torch.float16)
    assert path.read_bytes() == before
    with pytest.raises(InputError, match=r"dtype: expected float32, bfloat16, float16 or int8, found torch\.int16"):
        write_packed(pool, path, torch.int16)


def test_transformed_pool_is_streamed_from_its_file_and_says_so(tmp_path, toy):
    base, experts = save_files(tmp_path, toy.base, toy.experts)
    trimmed = ExpertPool.from_files(base, experts, transform=Trim(0.5))
    path = write_packed(trimmed, tmp_path / "packed.safetensors")
    pool = ExpertPool.from_files(base, experts, task_vectors=path)
    assert pool.report().transform == pool.packed.transform == {"name": "trim", "density": 0.5}
    for name in pool.names:
        assert torch.equal(pool.task_vectors(name), trimmed.task_vectors(name))
    own = pool.expert_parameters("green")
    assert all(torch.equal(own[name], toy.experts["green"][name]) for name in own)
    coefficients = Coefficients(trimmed, "layer", init=0.2)
    save_coefficients(coefficients, tmp_path / "coefficients.json", trimmed)
    replayed = load_coefficients(tmp_path / "coefficients.json", pool)
    first, second = merge(trimmed, coefficients, detach=True), merge(pool, replayed, detach=True)
    assert all(torch.equal(first[key], second[key]) for key in first)
    with pytest.raises(InputError, match=r"task_vectors: .*expected no transform, found Trim"):
        ExpertPool.from_files(base, experts, task_vectors=path, transform=Trim(0.5))


def test_low_rank_pool_is_written_in_full(tmp_path):
    base, experts = lora_files(tmp_path)
    pool = ExpertPool.from_files(base, experts)
    packed = ExpertPool.from_files(base, experts, task_vectors=write_packed(pool, tmp_path / "packed.safetensors"))
    assert set(packed.names) == set(pool.names)
    assert set(packed.fixed) == set(pool.fixed)
    for name in pool.names:
        torch.testing.assert_close(packed.task_vectors(name), pool.task_vectors(name), rtol=1e-12, atol=1e-12)


def test_narrower_pool_reads_a_wider_file_and_not_the_other_way(tmp_path, toy):
    base, experts = save_files(tmp_path, toy.base, toy.experts)
    wide = write_packed(ExpertPool.from_files(base, experts), tmp_path / "wide.safetensors")
    assert "proj" not in ExpertPool.from_files(base, experts, exclude=["proj"], task_vectors=wide).names
    narrow = ExpertPool.from_files(base, experts, exclude=["proj"])
    with pytest.raises(InputError, match=r"lacks 1 parameters that the pool merges: 'proj'.*Pack the pool again"):
        ExpertPool.from_files(base, experts, task_vectors=write_packed(narrow, tmp_path / "narrow.safetensors"))


def test_file_of_another_pool_is_refused(tmp_path, toy):
    base, experts = save_files(tmp_path, toy.base, toy.experts)
    path = write_packed(ExpertPool.from_files(base, experts), tmp_path / "packed.safetensors")
    order = {name: experts[name] for name in reversed(EXPERTS)}
    with pytest.raises(InputError, match=r"made for the experts 'red', 'green', 'blue', the pool has 'blue'"):
        ExpertPool.from_files(base, order, task_vectors=path)
    with pytest.raises(InputError, match=r"pool\.dtype: .*packed\.safetensors holds torch\.float32, found torch\.int8"):
        ExpertPool.from_files(base, experts, task_vectors=path, dtype=torch.int8)
    changed = {key: tensor + 1 if key == "proj" else tensor for key, tensor in toy.experts["green"].items()}
    save_file(changed, experts["green"])
    with pytest.raises(InputError, match=r"made from other files: the content of 'green' differs"):
        ExpertPool.from_files(base, experts, task_vectors=path)


def test_file_of_another_shape_is_refused(tmp_path):
    base, experts = save_files(tmp_path, {"w": torch.zeros(2, 3)}, {"a": {"w": torch.ones(2, 3)}})
    path = write_packed(ExpertPool.from_files(base, experts), tmp_path / "packed.safetensors")
    base, experts = save_files(tmp_path, {"w": torch.zeros(3, 2)}, {"a": {"w": torch.ones(3, 2)}})
    with pytest.raises(InputError, match=r"'w': expected \(1, 3, 2\), found \(1, 2, 3\)"):
        ExpertPool.from_files(base, experts, task_vectors=path)


def test_other_keys_of_the_same_files_are_refused(tmp_path):
    base, experts = save_files(
        tmp_path,
        {"a.w": torch.zeros(2), "b.w": torch.zeros(2)},
        {"e": {"a.w": torch.ones(2), "b.w": torch.full((2,), 2.0)}},
    )
    path = write_packed(ExpertPool.from_files(base, experts, key_map="a."), tmp_path / "packed.safetensors")
    ExpertPool.from_files(base, experts, key_map="a.", task_vectors=path)
    with pytest.raises(InputError, match=r"made from other keys of the same files"):
        ExpertPool.from_files(base, experts, key_map="b.", task_vectors=path)


def test_other_files_are_refused(tmp_path):
    base, _ = save_files(tmp_path, {"w": torch.zeros(2)}, {"a": {"w": torch.ones(2)}})
    with pytest.raises(InputError, match=r"task_vectors: .*not a file of packed task vectors.*adamerge transform"):
        PackedFile(base)
    torch.save({"w": torch.zeros(2)}, tmp_path / "file.pt")
    with pytest.raises(InputError, match="not a file of packed task vectors"):
        PackedFile(tmp_path / "file.pt")
    with pytest.raises(FileNotFoundError, match="no such file"):
        PackedFile(tmp_path / "absent.safetensors")
    facts = {"format": 2, "experts": [], "hashes": {}, "transform": None, "dtype": "float32", "unchanged": []}
    save_file({"w": torch.zeros(1, 2)}, tmp_path / "new.safetensors", {METADATA: json.dumps(facts)})
    with pytest.raises(InputError, match="format 2 is not 1; update adamerge"):
        PackedFile(tmp_path / "new.safetensors")


def test_dtype_that_no_task_vectors_have_is_refused(tmp_path):
    facts = {"format": 1, "experts": ["a"], "hashes": {}, "transform": None, "dtype": "load", "unchanged": []}
    save_file({"w": torch.zeros(1, 2)}, tmp_path / "odd.safetensors", {METADATA: json.dumps(facts)})
    with pytest.raises(InputError, match=r"odd\.safetensors: expected one of float32, .* as dtype, found 'load'"):
        PackedFile(tmp_path / "odd.safetensors")


def test_packed_pool_moves_to_a_device_or_stays_mapped(tmp_path):
    pool = packed_twin(tmp_path, storage="stream").to("meta")
    assert (pool.storage, pool.nbytes) == ("packed", 0)
    assert pool.task_vectors("m.tall").device.type == "meta"
    pool = packed_twin(tmp_path, storage="device").to("meta")
    assert pool.storage == "device"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.int8], ids=str)
@pytest.mark.parametrize("storage", ["device", "ram", "stream"])
def test_packed_pool_on_a_gpu_agrees_with_the_cpu(tmp_path, storage, dtype):
    pool = packed_twin(tmp_path, dtype, storage=storage)
    merged, gradient = passes(pool, "row")
    on_gpu, gradient_on_gpu = passes(pool.to("cuda"), "row")
    for name in merged:
        torch.testing.assert_close(on_gpu[name].cpu(), merged[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient_on_gpu.cpu(), gradient, rtol=1e-4, atol=1e-2)
