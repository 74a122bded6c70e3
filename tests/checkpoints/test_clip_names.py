"""Names of Hugging Face's CLIP and open_clip's: each from the other, and models that compute the same."""

import copy
import json

import open_clip
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from adamerge import InputError
from adamerge.checkpoints.checkpoint import MemoryCheckpoint
from adamerge.checkpoints.clip_configs import quick_gelu_of, to_hugging_face, to_open_clip
from adamerge.checkpoints.clip_names import as_own, as_theirs, is_hugging_face
from tests.support.clips import (
    CONFIG,
    IMAGES,
    OPEN_CLIP,
    PREPROCESS_CFG,
    hugging_face,
    logits_of_hugging_face,
    logits_of_open_clip,
    open_clip_folder,
    open_clip_model,
    random_open_clip,
    shaped,
)


def of(module: torch.nn.Module) -> MemoryCheckpoint:
    return MemoryCheckpoint("model", module.state_dict())


def tensors(checkpoint) -> dict[str, torch.Tensor]:
    return {key: checkpoint.get(key) for key in checkpoint.keys}


# The same function


def test_as_own_weights_of_transformers_give_the_same_logits_in_open_clip(tmp_path):
    theirs = hugging_face()
    own = open_clip_model(open_clip_folder(tmp_path), seed=1)
    own.load_state_dict(tensors(as_own(of(theirs))), strict=True)
    expected = logits_of_hugging_face(theirs, IMAGES)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits_of_open_clip(own, IMAGES), expected, rtol=1e-5, atol=1e-5)


def test_as_theirs_weights_of_open_clip_give_the_same_logits_in_transformers(tmp_path):
    own = open_clip_model(open_clip_folder(tmp_path))
    theirs = hugging_face(seed=1)
    theirs.load_state_dict(tensors(as_theirs(of(own))), strict=True)
    expected = logits_of_open_clip(own, IMAGES)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits_of_hugging_face(theirs, IMAGES), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("name", ["B-32", "B-16", "L-14"])
def test_models_of_the_benchmarks_proportions_give_the_same_logits_both_ways(tmp_path, name, activation):
    theirs = hugging_face(config=shaped(name, activation))
    size = theirs.config.vision_config.image_size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    config = to_open_clip(theirs.config.to_dict(), {}, name)
    assert config["model_cfg"]["quick_gelu"] == (activation == "quick_gelu")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    own = open_clip_model(tmp_path, seed=1)
    into_theirs = hugging_face(seed=2, config=shaped(name, activation))
    into_theirs.load_state_dict(tensors(as_theirs(of(own))), strict=True)  # fused to split
    expected = logits_of_open_clip(own, images)
    torch.testing.assert_close(logits_of_hugging_face(into_theirs, images), expected, rtol=1e-5, atol=1e-5)
    own.load_state_dict(tensors(as_own(of(theirs))), strict=True)  # split to fused
    expected = logits_of_hugging_face(theirs, images)
    torch.testing.assert_close(logits_of_open_clip(own, images), expected, rtol=1e-5, atol=1e-5)
    other = hugging_face(seed=2, config=shaped(name, "gelu" if activation == "quick_gelu" else "quick_gelu"))
    other.load_state_dict(theirs.state_dict())
    assert (logits_of_hugging_face(other, images) - expected).abs().max() > 1e-3  # why the activation is checked


def test_as_theirs_of_as_own_is_the_identity():
    source = of(hugging_face())
    there = as_own(source)
    back = as_theirs(there)
    assert set(back.keys) == set(source.keys)
    for checkpoint in (there, back):
        assert all(checkpoint.spec(key) == (tuple(t.shape), t.dtype) for key, t in tensors(checkpoint).items())
    assert all(torch.equal(back.get(key), source.get(key)) for key in source.keys)
    assert back.sha256() == source.sha256()


@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "ViT-B-16", "ViT-L-14"])
def test_maps_of_the_benchmarks_models_fit_both_libraries_names_and_shapes(name):
    sidecar = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": PREPROCESS_CFG | {"size": 224}}
    config, _ = to_hugging_face(sidecar, name)
    with torch.device("meta"):
        own = random_open_clip(name, device="meta")
        theirs = CLIPModel(CLIPConfig(**config))
    shapes = {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    seen = as_theirs(Meta(own))
    assert {key: seen.spec(key)[0] for key in seen.keys} == shapes
    back = as_own(Meta(theirs))
    assert {key: back.spec(key)[0] for key in back.keys} == {k: t.shape for k, t in own.state_dict().items()}
    layers = {"ViT-L-14": 24}.get(name, 12)
    assert theirs.config.vision_config.num_hidden_layers == layers
    assert theirs.config.vision_config.hidden_act == ("quick_gelu" if "quickgelu" in name else "gelu")


class Meta(MemoryCheckpoint):
    """A model on the meta device: shapes, no values."""

    def __init__(self, module):
        super().__init__("meta", module.state_dict())


# Which files these are


def test_is_hugging_face_tells_hugging_face_from_open_clip(tmp_path):
    theirs, own = hugging_face(), open_clip_model(open_clip_folder(tmp_path))
    assert is_hugging_face(theirs.state_dict())
    assert not is_hugging_face(own.state_dict())
    vision = theirs.vision_model.state_dict()
    assert is_hugging_face(vision)
    assert is_hugging_face({f"vision_model.{key}" for key in vision})
    siglip = {"vision_model.embeddings.patch_embedding.weight": torch.zeros(1), "logit_scale": torch.zeros(())}
    assert not is_hugging_face(siglip)


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_as_own_of_a_vision_tower_alone_has_its_tensors_only(prefix):
    theirs = hugging_face()
    vision = {prefix + key: tensor for key, tensor in theirs.vision_model.state_dict().items()}
    vision["vision_model.embeddings.position_ids"] = torch.arange(5)  # of files that older versions wrote
    vision["classifier.weight"] = torch.zeros(3, 32)
    if not prefix:
        del vision["vision_model.embeddings.position_ids"]
    seen = as_own(MemoryCheckpoint("expert", vision))
    whole = as_own(of(theirs))
    expected = {key for key in whole.keys if key.startswith("visual.")} - {"visual.proj"}
    assert set(seen.keys) == expected | {"classifier.weight"}
    assert all(torch.equal(seen.get(key), whole.get(key)) for key in expected)


def test_as_own_with_a_part_missing_names_it():
    vision = hugging_face().vision_model.state_dict()
    del vision["encoder.layers.1.self_attn.k_proj.bias"]
    message = r"model\.pt: lacks 'encoder\.layers\.1\.self_attn\.k_proj\.bias', a part of open_clip's .*in_proj_bias'"
    with pytest.raises(InputError, match=message):
        as_own(MemoryCheckpoint("model.pt", vision))


def test_as_theirs_of_what_has_no_place_is_refused(tmp_path):
    own = open_clip_model(open_clip_folder(tmp_path)).state_dict()
    with pytest.raises(
        InputError, match=r"x: cannot be written as Hugging Face CLIP: it has no place for 'visual\.attn"
    ):
        as_theirs(MemoryCheckpoint("x", {**own, "visual.attnpool.q": torch.zeros(1)}))
    with pytest.raises(InputError, match=r"Expected the keys of an open_clip ViT such as 'visual\.class_embedding'"):
        as_theirs(MemoryCheckpoint("x", {"logit_scale": torch.zeros(())}))


# Configurations


def test_configurations_of_the_same_model_give_each_other():
    config, preprocessor = to_hugging_face(OPEN_CLIP, "x")
    made = CLIPConfig(**config)
    for tower in ("vision_config", "text_config"):
        for key, value in CONFIG[tower].items():
            assert getattr(getattr(made, tower), key) == value, key
    assert made.projection_dim == 24
    assert to_open_clip(made.to_dict(), preprocessor, "x") == OPEN_CLIP


def test_to_open_clip_reads_what_an_older_file_leaves_out():
    vision = {"model_type": "clip_vision_model"}
    content = {
        "model_type": "clip",
        "projection_dim": 512,
        "text_config_dict": {"hidden_size": 512},
        "vision_config": vision,
    }
    config = to_open_clip(content, {"size": 224, "resample": 3, "image_mean": [0.1, 0.2, 0.3]}, "x")
    named = open_clip.get_model_config("ViT-B-32-quickgelu")
    for tower in ("vision_cfg", "text_cfg"):
        assert named[tower].items() <= config["model_cfg"][tower].items()
    assert config["model_cfg"]["quick_gelu"] is True
    assert config["preprocess_cfg"] == {
        "size": 224, "mean": [0.1, 0.2, 0.3], "interpolation": "bicubic", "resize_mode": "shortest",
    }  # fmt: skip


def test_to_open_clip_of_one_tower_is_refused():
    with pytest.raises(InputError, match=r"c\.json: model_type: expected 'clip', with both towers, found 'clip_vision"):
        to_open_clip({"model_type": "clip_vision_model"}, {}, "c.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_cfg": {"timm_model_name": "resnet18"}}, "timm_model_name='resnet18'"),
        ({"vision_cfg": {"ls_init_value": 0.1}}, "ls_init_value=0.1"),
        ({"text_cfg": {"pool_type": "last"}}, "pool_type='last'"),
        ({"custom_text": True}, "'custom_text'"),
    ],
)
def test_to_hugging_face_of_another_architecture_names_the_option(change, words):
    config = copy.deepcopy(OPEN_CLIP)
    for key, value in change.items():
        config["model_cfg"][key] = {**config["model_cfg"][key], **value} if isinstance(value, dict) else value
    with pytest.raises(InputError, match=r"m: .*" + words + r".* has no place in Hugging Face's CLIP"):
        to_hugging_face(config, "m")


def test_quick_gelu_of_a_configuration():
    assert quick_gelu_of({"model_type": "clip_vision_model", "hidden_act": "gelu"}, "x") is False
    assert quick_gelu_of({"model_type": "clip_vision_model"}, "x") is True
    assert quick_gelu_of({"model_type": "bert"}, "x") is None
    config = {"model_type": "clip", "text_config": {"hidden_act": "gelu"}}
    with pytest.raises(
        InputError, match="hidden_act: expected quick_gelu or gelu, the same in both towers, found 'gelu'"
    ):
        quick_gelu_of(config, "config.json")
