"""Names that wrappers of models leave in files: read without them, in every kind of file."""

import logging

import pytest
import torch
from safetensors.torch import save_file

from adamerge import ExpertPool, InputError
from adamerge.checkpoints.checkpoint import MemoryCheckpoint
from adamerge.checkpoints.composed import unwrapped, wrappers
from adamerge.checkpoints.model_folder import find_model, open_model
from tests.support.clips import hugging_face

BASE = {"visual.w": torch.zeros(2, 2), "visual.b": torch.zeros(2), "text.w": torch.zeros(2)}
WRAPPED = ["module.", "_orig_mod.", "model.", "module.model.", "_orig_mod.module.", "model._orig_mod."]


def write(path, tensors, prefix=""):
    content = {prefix + key: tensor.clone() for key, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save({"state_dict": content}, path)
    return path


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
@pytest.mark.parametrize("prefix", WRAPPED)
@pytest.mark.parametrize("key_prefix", ["visual.", None])
@pytest.mark.parametrize("wrapped", ["expert", "base", "both"])
def test_wrapped_files_merge_as_plain_ones(tmp_path, caplog, kind, prefix, key_prefix, wrapped):
    expert = {key: tensor + 1 for key, tensor in BASE.items()}
    base = write(tmp_path / f"base.{kind}", BASE, prefix if wrapped != "expert" else "")
    path = write(tmp_path / f"a.{kind}", expert, prefix if wrapped != "base" else "")
    with caplog.at_level(logging.INFO):
        pool = ExpertPool.from_files(base, {"a": path}, key_map=key_prefix)
    assert set(pool.names) == ({"w", "b"} if key_prefix else set(BASE))
    assert all(torch.equal(pool.task_vectors(name), torch.ones(1, *pool.shapes[name])) for name in pool.names)
    assert set(pool.source.keys) == set(BASE)
    told = prefix.removeprefix("module.") if kind == "pt" else prefix  # torch files are read without it anyway
    assert not told or f"'{told}" in caplog.text


@pytest.mark.parametrize("wrapped", ["expert", "base", "both"])
def test_wrapper_inside_of_names_is_taken_off(tmp_path, wrapped):
    def inner(tensors, is_wrapped):
        return {key.replace(".", "._orig_mod.") if is_wrapped else key: tensor for key, tensor in tensors.items()}

    base = write(tmp_path / "base.safetensors", inner(BASE, wrapped != "expert"))
    expert = inner({key: tensor + 1 for key, tensor in BASE.items()}, wrapped != "base")
    pool = ExpertPool.from_files(base, {"a": write(tmp_path / "a.safetensors", expert)}, key_map="visual.")
    assert set(pool.names) == {"w", "b"}


def test_prefix_that_a_user_names_stays(tmp_path):
    base = write(tmp_path / "base.safetensors", BASE, "module.")
    expert = write(tmp_path / "a.safetensors", {key: tensor + 1 for key, tensor in BASE.items()}, "module.")
    pool = ExpertPool.from_files(base, {"a": expert}, key_map="module.visual.")
    assert set(pool.names) == {"w", "b"}
    assert pool.source.keys[0].startswith("module.")
    mapping = {"module.visual.w": "x"}
    assert ExpertPool.from_files(base, {"a": expert}, key_map=mapping).names == ("x",)


def test_an_expert_behind_one_more_prefix_is_read_as_the_base(tmp_path):
    base = write(tmp_path / "base.safetensors", BASE)
    expert = {f"net.{key}": tensor + 1 for key, tensor in BASE.items()} | {"classifier.w": torch.ones(2)}
    expert = write(tmp_path / "a.safetensors", expert)
    pool = ExpertPool.from_files(base, {"a": expert}, key_map="visual.")
    assert set(pool.names) == {"w", "b"}


def test_names_that_fit_neither_way_are_told_as_they_are(tmp_path):
    base = write(tmp_path / "base.safetensors", BASE)
    expert = write(tmp_path / "a.safetensors", {"net.visual.b": torch.ones(2), "old.visual.b": torch.ones(2)})
    with pytest.raises(
        InputError, match=r"a\.safetensors\) lacks 2 of 2 tensors of the base: 'visual\.b', 'v"
    ) as caught:
        ExpertPool.from_files(base, {"a": expert}, key_map="visual.")
    assert "adamerge convert FILE --key-prefix net. --out" in str(caught.value)
    assert "key_map" not in str(caught.value)
    assert "exclude=[" not in str(caught.value)


def test_wrapped_hugging_face_clip_is_known_as_one(tmp_path):
    own = hugging_face().state_dict()
    plain = open_model(write(tmp_path / "plain.safetensors", own))
    path = write(tmp_path / "x.safetensors", own, "module.model.")
    assert find_model(path).is_hugging_face
    seen = open_model(path)
    assert seen.keys == plain.keys
    assert torch.equal(seen.get("visual.conv1.weight"), plain.get("visual.conv1.weight"))


def test_wrappers_are_those_that_all_names_begin_with():
    assert wrappers(["module._orig_mod.w", "module._orig_mod.b"]) == ["", "module.", "module._orig_mod."]
    assert wrappers(["module.w", "b"]) == wrappers([]) == [""]


def test_unwrapped_keeps_names_that_would_fall_together():
    checkpoint = MemoryCheckpoint("x", {"_orig_mod.w": torch.ones(1), "w": torch.ones(1)})
    assert unwrapped(checkpoint, lambda names: "_orig_mod.w" not in names) is checkpoint
