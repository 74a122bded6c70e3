"""Backbones: open_clip with the shipped zoo, torchvision with a small ResNet; both ends of an export."""

import json
import shutil

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional
from torchvision import models

from adamerge import Coefficients, ExpertPool, InputError, MergedModel, load_state_dict, zoo
from adamerge.backbones import OpenClip, Torchvision, ZeroShotHead, check_classes
from adamerge.checkpoints.checkpoint import MemoryCheckpoint, open_checkpoint
from adamerge.data import Task
from adamerge.results.export import export
from tests.support.toy import perturbed

NAMES = ("mnist", "greek")


class Images(torch.utils.data.Dataset):
    """Nothing but a number of classes."""

    def __init__(self, classes):
        self.classes = classes

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return torch.zeros(3, 28, 28), 0


def zoo_tasks():
    return {name: Task(Images(zoo.CLASSES[name]), templates=zoo.TEMPLATES) for name in NAMES}


# open_clip


@pytest.fixture(scope="module")
def clip():
    """Backbone, pool and heads of two of the zoo's tasks."""
    files = zoo.files()
    backbone = OpenClip(str(files), tokenizer=zoo.Tokenizer())
    experts = {name: files / "experts" / f"{name}.safetensors" for name in NAMES}
    pool = ExpertPool.from_files(files / "base.safetensors", experts, key_map=backbone.prefix)
    heads = backbone.heads(pool.source, {}, zoo_tasks())
    return backbone, pool, heads


def test_open_clip_encoder_takes_the_pools_parameters(clip):
    backbone, pool, heads = clip
    model = MergedModel(backbone.encoder(), pool, Coefficients(pool), heads)
    assert model.logits(torch.zeros(2, 3, 28, 28), "mnist").shape == (2, 10)
    assert "conv1.weight" in pool.names
    assert backbone.prefix == "visual."
    assert backbone.exclude == ()


def test_open_clip_heads_are_open_clips_own_zero_shot_classifiers(clip):
    heads = clip[2]
    model = open_clip.create_model(f"local-dir:{zoo.files()}", load_weights=False, pretrained_text=False).eval()
    model.load_state_dict(load_state_dict(zoo.files() / "base.safetensors"))
    images = torch.randn(2, 3, 28, 28)
    for name in NAMES:
        weight = open_clip.build_zero_shot_classifier(
            model, zoo.Tokenizer(), list(zoo.CLASSES[name]), list(zoo.TEMPLATES)
        )
        with torch.no_grad():
            features = model.encode_image(images)
            expected = model.logit_scale.exp() * functional.normalize(features, dim=-1) @ weight
            torch.testing.assert_close(heads[name](features), expected, rtol=1e-5, atol=1e-5)


def test_open_clip_heads_are_frozen_and_of_the_tasks_classes(clip):
    heads = clip[2]
    assert list(heads) == list(NAMES)
    assert all(isinstance(head, ZeroShotHead) for head in heads.values())
    assert not any(p.requires_grad for head in heads.values() for p in head.parameters())
    assert not torch.equal(heads["mnist"].weight, heads["greek"].weight)


def test_open_clip_preprocess_follows_the_models_configuration(clip):
    image = Image.new("RGB", (40, 56), (255, 255, 255))
    inputs = clip[0].preprocess()(image)
    assert inputs.shape == (3, 28, 28)
    torch.testing.assert_close(inputs, torch.ones(3, 28, 28))  # mean 0.5, std 0.5


def test_open_clip_export_loads_in_plain_open_clip_with_the_same_logits(clip, tmp_path):
    backbone, pool, heads = clip
    coefficients = Coefficients(pool, "row", constraint="none")
    coefficients.assign(torch.rand(coefficients.raw.shape))
    files = export(pool, coefficients, tmp_path, heads=heads, sidecar=backbone.sidecar())
    plain = open_clip.create_model(f"local-dir:{files['open_clip']}").eval()

    model = MergedModel(backbone.encoder(), pool, coefficients, heads)
    exported = load_state_dict(files["merged"])
    params = {name: exported[f"visual.{name}"].float() for name in pool.names}
    images = torch.randn(4, 3, 28, 28)
    with torch.no_grad():
        features = plain.encode_image(images)
        torch.testing.assert_close(features, model(images, params), rtol=1e-5, atol=1e-5)  # other kernels, by processor
        for task in NAMES:
            expected = model.logits(images, task, params)
            torch.testing.assert_close(heads[task](features), expected, rtol=1e-5, atol=1e-5)
            # and the export is the merge, but for the base's half precision
            torch.testing.assert_close(model.logits(images, task), expected, rtol=0, atol=0.1)
        base = model.logits(images, "mnist", pool.base)
    assert (base - model.logits(images, "mnist", params)).abs().max() > 0.5
    assert plain.visual.image_size == (28, 28)


def test_open_clip_export_again_replaces_the_weights_in_the_folder(clip, tmp_path):
    backbone, pool, _ = clip
    for value in (0.0, 0.5):
        coefficients = Coefficients(pool, "task", value)
        files = export(pool, coefficients, tmp_path, sidecar=backbone.sidecar())
    weights = files["open_clip"] / "open_clip_model.safetensors"
    assert weights.read_bytes() == files["merged"].read_bytes()
    assert json.loads((files["open_clip"] / "open_clip_config.json").read_text()) == backbone.sidecar()
    assert {path.name for path in files["open_clip"].iterdir()} == {weights.name, "open_clip_config.json"}


def test_open_clip_sidecar_of_a_named_model_is_what_open_clip_knows():
    sidecar = OpenClip("ViT-S-32-alt").sidecar()
    assert sidecar["model_cfg"] == open_clip.get_model_config("ViT-S-32-alt")
    read_back = PreprocessCfg(**json.loads(json.dumps(sidecar))["preprocess_cfg"])
    assert image_transform_v2(read_back, is_train=False)(Image.new("RGB", (300, 260))).shape == (3, 224, 224)


def test_open_clip_unknown_model_suggests():
    with pytest.raises(
        InputError, match=r"backbone\.model: open_clip knows no model 'VitB-32', .*Did you mean 'ViT-B-32"
    ):
        OpenClip("VitB-32")


def test_open_clip_folder_without_configuration_is_no_model(tmp_path):
    with pytest.raises(InputError, match="it is no folder with an open_clip_config"):
        OpenClip(str(tmp_path))


def backbone() -> OpenClip:
    return OpenClip(str(zoo.files()), tokenizer=zoo.Tokenizer())


def test_open_clip_base_without_some_tensors_is_refused():
    tensors = load_state_dict(zoo.files() / "base.safetensors")
    del tensors["visual.proj"]
    base = MemoryCheckpoint("base.safetensors", tensors | {"visual.prox": torch.zeros(1)})
    with pytest.raises(InputError, match=r"not a checkpoint of .*missing 'visual\.proj'; unexpected 'visual\.prox'"):
        backbone().heads(base, {}, zoo_tasks())


def test_open_clip_base_of_another_width_is_refused():
    tensors = load_state_dict(zoo.files() / "base.safetensors")
    base = MemoryCheckpoint("base.safetensors", tensors | {"visual.proj": torch.zeros(96, 32)})
    message = r"base\.safetensors: not a checkpoint of .*reshaped 'visual\.proj: expected \(96, 64\), found \(96, 32\)'"
    with pytest.raises(InputError, match=message):
        backbone().heads(base, {}, zoo_tasks())


def test_open_clip_base_in_the_models_own_folder_is_compared_when_it_is_read(tmp_path):
    shutil.copy(zoo.files() / "open_clip_config.json", tmp_path)
    tensors = load_state_dict(zoo.files() / "base.safetensors")
    del tensors["visual.proj"]
    save_file(tensors, tmp_path / "base.safetensors")
    own = OpenClip(str(tmp_path), tokenizer=zoo.Tokenizer())
    with pytest.raises(InputError, match=r"base\.safetensors: not a checkpoint of .*missing 'visual\.proj'"):
        own.heads(open_checkpoint(tmp_path / "base.safetensors"), {}, zoo_tasks())


def test_open_clip_folder_runs_no_code_of_its_tokenizer(tmp_path):
    config = json.loads((zoo.files() / "open_clip_config.json").read_text())
    files = {
        "tokenizer_config.json": {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}},
        "config.json": {"model_type": "bert"},
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "mine.py").write_text("raise SystemExit('run')")
    text = config["model_cfg"]["text_cfg"]
    base = open_checkpoint(zoo.files() / "base.safetensors")
    for options, message in (({"trust_remote_code": True}, "unknown key 'trust_remote_code'"), ({}, "no tokenizer")):
        text |= {"hf_tokenizer_name": "mine", "tokenizer_kwargs": options}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=message):
            OpenClip(str(tmp_path)).heads(base, {}, zoo_tasks())


def test_open_clip_base_of_another_architecture_is_found_from_its_header():
    base = open_checkpoint(zoo.files() / "base.safetensors")
    assert backbone().base_problems(base) == []
    (problem,) = OpenClip("ViT-B-32").base_problems(base)
    assert "not a checkpoint of backbone.model=ViT-B-32: missing " in problem
    assert "'text_projection: expected (512, 512), found (64, 64)'" in problem
    assert "backbone=open_clip backbone.model=NAME" in problem


def test_open_clip_task_without_class_names_is_refused():
    base = open_checkpoint(zoo.files() / "base.safetensors")
    with pytest.raises(InputError, match=r"data\.tasks\.mnist\.classes: a zero-shot head needs class names"):
        backbone().heads(base, {}, {"mnist": Task(adapt=[torch.zeros(1)])})


# torchvision


@pytest.fixture(scope="module")
def resnets():
    """State dicts of a base with 1,000 classes, and of two experts with 3 and 5."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = models.resnet18(weights=None).state_dict()
        experts = {}
        for name, classes in (("cats", 3), ("dogs", 5)):
            own = perturbed(base, 0.01)
            experts[name] = own | {"fc.weight": torch.randn(classes, 512), "fc.bias": torch.randn(classes)}
    return base, experts


@pytest.fixture(scope="module")
def resnet_pool(resnets):
    base, experts = resnets
    backbone = Torchvision("resnet18")
    return ExpertPool.from_state_dicts(base, experts, exclude=list(backbone.exclude))


def checkpoints_of(resnets):
    return MemoryCheckpoint("base", resnets[0]), {n: MemoryCheckpoint(f"{n}.pt", s) for n, s in resnets[1].items()}


def vision_tasks(cats=3, dogs=5):
    return {"cats": Task(Images("abcdefg"[:cats])), "dogs": Task(Images("abcdefg"[:dogs]))}


def test_torchvision_splits_each_experts_classifier_off_as_its_tasks_head(resnets, resnet_pool):
    backbone = Torchvision("resnet18")
    heads = backbone.heads(*checkpoints_of(resnets), vision_tasks())
    for name, classes in (("cats", 3), ("dogs", 5)):
        assert heads[name].weight.shape == (classes, 512)
        assert torch.equal(heads[name].weight, resnets[1][name]["fc.weight"])
        assert torch.equal(heads[name].bias, resnets[1][name]["fc.bias"])
    assert not any(name.startswith("fc.") for name in resnet_pool.names)
    model = MergedModel(backbone.encoder(), resnet_pool, Coefficients(resnet_pool), heads)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 512)
    assert model.logits(torch.zeros(1, 3, 32, 32), "dogs").shape == (1, 5)
    check_classes(vision_tasks(), heads, 512)


def test_torchvision_expert_parameters_and_head_are_the_expert(resnets, resnet_pool):
    backbone = Torchvision("resnet18")
    heads = backbone.heads(*checkpoints_of(resnets), vision_tasks())
    model = MergedModel(backbone.encoder(), resnet_pool, Coefficients(resnet_pool), heads)
    expert = models.resnet18(weights=None, num_classes=3).eval()
    expert.load_state_dict(resnets[1]["cats"], strict=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected, got = expert(images), model.logits(images, "cats", model.expert_parameters("cats"))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_torchvision_export_loads_strictly_in_torchvision_with_the_same_features(resnets, resnet_pool, tmp_path):
    backbone = Torchvision("resnet18")
    coefficients = Coefficients(resnet_pool, "layer", 0.4)
    files = export(resnet_pool, coefficients, tmp_path, sidecar=backbone.sidecar())
    assert "open_clip" not in files
    plain = models.resnet18(weights=None)
    plain.load_state_dict(load_state_dict(files["merged"]), strict=True)
    plain.fc = torch.nn.Identity()
    model = MergedModel(backbone.encoder(), resnet_pool, coefficients, {})
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(images), model(images), rtol=1e-4, atol=1e-4)


def test_check_classes_counts_that_differ_are_both_named(resnets):
    heads = Torchvision("resnet18").heads(*checkpoints_of(resnets), vision_tasks())
    with pytest.raises(InputError, match=r"data\.tasks\.dogs: the data set has 4 classes, but its head has 5"):
        check_classes(vision_tasks(dogs=4), heads, 512)
    check_classes({"dogs": Task(adapt=[torch.zeros(1)])}, heads, 512)  # nobody says how many there are


def test_torchvision_task_names_its_expert(resnets):
    tasks = {"kittens": Task(Images("abc"), expert="cats")}
    heads = Torchvision("resnet18").heads(*checkpoints_of(resnets), tasks)
    assert torch.equal(heads["kittens"].weight, resnets[1]["cats"]["fc.weight"])
    message = r"data\.tasks\.cat\.expert: no expert 'cat' in the pool.*Did you mean 'cats'"
    with pytest.raises(InputError, match=message):
        Torchvision("resnet18").heads(*checkpoints_of(resnets), {"cat": Task(Images("abc"))})


def test_torchvision_wrong_head_path_is_named(resnets):
    with pytest.raises(InputError, match=r"backbone\.head: resnet18 has no layer 'heads\.head'; .* is 'fc'"):
        Torchvision("resnet18", head="heads.head").encoder()
    with pytest.raises(InputError, match=r"backbone\.head: 'conv1' of resnet18 is Conv2d, expected Linear"):
        Torchvision("resnet18", head="conv1").encoder()
    with pytest.raises(InputError, match=r"cats\.pt: no classifier: 'head\.weight', 'head\.bias' missing"):
        Torchvision("resnet18", head="head").heads(*checkpoints_of(resnets), vision_tasks())


def test_torchvision_model_without_linear_layer_is_refused():
    with pytest.raises(InputError, match=r"backbone\.head: squeezenet1_1 has no layer 'fc', and no Linear layer"):
        Torchvision("squeezenet1_1").encoder()


def test_torchvision_unknown_model_suggests():
    with pytest.raises(InputError, match=r"torchvision knows no model 'resnet81'\. Did you mean 'resnet1"):
        Torchvision("resnet81")


def test_torchvision_preprocess_is_that_of_the_models_weights():
    inputs = Torchvision("resnet18").preprocess()(Image.new("RGB", (300, 260)))
    assert inputs.shape == (3, 224, 224)
    assert Torchvision("resnet18").sidecar() is None


def test_expert_files_with_their_own_classifiers_make_a_pool(resnets, tmp_path):
    paths = {}
    for name, tensors in {"base": resnets[0], **resnets[1]}.items():
        paths[name] = tmp_path / f"{name}.safetensors"
        save_file(tensors, paths[name])
    backbone = Torchvision("resnet18")
    base = paths.pop("base")
    pool = ExpertPool.from_files(base, paths, key_map=backbone.prefix, exclude=backbone.exclude)
    assert len(pool.names) == 60
    heads = backbone.heads(pool.source, {name: pool.checkpoint(name) for name in pool.expert_names}, vision_tasks())
    assert heads["dogs"].weight.shape == (5, 512)
