"""Configurations beside weights that contradict the model that computes, or one another, are refused."""

import json
import shutil

import pytest
import torch

from adamerge import InputError, zoo
from adamerge.backbones import OpenClip
from adamerge.checkpoints.checkpoint import MemoryCheckpoint
from adamerge.checkpoints.clip_configs import to_hugging_face
from adamerge.checkpoints.configurations import check_configurations, configuration_of, differences
from adamerge.checkpoints.model_folder import open_model
from adamerge.commands.run.check import check
from adamerge.commands.run.compose import compose

CHANGES = [
    ("model_cfg", "quick_gelu", True),
    ("model_cfg", "vision_cfg", {"image_size": 28, "patch_size": 7, "width": 96, "layers": 4, "head_width": 48}),
    ("preprocess_cfg", "mean", [0.4, 0.5, 0.5]),
    ("preprocess_cfg", "std", [0.5, 0.5, 0.6]),
    ("preprocess_cfg", "size", 32),
    ("preprocess_cfg", "interpolation", "bilinear"),
]


def folder(path, *change):
    """Copy the demo zoo's base with its configuration, one option of which is changed."""
    path.mkdir()
    content = json.loads((zoo.files() / "open_clip_config.json").read_text())
    if change:
        content[change[0]][change[1]] = change[2]
    (path / "open_clip_config.json").write_text(json.dumps(content))
    shutil.copy(zoo.files() / "base.safetensors", path / "open_clip_model.safetensors")
    return path


def backbone(model=None) -> OpenClip:
    return OpenClip(str(model or zoo.files()), tokenizer=zoo.Tokenizer())


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change[1])
def test_open_clip_folder_that_says_otherwise_is_named_with_key_values_and_remedy(tmp_path, change):
    wrong = open_model(folder(tmp_path / "wrong", *change))
    (problem,) = backbone().problems({"base": open_model(folder(tmp_path / "base")), "cars": wrong})
    assert problem.startswith(f"{tmp_path / 'wrong'}/open_clip_config.json: {change[0]}.{change[1]}")
    if change[0] == "preprocess_cfg":
        assert f"found {change[2]!r}, but backbone.model={zoo.files()} computes with " in problem
        assert "the export would say so" in problem
        assert f"backbone.model={tmp_path / 'wrong'}" in problem
    assert backbone(tmp_path / "wrong").problems({"cars": wrong}) == []
    if change[1] != "interpolation":  # which the other file does not state
        with pytest.raises(InputError, match=rf"{change[1]}.*base/open_clip_config\.json"):
            check_configurations(open_model(tmp_path / "base"), {"cars": wrong})


def test_the_same_in_other_words_is_no_difference(tmp_path):
    for i, change in enumerate([("size", [28, 28]), ("mean", 0.5), ("std", [0.50000001] * 3), ("fill_color", 7)]):
        same = open_model(folder(tmp_path / str(i), "preprocess_cfg", *change))
        assert backbone().problems({"base": same}) == []
        check_configurations(open_model(zoo.files() / "base.safetensors"), {"cars": same})


def test_text_towers_of_experts_do_not_matter(tmp_path):
    text = {"context_length": 16, "vocab_size": 99, "width": 64, "heads": 1, "layers": 2}
    other = open_model(folder(tmp_path / "other", "model_cfg", "text_cfg", text))
    assert backbone().problems({"cars": other}) == []
    problems = backbone().problems({"base": other})
    assert [problem.split(": ")[1] for problem in problems] == [
        "model_cfg.text_cfg.vocab_size", "model_cfg.text_cfg.heads",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "change", "label"),
    [
        ("preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3]}, "image_mean: found [0.1, 0.2, 0.3]"),
        ("preprocessor_config.json", {"do_normalize": False}, "image_mean: found [0.0, 0.0, 0.0]"),
        ("preprocessor_config.json", {"resample": 2}, "resample: found 'bilinear'"),
        ("config.json", {"vision_config": {"image_size": 56}}, "vision_config.image_size: found 56"),
        ("config.json", {"vision_config": {"hidden_act": "quick_gelu"}, "text_config": {"hidden_act": "quick_gelu"}},
         "hidden_act: these weights were trained with quick_gelu"),
    ],
    ids=["mean", "not normalised", "resample", "image size", "activation"],
)  # fmt: skip
@pytest.mark.parametrize("towers", ["both", "vision"])
def test_hugging_face_folder_that_says_otherwise_is_named(tmp_path, file, change, label, towers):
    config, preprocessor = to_hugging_face(backbone().sidecar(), "x")
    contents = {"config.json": {"model_type": "clip", **config}, "preprocessor_config.json": preprocessor}
    for key, value in change.items():
        contents[file][key] = {**contents[file][key], **value} if isinstance(value, dict) else value
    if towers == "vision":
        contents["config.json"] = {"model_type": "clip_vision_model", **contents["config.json"]["vision_config"]}
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content))
    expert = MemoryCheckpoint("cars", {"a": torch.zeros(1)})
    expert.config_file = tmp_path / "config.json"
    problems = backbone().problems({"cars": expert})
    assert any(problem.startswith(f"{tmp_path / file}: {label}") for problem in problems)
    if "activation" not in label and "hidden_act" not in label:
        assert f"adamerge convert {tmp_path} --to open_clip" in problems[0]


def test_named_models_agree_with_what_their_exports_say():
    for model in ("ViT-B-32", "ViT-B-32-quickgelu", "RN50", "convnext_base", "ViT-B-16-SigLIP"):
        sidecar = OpenClip(model).sidecar()
        written = configuration_of(json.loads(json.dumps(sidecar)), "written")
        assert not differences(written, configuration_of(sidecar, "computed"), texts=True)


def test_check_finds_the_folder_of_an_expert(tmp_path):
    wrong = folder(tmp_path / "wrong", "preprocess_cfg", "mean", [0.4] * 3)
    problems = check(compose([f"pool.experts.mnist={wrong}", f"run_dir={tmp_path / 'run'}"]))
    assert any("preprocess_cfg.mean: found [0.4, 0.4, 0.4]" in problem for problem in problems)
