"""Models' files and folders of both libraries as base and experts of a pool."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel

from adamerge import Coefficients, ExpertPool, InputError, merge
from adamerge.checkpoints.checkpoint import MemoryCheckpoint
from adamerge.checkpoints.clip_names import as_own
from adamerge.checkpoints.model_folder import find_model, open_model, open_shards
from adamerge.pool.headers import read_headers
from adamerge.pool.lora import open_expert
from adamerge.pool.options import PoolOptions
from adamerge.pool.pool_file import PoolFile, PoolFiles
from tests.support.adapters import random_adapter
from tests.support.clips import IMAGES, hugging_face, logits_of_hugging_face, open_clip_folder, open_clip_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What `save_pretrained` writes: a base, and a vision tower fine-tuned from it, as the field's experts are."""
    folder = tmp_path_factory.mktemp("saved")
    base = hugging_face()
    base.save_pretrained(folder / "base")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        tower = {key: tensor + 0.1 * torch.randn_like(tensor) for key, tensor in base.vision_model.state_dict().items()}
    expert = CLIPVisionModel(base.config.vision_config)
    expert.load_state_dict(tower)
    expert.save_pretrained(folder / "expert")
    return folder


def own(model) -> dict[str, torch.Tensor]:
    """A model's tensors under open_clip's names."""
    seen = as_own(MemoryCheckpoint("model", model.state_dict()))
    return {key: seen.get(key) for key in seen.keys}


def test_pool_of_hugging_face_folders_merges_what_open_clip_files_of_the_same_weights_do(saved, tmp_path):
    pool = ExpertPool.from_files(saved / "base", {"cars": saved / "expert"}, key_map="visual.")
    base = own(hugging_face())
    tower = {f"vision_model.{k.removeprefix('vision_model.')}": t for k, t in
             load_file(saved / "expert" / "model.safetensors").items()}  # fmt: skip
    seen = as_own(MemoryCheckpoint("expert", tower))
    expert = base | {key: seen.get(key) for key in seen.keys}
    save_file(base, tmp_path / "base.safetensors")
    save_file(expert, tmp_path / "cars.safetensors")
    plain = ExpertPool.from_files(
        tmp_path / "base.safetensors", {"cars": tmp_path / "cars.safetensors"}, key_map="visual."
    )
    assert set(pool.names) == set(plain.names)
    first, second = (merge(p, Coefficients(p, "layer", 0.4), detach=True) for p in (pool, plain))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert pool.skipped["visual.proj"] == "no expert changed it"  # of a vision tower alone
    assert torch.equal(pool.fixed["proj"], base["visual.proj"])


@pytest.mark.parametrize("storage", ["ram", "stream"])
def test_pool_of_hugging_face_files_gives_the_expert_at_coefficient_one(saved, storage):
    files = {"cars": saved / "expert" / "model.safetensors"}
    pool = ExpertPool.from_files(saved / "base" / "model.safetensors", files, key_map="visual.", storage=storage)
    assert pool.storage == storage
    merged = merge(pool, Coefficients(pool, "task", 1.0, "none"), detach=True)
    model = hugging_face(seed=1)
    whole = CLIPVisionModel.from_pretrained(saved / "expert")
    model.vision_model.load_state_dict(whole.state_dict())
    expected = own(model)
    for name in pool.names:
        torch.testing.assert_close(merged[f"visual.{name}"], expected[f"visual.{name}"], rtol=1e-6, atol=1e-6)
    assert pool.hashes()["cars"] == open_expert(files["cars"], pool.source).sha256()


def test_open_model_tells_once_how_a_file_is_read(saved, caplog):
    path = saved / "expert" / "model.safetensors"
    copy = saved / "copy.safetensors"
    shutil.copy(path, copy)
    with caplog.at_level(logging.INFO):
        open_model(copy)
        open_model(copy)
    told = [record.message for record in caplog.records if "copy.safetensors" in record.message]
    assert told == [f"{copy}: a Hugging Face CLIP checkpoint, read under open_clip's names."]


def test_open_model_of_an_open_clip_folder_is_its_weights_file(tmp_path):
    model = open_clip_model(open_clip_folder(tmp_path / "a"))
    folder = open_clip_folder(tmp_path / "b", model.state_dict())
    assert set(open_model(folder).keys) == set(model.state_dict())


def test_tensors_of_shards_that_the_index_lacks_are_named(tmp_path, caplog):
    save_file({"w": torch.ones(1), "stray": torch.ones(1)}, tmp_path / "model-1.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "model-1.safetensors"}}))
    with caplog.at_level(logging.WARNING):
        assert open_shards(index).keys == ("w",)
    assert "weight_map lacks 'stray'" in caplog.text


def test_open_model_of_shards_reads_all_of_them(tmp_path):
    model = hugging_face()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    opened, expected = open_model(tmp_path), own(model)
    assert set(opened.keys) == set(expected)
    assert all(torch.equal(opened.get(key), tensor) for key, tensor in expected.items())
    before = opened.sha256()
    index = tmp_path / "model.safetensors.index.json"
    (tmp_path / shards[1]).rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=rf"index\.json: names {len(shards)} files, missing: '{shards[1]}'"):
        open_model(tmp_path)
    (tmp_path / "moved").rename(tmp_path / shards[1])
    content = json.loads(index.read_text())
    content["weight_map"]["visual_projection.weight"] = shards[0]
    content["weight_map"]["vision_model.pre_layrnorm.weight"] = shards[0]
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"index\.json: '.*' not in the files that it names"):
        open_model(tmp_path)
    index.write_text("{}")
    with pytest.raises(InputError, match=r"index\.json: weight_map: expected a mapping"):
        open_model(tmp_path)
    assert len(before) == 64


def test_open_model_of_a_folder_without_a_model_is_refused(tmp_path, saved):
    with pytest.raises(
        InputError, match=r"or the folder of a model or .* found a folder without open_clip_config\.json"
    ):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no weights: expected one of model\.safetensors, .* there"):
        open_model(tmp_path)


def test_read_headers_of_hugging_face_folders_finds_no_problem_and_names_a_missing_part(saved, tmp_path):
    headers = read_headers(saved / "base", {"cars": saved / "expert"}, PoolOptions(key_map="visual."))
    assert headers.problems == ()
    assert headers.shapes["transformer.resblocks.0.attn.in_proj_weight"] == (96, 32)
    tensors = load_file(saved / "expert" / "model.safetensors")
    name = next(key for key in tensors if key.endswith("layers.0.self_attn.v_proj.weight"))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, tmp_path / "broken.safetensors")
    headers = read_headers(saved / "base", {"cars": tmp_path / "broken.safetensors"}, PoolOptions(key_map="visual."))
    (problem,) = headers.problems
    assert "v_proj.weight', a part of open_clip's 'visual.transformer.resblocks.0.attn.in_proj_weight'" in problem


def test_pool_file_verifies_the_hash_of_a_folder(saved):
    pool = ExpertPool.from_files(saved / "base", {"cars": saved / "expert"}, key_map="visual.")
    files = PoolFiles(PoolFile(saved / "base"), {"cars": PoolFile(saved / "expert")}, "visual.")
    files.pinned(pool.hashes()).verify()
    with pytest.raises(InputError, match="expected the SHA-256 0000"):
        files.pinned({"base": "0" * 64}).verify()


# LoRA


@pytest.mark.parametrize("base_is", ["hugging face", "open_clip"])
@pytest.mark.parametrize("trained_on", ["", "vision_model."])
def test_adapter_of_a_hugging_face_tower_is_the_tower_with_its_products(saved, tmp_path, base_is, trained_on):
    shapes = {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (32, 32), "mlp.fc1": (64, 32)}
    shapes = {f"{trained_on}encoder.layers.1.{name}": shape for name, shape in shapes.items()}
    folder = random_adapter(tmp_path / "lora", shapes, lora_alpha=6)
    factors = load_file(folder / "adapter_model.safetensors")
    whole = hugging_face()
    with torch.no_grad():
        for name in shapes:
            down, up = (factors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
            weight = whole.vision_model.get_submodule(name.removeprefix("vision_model.")).weight
            weight += 3 * up @ down  # alpha / r
    base = open_model(saved / "base")
    if base_is == "open_clip":
        save_file(own(hugging_face()), tmp_path / "base.safetensors")
        base = open_model(tmp_path / "base.safetensors")
    expert = open_expert(folder, base, "visual.")
    expected = own(whole)
    assert set(expert.keys) == set(base.keys)
    changed = set()
    for key in expert.keys:
        torch.testing.assert_close(expert.get(key), expected[key], rtol=1e-5, atol=1e-5)
        changed |= set() if torch.equal(expert.get(key), base.get(key)) else {key}
    block = "visual.transformer.resblocks.1"
    assert changed == {f"{block}.attn.in_proj_weight", f"{block}.mlp.c_fc.weight"}


def test_logits_of_the_fixture_tell_models_apart():
    first, second = (logits_of_hugging_face(hugging_face(seed), IMAGES) for seed in (0, 1))
    assert (first - second).abs().max() > 0.1


def test_weights_beside_a_model_that_are_no_model_are_named(tmp_path, caplog):
    for folder, config in (
        ("", {"model_type": "clip"}),
        ("2_Dense", {"in_features": 4}),
        ("old", {"model_type": "clip"}),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
        save_file({"w": torch.ones(1)}, tmp_path / folder / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        find_model(tmp_path)
    assert "'2_Dense/model.safetensors' beside the model" in caplog.text
    assert "old/" not in caplog.text
