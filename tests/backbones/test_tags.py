"""open_clip's tags and other libraries' configurations: the right base, preprocessing and activation, offline."""

import json

import huggingface_hub
import pytest
import torch
from omegaconf import OmegaConf
from open_clip import factory, pretrained
from safetensors.torch import save_file
from transformers import CLIPVisionModel

from adamerge import ExpertPool, InputError
from adamerge.backbones import OpenClip
from adamerge.checkpoints.checkpoint import MemoryCheckpoint
from adamerge.commands.run import check_files
from adamerge.commands.run.assembly import build_pool
from adamerge.data import Task
from tests.support.clips import IMAGES, MODEL_CFG, hugging_face, open_clip_folder, open_clip_model

ENTRY = pretrained._pcfg(hf_hub="some/clip/", mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0), resize_mode="squash")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A model that open_clip knows by name, with tags, and an empty cache of the Hub without a network."""
    monkeypatch.setitem(factory._MODEL_CONFIGS, "Tiny", MODEL_CFG | {"quick_gelu": False})
    monkeypatch.setitem(factory._MODEL_CONFIGS, "Tiny-quickgelu", MODEL_CFG)
    tags = {"plain": ENTRY, "openai": ENTRY | {"quick_gelu": True}}
    monkeypatch.setitem(pretrained._PRETRAINED, "Tiny", tags)
    monkeypatch.setitem(pretrained._PRETRAINED, "Tiny-quickgelu", tags)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return open_clip_model(open_clip_folder(tmp_path / "model"))


def fill_cache(hub, model, name="open_clip_model.safetensors"):
    """Lay a repository out as the Hub's client does."""
    folder = hub / "models--some--clip"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    path = folder / "snapshots" / "abc" / name
    if name.endswith("safetensors"):
        save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, path)
    else:
        torch.save(model.state_dict(), path)
    return path


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_tag_in_the_cache_is_the_base_without_a_network(tiny, tmp_path, name):
    path = fill_cache(tmp_path / "hub", tiny, name)
    backbone = OpenClip("Tiny-quickgelu", pretrained="openai")
    assert backbone.base() == backbone.base(download=False) == path
    config = backbone.sidecar()["preprocess_cfg"]
    assert (tuple(config["mean"]), config["resize_mode"], config["size"]) == ((0.1, 0.2, 0.3), "squash", 16)
    assert OpenClip("Tiny").sidecar()["preprocess_cfg"]["resize_mode"] == "shortest"


def test_tag_that_is_not_in_the_cache_is_downloaded_only_by_a_run(tiny, monkeypatch):
    backbone = OpenClip("Tiny", pretrained="plain")
    assert backbone.base(download=False) is None
    with pytest.raises(InputError, match=r"pretrained=plain: not in the cache, and some/clip cannot be downloaded: "):
        backbone.base()
    asked = []
    monkeypatch.setattr(pretrained, "download_pretrained", lambda config: asked.append(config) or "file.bin")
    assert str(backbone.base()) == "file.bin"
    assert asked == [ENTRY]


def test_tag_of_another_activation_names_the_model(tiny):
    message = (
        r"pretrained=openai: these weights were trained with quick_gelu, but backbone\.model=Tiny computes gelu\. "
        r"Set backbone\.model=Tiny-quickgelu"
    )
    with pytest.raises(InputError, match=message):
        OpenClip("Tiny", pretrained="openai")
    with pytest.raises(InputError, match=r"trained with gelu, .* computes quick_gelu\. Set backbone\.model=Tiny\."):
        OpenClip("Tiny-quickgelu", pretrained="plain")


def test_unknown_tag_suggests(tiny):
    with pytest.raises(
        InputError, match=r"expected a file, or one of Tiny's tags 'plain', 'openai', found 'plan'.*'plain'"
    ):
        OpenClip("Tiny", pretrained="plan")
    folder = "ViT-B-32"
    with pytest.raises(InputError, match="Did you mean 'laion2b_s34b_b79k'"):
        OpenClip(folder, pretrained="laion2b_s34b_b97k")


def test_tags_of_the_benchmarks_models_are_known():
    for model in ("ViT-B-32-quickgelu", "ViT-B-16-quickgelu", "ViT-L-14-quickgelu"):
        assert OpenClip(model, pretrained="openai").sidecar()["model_cfg"]["quick_gelu"] is True
    assert OpenClip("ViT-B-32", pretrained="laion2b_s34b_b79k").sidecar()["preprocess_cfg"]["size"] == 224


def test_file_as_pretrained_is_the_base(tiny, tmp_path):
    path = tmp_path / "base.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tiny.state_dict().items()}, path)
    assert OpenClip("Tiny-quickgelu", pretrained=str(path)).base() == path
    assert OpenClip(str(tmp_path / "model"), pretrained=str(path)).base(download=False) == path
    assert OpenClip("Tiny").base() is None
    with pytest.raises(InputError, match=r"backbone\.pretrained: expected a file, found 'openai'"):
        OpenClip(str(tmp_path / "model"), pretrained="openai")


# In a run


def node(**pool):
    return OmegaConf.create({"pool": pool})


def test_pool_without_a_base_takes_the_tags(tiny, tmp_path):
    path = fill_cache(tmp_path / "hub", tiny)
    tensors = {key: tensor + 0.1 * torch.randn_like(tensor) for key, tensor in tiny.state_dict().items()}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "cars.safetensors")
    config = node(base=None, experts={"cars": str(tmp_path / "cars.safetensors")})
    backbone = OpenClip("Tiny-quickgelu", pretrained="openai")
    pool = build_pool(config, backbone)
    assert pool.source.name == str(path)
    problems = []
    headers = check_files.check_pool(config, backbone, problems)
    assert problems == []
    assert set(headers.shapes) == set(pool.names)


def test_check_of_a_tag_that_is_not_here_looks_at_the_experts_alone(tiny, tmp_path, caplog):
    config = node(base="???", experts={"cars": str(tmp_path / "cars.safetensors")})
    problems = []
    with caplog.at_level("INFO"):
        check_files.check_pool(config, OpenClip("Tiny", pretrained="plain"), problems)
    assert "backbone.pretrained=plain: its weights are not in the cache; the run downloads them first." in caplog.text
    (problem,) = problems
    assert "cars.safetensors: no such file" in problem
    with pytest.raises(InputError, match=r"pool\.base: must be given"):
        check_files.check_pool(config, OpenClip("Tiny"), problems)


# Hugging Face's configurations


@pytest.fixture
def saved(tmp_path):
    model = hugging_face()
    model.save_pretrained(tmp_path / "base")
    tower = CLIPVisionModel(model.config.vision_config)
    tower.save_pretrained(tmp_path / "expert")
    return tmp_path


def test_hugging_face_base_gives_the_heads_that_open_clip_weights_give(tiny, saved):
    backbone = OpenClip("Tiny-quickgelu", tokenizer=lambda texts: torch.full((len(texts), 8), 3))
    pool = ExpertPool.from_files(saved / "base", {"cars": saved / "expert"}, key_map="visual.")
    heads = backbone.heads(pool.source, {"cars": pool.checkpoint("cars")}, {"cars": Task([IMAGES], classes=["a", "b"])})
    plain = MemoryCheckpoint("plain", {key: pool.source.get(key) for key in pool.source.keys})
    expected = backbone.heads(plain, {}, {"cars": Task([IMAGES], classes=["a", "b"])})
    assert torch.equal(heads["cars"].weight, expected["cars"].weight)


def test_hugging_face_file_of_another_activation_is_refused(tiny, saved):
    message = (
        r"base/config\.json: hidden_act: these weights were trained with quick_gelu, .* Set backbone\.model=Tiny-quick"
    )
    config = node(base=str(saved / "base" / "model.safetensors"), experts={"cars": str(saved / "expert")})
    pool = build_pool(config, OpenClip("Tiny"))
    with pytest.raises(InputError, match=message):
        OpenClip("Tiny").heads(pool.source, {}, {})
    problems = []
    check_files.check_pool(config, OpenClip("Tiny"), problems)
    assert len(problems) == 2  # base and expert
    assert "expert/config.json: hidden_act" in problems[1]
    folder = open_clip_folder(saved / "own")
    content = json.loads((folder / "open_clip_config.json").read_text())
    content["model_cfg"]["quick_gelu"] = False
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"Set backbone\.model to a folder whose model_cfg has quick_gelu: true\."):
        OpenClip(str(folder)).heads(pool.source, {}, {})


def test_hugging_face_folder_as_model_says_how_to_convert_it(saved):
    with pytest.raises(InputError, match=r"adamerge convert .*base --to open_clip --out FOLDER"):
        OpenClip(str(saved / "base"))
