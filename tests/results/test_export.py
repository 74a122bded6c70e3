"""The files of an export: content, names, dtypes, metadata; atomic; the same bytes each time."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from adamerge import Coefficients, ExpertPool, InputError, MergedModel, load_state_dict, merge
from adamerge.callbacks import ExportMergedWeights
from adamerge.model.batch_norm import BatchNormPolicy
from adamerge.model.coefficients import load_coefficients
from adamerge.results.export import export, load_heads, save_heads, versions
from adamerge.system import files
from tests.support.toy import EXPERTS, ToyEncoder, save_files


def file_pool(toy, folder, prefix="", **options) -> ExpertPool:
    folder.mkdir(exist_ok=True)
    base, experts = save_files(folder, toy.base, toy.experts, prefix)
    return ExpertPool.from_files(base, experts, key_map=prefix or None, **options)


def made(pool, granularity="layer") -> Coefficients:
    """Coefficients with a different value everywhere."""
    coefficients = Coefficients(pool, granularity, constraint="none")
    coefficients.assign(torch.rand(coefficients.raw.shape, generator=torch.Generator().manual_seed(1)))
    return coefficients


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def leftovers(folder):
    return [path.name for path in folder.rglob("*") if path.name.endswith(".tmp")]


# Content


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_export_merged_file_has_the_bases_keys_dtypes_and_the_merges_values(toy, tmp_path, dtype):
    toy.base = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in toy.base.items()}
    pool = file_pool(toy, tmp_path, prefix="visual.")
    coefficients = made(pool)
    files = export(pool, coefficients, tmp_path / "out")
    written = load_state_dict(files["merged"])
    base = load_state_dict(tmp_path / "base.safetensors")
    expected = merge(pool, coefficients, detach=True)
    assert list(written) == list(base)
    assert all(key.startswith("visual.") for key in written)
    assert {key: tensor.dtype for key, tensor in written.items()} == {key: t.dtype for key, t in base.items()}
    assert all(torch.equal(written[key], expected[key]) for key in written)
    encoder = ToyEncoder().to(dtype)
    encoder.load_state_dict({key.removeprefix("visual."): tensor for key, tensor in written.items()}, strict=True)


def test_export_merged_metadata_tells_format_coefficients_and_pool(toy, tmp_path):
    pool = file_pool(toy, tmp_path)
    path = export(pool, made(pool), tmp_path / "out")["merged"]
    facts = metadata(path)
    assert facts.keys() == {"format", "adamerge_format", "adamerge"}
    assert (facts["format"], facts["adamerge_format"]) == ("pt", "1")
    facts = json.loads(facts["adamerge"])
    assert set(facts) == {"coefficients", "pool"}
    assert len(facts["coefficients"]) == len(facts["pool"]) == 64
    other = export(pool, Coefficients(pool), tmp_path / "other")["merged"]
    different = json.loads(metadata(other)["adamerge"])
    assert different["coefficients"] != facts["coefficients"]
    assert different["pool"] == facts["pool"]


def test_export_coefficients_file_gives_the_coefficients_back(toy, tmp_path):
    pool = file_pool(toy, tmp_path)
    coefficients = made(pool)
    path = export(pool, coefficients, tmp_path / "out")["coefficients"]
    assert torch.equal(load_coefficients(path, pool)(), coefficients())
    content = json.loads(path.read_text())
    assert content["experts"] == list(EXPERTS)
    assert content["pool"] == pool.hashes()


def test_export_recipe_tells_versions_hashes_what_is_skipped_and_what_the_caller_adds(toy, tmp_path):
    pool = file_pool(toy, tmp_path, exclude=["stem.*"])
    path = export(pool, made(pool), tmp_path / "out", recipe={"seed": 7, "config": {"a": [1, 2]}})["recipe"]
    content = json.loads(path.read_text())
    assert content["format"] == 1
    assert content["versions"] == versions()
    assert {"python", "adamerge", "torch", "lightning", "safetensors"} <= set(content["versions"])
    assert content["hashes"] == {name: files.sha256(tmp_path / f"{name}.safetensors") for name in pool.hashes()}
    assert set(content["hashes"]) == {"base", *EXPERTS}
    assert {"stem.weight", "stem.bias", "seen"} <= set(content["skipped"])
    assert content["seed"] == 7
    assert content["config"] == {"a": [1, 2]}


def test_export_returns_what_it_wrote_and_nothing_else(toy, tmp_path):
    pool = file_pool(toy, tmp_path)
    files = export(pool, made(pool), tmp_path / "a" / "b", filename="model.safetensors")
    assert {path.name for path in files.values()} == {path.name for path in (tmp_path / "a" / "b").iterdir()}
    assert files["merged"].name == "model.safetensors"
    assert "heads" not in files
    assert "open_clip" not in files


def test_export_excluded_tensors_keep_the_bases_values(toy, tmp_path):
    pool = file_pool(toy, tmp_path, exclude=["stem.*"])
    written = load_state_dict(export(pool, made(pool), tmp_path / "out")["merged"])
    assert torch.equal(written["stem.weight"], toy.base["stem.weight"])
    assert torch.equal(written["seen"], toy.base["seen"])
    assert not torch.equal(written["proj"], toy.base["proj"])


# Heads


def test_save_heads_then_load_heads_gives_tensors_and_facts_back(toy, tmp_path):
    info = {task: {"classes": [f"{task} 1", "größer ∑"], "templates": ["a {}."]} for task in EXPERTS}
    save_heads(toy.heads, tmp_path / "heads.safetensors", info)
    tensors, facts = load_heads(tmp_path / "heads.safetensors")
    assert facts == info
    assert set(tensors) == set(EXPERTS)
    for task, head in toy.heads.items():
        own = torch.nn.Linear(head.in_features, head.out_features)
        own.load_state_dict(tensors[task], strict=True)
        assert torch.equal(own.weight, head.weight)
        assert torch.equal(own.bias, head.bias)


def test_load_heads_task_with_a_slash_in_its_name_is_kept_whole(toy, tmp_path):
    save_heads({"set/one": toy.heads["red"]}, tmp_path / "heads.safetensors", {})
    tensors, _ = load_heads(tmp_path / "heads.safetensors")
    assert set(tensors) == {"set/one"}
    assert set(tensors["set/one"]) == {"weight", "bias"}


def test_load_heads_of_another_file_is_refused(tmp_path):
    save_file({"a/weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"x\.safetensors: not a heads file written by adamerge"):
        load_heads(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match=r"y\.safetensors: no such file. Did you mean 'x\.safetensors'"):
        load_heads(tmp_path / "y.safetensors")


def test_export_writes_the_heads_it_is_given(toy, tmp_path):
    pool = file_pool(toy, tmp_path)
    files = export(pool, made(pool), tmp_path / "out", heads=toy.heads, head_info={"red": {"classes": ["x"]}})
    tensors, facts = load_heads(files["heads"])
    assert torch.equal(tensors["blue"]["weight"], toy.heads["blue"].weight)
    assert facts == {"red": {"classes": ["x"]}}


# The same bytes


def test_export_again_gives_the_same_bytes(toy, tmp_path):
    pool = file_pool(toy, tmp_path)
    coefficients = made(pool)
    files = [export(pool, coefficients, tmp_path / name, heads=toy.heads) for name in ("one", "two")]
    for kind in ("merged", "coefficients", "heads", "recipe"):
        assert files[0][kind].read_bytes() == files[1][kind].read_bytes()


def test_export_bytes_do_not_depend_on_storage(toy, tmp_path):
    written = []
    for storage in ("ram", "stream"):
        pool = file_pool(toy, tmp_path, storage=storage)
        written.append(export(pool, made(pool, "row"), tmp_path / storage)["merged"].read_bytes())
    assert written[0] == written[1]


def test_export_callback_merges_once_more_only_for_statistics(toy, tmp_path, monkeypatch):
    pool = file_pool(toy, tmp_path)
    model = MergedModel(toy.encoder, pool, made(pool), toy.heads)
    monkeypatch.setattr(model, "merge", lambda: pytest.fail("merged for nothing"))
    callback = ExportMergedWeights(tmp_path / "out", batch_norm=BatchNormPolicy("recalibrate"))
    trainer = SimpleNamespace(is_global_zero=True, global_step=3, datamodule=None)
    callback.on_fit_end(trainer, SimpleNamespace(model=model))
    assert callback.files["merged"].is_file()


def test_export_over_an_earlier_one_leaves_the_new_one_only(toy, tmp_path):
    pool = file_pool(toy, tmp_path)
    export(pool, Coefficients(pool), tmp_path / "out")
    coefficients = made(pool)
    files = export(pool, coefficients, tmp_path / "out")
    assert torch.equal(load_coefficients(files["coefficients"], pool)(), coefficients())
    assert leftovers(tmp_path) == []


# What can go wrong


def breaks(descriptor):
    raise OSError(28, "No space left on device")


def test_export_failing_in_the_middle_leaves_the_earlier_file(toy, tmp_path, monkeypatch):
    pool = file_pool(toy, tmp_path)
    merged = export(pool, Coefficients(pool), tmp_path / "out")["merged"]
    before = merged.read_bytes()

    monkeypatch.setattr(files.os, "fsync", breaks)
    with pytest.raises(OSError, match="No space left"):
        export(pool, made(pool), tmp_path / "out")
    assert merged.read_bytes() == before
    assert leftovers(tmp_path) == []


def test_export_failing_at_first_leaves_no_half_file(toy, tmp_path, monkeypatch):
    pool = file_pool(toy, tmp_path)
    monkeypatch.setattr(files.os, "fsync", breaks)
    with pytest.raises(OSError, match="No space left"):
        export(pool, made(pool), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_export_is_read_back_and_a_difference_is_an_error(toy, tmp_path, monkeypatch):
    pool = file_pool(toy, tmp_path)
    monkeypatch.setattr("adamerge.checkpoints.writing._is_written", lambda file, begin, data: False)
    with pytest.raises(RuntimeError, match="is read back differently"):
        export(pool, made(pool), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_export_begins_only_where_the_disk_has_room(toy, tmp_path, monkeypatch):
    pool = file_pool(toy, tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda place: SimpleNamespace(free=100))
    with pytest.raises(
        OSError, match=r"No space left on device: it takes .* MB, and 0\.0 MB are free.*merged\.safetensors"
    ):
        export(pool, made(pool), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_export_folder_below_a_file_is_refused(toy, tmp_path):
    (tmp_path / "file").write_text("")
    pool = file_pool(toy, tmp_path)
    with pytest.raises(InputError, match=r"Output folder .*file/out is not writable .*Choose another one"):
        export(pool, made(pool), tmp_path / "file" / "out")


def test_export_coefficients_of_another_pool_are_refused_before_anything_is_written(toy, tmp_path):
    pool = file_pool(toy, tmp_path)
    other = ExpertPool.from_state_dicts(toy.base, {"red": toy.experts["red"]})
    with pytest.raises(InputError, match="The coefficients were made for another pool"):
        export(pool, Coefficients(other), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_export_takes_a_state_dict_or_pairs_in_any_order(toy, tmp_path):
    pool = file_pool(toy, tmp_path)
    merged = merge(pool, made(pool), detach=True)
    written = export(pool, merged, tmp_path / "a")["merged"].read_bytes()
    assert export(pool, iter(reversed(merged.items())), tmp_path / "b")["merged"].read_bytes() == written
