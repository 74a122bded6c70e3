"""Exports in other libraries' formats, loaded back there: the same logits, through the command."""

import json
import re
from functools import partial

import huggingface_hub
import onnx
import onnxruntime
import open_clip
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import TensorDataset
from torchvision import models
from transformers import CLIPModel, CLIPProcessor

from adamerge import GuardError, InputError
from adamerge.backbones import OpenClip
from adamerge.checkpoints.checkpoint import load_state_dict
from adamerge.commands.cli import main
from adamerge.commands.run.backbone_of import backbone_of, named_backbone
from adamerge.data import Task, UnlabeledTasks
from adamerge.results import formats
from adamerge.results.export import load_heads
from adamerge.results.formats import card, hugging_face, merged, torchvision, upload
from adamerge.results.formats import onnx as onnx_format
from adamerge.results.formats.card import ingredients, licence_of
from adamerge.results.report.facts import learned_of
from adamerge.system.files import atomic_folder, save_json
from tests.support.clips import IMAGES, OPEN_CLIP, open_clip_folder, open_clip_model
from tests.support.small_resnet import save
from tests.support.toy import perturbed

TEXTS = ["a photo of a cat.", "Two  dogs & 3 birds, isn't it?", "größe", ""]


class Labelled(TensorDataset):
    classes = ("cat", "dog", "bird")


def data(shape=(3, 16, 16), **options):
    """Two tasks of random images; the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    tasks = {}
    for name in ("cars", "dtd"):
        images = torch.randn(6, *shape, generator=generator)
        tasks[name] = Task(dataset=Labelled(images, torch.randint(0, 3, (6,), generator=generator)))
    return UnlabeledTasks(tasks, batch_size=2, **options)


def ends(code, *arguments):
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    assert done.value.code == code


def open_merged(folder):
    return formats.open_merged(folder, backbone_of)


def export_as(folder, target, out, model=None, **options):
    known = backbone_of if model is None else lambda *_: named_backbone(model, target)
    return formats.export_as(folder, target, out, known, **options)


def adapted(folder, base, backbone, *overrides, shape=(3, 16, 16), licences=(None, None, None)):
    """Adapt two experts, perturbed from a base, for two steps; return the run's folder."""
    torch.manual_seed(1)
    is_clip = any(key.startswith("visual.") for key in base)
    experts = {name: perturbed(base, 0.05) for name in ("cars", "dtd")}
    if is_clip:
        experts = {n: {k: t if k.startswith("visual.") else base[k] for k, t in e.items()} for n, e in experts.items()}
    paths = save({"base": base, **experts}, folder)
    entries = [{"file": path.name, **({"licence": found} if found else {})}
               for path, found in zip(paths.values(), licences, strict=True)]  # fmt: skip
    pool = {"base": entries[0], "experts": dict(zip(experts, entries[1:], strict=True))}
    OmegaConf.save(OmegaConf.create(pool), folder / "pool.yaml")
    (folder / "configs" / "data").mkdir(parents=True)
    node = {"_target_": f"{__name__}.data", "shape": list(shape)}
    OmegaConf.save(OmegaConf.create(node), folder / "configs" / "data" / "random.yaml")
    options = ["--config-dir", folder / "configs", "data=random", "pool=files", f"pool.file={folder / 'pool.yaml'}"]
    quick = ["steps=2", "trainer=cpu", "logger=none", "references=false", "report=false", "constraint=none"]
    quick += ["optimizer.lr=0.1"]
    ends(0, "adapt", *options, *backbone, *quick, *overrides, f"run_dir={folder / 'run'}")
    return folder / "run"


@pytest.fixture(scope="module")
def clip_run(tmp_path_factory):
    """A run of a tiny CLIP with OpenAI's vocabulary."""
    folder = tmp_path_factory.mktemp("clip")
    text = {**OPEN_CLIP["model_cfg"]["text_cfg"], "vocab_size": 49408, "context_length": 12}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OPEN_CLIP, "model_cfg", {**OPEN_CLIP["model_cfg"], "text_cfg": text})
        model = open_clip_model(open_clip_folder(folder / "model"))
    base = {key: tensor.detach().clone().contiguous() for key, tensor in model.state_dict().items()}
    backbone = ["backbone=open_clip", f"backbone.model={folder / 'model'}"]
    return adapted(folder, base, backbone, licences=("MIT", "Apache-2.0", None))


@torch.no_grad()
def expected_logits(run, images=IMAGES):
    """Logits of every task by what the run's own files say."""
    opened = open_merged(run)
    features = opened.encoder()(images)
    return {task: opened.head(task)(features) for task in opened.heads}


def header_of(card):
    return yaml.safe_load(card.split("---\n")[1])


# Each format


def test_open_clip_export_loads_in_open_clip_with_equal_logits(clip_run, tmp_path):
    ends(0, "export", clip_run, "--to", "open_clip", "--out", tmp_path / "out")
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'out'}")
    heads, _ = load_heads(tmp_path / "out" / "heads.safetensors")
    with torch.no_grad():
        features = torch.nn.functional.normalize(model.encode_image(IMAGES), dim=-1)
    for task, expected in expected_logits(clip_run).items():
        found = heads[task]["scale"] * features @ heads[task]["weight"]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    image = Image.new("RGB", (20, 30), (200, 10, 10))
    assert torch.equal(preprocess(image), OpenClip(str(clip_run / "open_clip")).preprocess()(image))


def test_hf_export_loads_in_transformers_with_equal_logits_tokens_and_pixels(clip_run, tmp_path, capsys):
    ends(0, "export", clip_run, "--to", "hf", "--out", tmp_path / "out")
    assert str(tmp_path / "out" / "model.safetensors") in capsys.readouterr().out
    theirs = CLIPModel.from_pretrained(tmp_path / "out").eval()
    own = open_clip.create_model(f"local-dir:{clip_run / 'open_clip'}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip_run / 'open_clip'}")
    processor = CLIPProcessor.from_pretrained(tmp_path / "out")
    texts = processor(text=TEXTS, return_tensors="pt", padding="max_length", truncation=True)["input_ids"]
    tokens = tokenizer(TEXTS)
    for row, other in zip(texts, tokens, strict=True):
        end = int(other.argmax()) + 1
        assert torch.equal(row[:end], other[:end])
    with torch.no_grad():
        expected = own.get_logits(IMAGES, tokens)[0]
        found = theirs(input_ids=texts, pixel_values=IMAGES).logits_per_image
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    image = Image.effect_noise((40, 24), 80).convert("RGB")
    pixels = processor(images=image, return_tensors="pt")["pixel_values"][0]
    difference = (pixels - OpenClip(str(clip_run / "open_clip")).preprocess()(image)).abs().max()
    assert difference < 0.03  # resized as floats there, as bytes here: two steps of 255


@pytest.mark.slow
def test_onnx_export_gives_each_tasks_logits_for_any_batch_size(clip_run, tmp_path):
    ends(0, "export", clip_run, "--to", "onnx", "--out", tmp_path / "out")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    assert [output.name for output in session.get_outputs()] == ["cars", "dtd"]
    for count in (1, 5):
        images = torch.randn(count, 3, 16, 16)
        expected = expected_logits(clip_run, images)
        for task, logits in zip(expected, session.run(list(expected), {"images": images.numpy()}), strict=True):
            torch.testing.assert_close(torch.from_numpy(logits), expected[task], rtol=1e-4, atol=1e-4)
    (logits,) = session.run(["dtd"], {"images": IMAGES.numpy()})  # one alone
    assert logits.shape == (3, 3)
    facts = {entry.key: entry.value for entry in onnx.load(tmp_path / "out" / "model.onnx").metadata_props}
    assert json.loads(facts["classes"])["cars"] == ["cat", "dog", "bird"]
    assert json.loads(facts["preprocessing"]) == json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    assert "mean [0.5, 0.5, 0.5], std [0.5, 0.5, 0.5]" in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture(scope="module")
def torchvision_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchvision")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = models.shufflenet_v2_x0_5(weights=None, num_classes=3).state_dict()
    backbone = ["backbone=torchvision", "backbone.model=shufflenet_v2_x0_5", "batch_norm.batches=2"]
    return adapted(folder, base, backbone, shape=(3, 64, 64))


@pytest.mark.parametrize("task", [None, "dtd"])
def test_torchvision_export_loads_strictly_in_torchvision_with_equal_logits(torchvision_run, tmp_path, task):
    chosen = [] if task is None else ["--task", task]
    ends(0, "export", torchvision_run, "--to", "torchvision", *chosen, "--out", tmp_path / "out")
    tensors = torch.load(tmp_path / "out" / "model.pth", weights_only=True)
    model = models.get_model("shufflenet_v2_x0_5", num_classes=3).eval()
    model.load_state_dict(tensors, strict=True)
    base = load_state_dict(torchvision_run.parent / "base.safetensors")
    assert torch.equal(tensors["fc.weight"], base["fc.weight"]) == (task is None)
    assert not torch.equal(tensors["conv1.1.running_mean"], base["conv1.1.running_mean"])  # recalibrated
    if task is not None:
        images = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            expected = expected_logits(torchvision_run, images)[task]
            torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("The classifier is the base's" in card) == (task is None)
    assert header_of(card)["library_name"] == "torchvision"
    settings = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    assert settings["crop_size"] == [224]
    assert settings["interpolation"] == "bilinear"


@pytest.mark.slow
def test_onnx_export_of_a_network_with_batch_norm(torchvision_run, tmp_path):
    files, address = export_as(torchvision_run, "onnx", tmp_path / "out")
    assert address is None
    assert {"model.onnx", "batch_norm.safetensors", "README.md"} <= {path.name for path in files}
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    assert session.get_inputs()[0].shape[1:] == [3, 224, 224]


@pytest.mark.slow
def test_onnx_export_with_weights_beside_it_lists_them(torchvision_run, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_format, "_LIMIT", 0)
    export_as(torchvision_run, "onnx", tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx.data").is_file()
    assert "| `model.onnx.data` | its weights, which have to lie beside model.onnx |" in (
        tmp_path / "out" / "README.md"
    ).read_text(encoding="utf-8")


def test_torchvision_export_of_a_head_that_is_not_linear_is_refused(torchvision_run, tmp_path, monkeypatch):
    found = open_merged(torchvision_run)
    monkeypatch.setitem(found.heads, "dtd", {"weight": torch.ones(3, 2), "scale": torch.ones(())})
    with pytest.raises(
        InputError, match=r"task 'dtd': expected a Linear head, .* found ZeroShotHead\. Choose --to onnx"
    ):
        torchvision.write(found, tmp_path, "dtd")


def test_open_merged_imports_the_code_of_others_only_when_trusted_and_none_of_the_working_directory(
    torchvision_run, tmp_path, monkeypatch, caplog
):
    (tmp_path / "merged.safetensors").write_bytes((torchvision_run / "merged.safetensors").read_bytes())
    (tmp_path / "stray.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    save_json({"config": {"backbone": {"_target_": "stray.Backbone"}}}, tmp_path / "merge.json")
    with pytest.raises(InputError, match=r"merge\.json: backbone: stray\.Backbone is not on adamerge's list of names"):
        open_merged(tmp_path)
    trusted = partial(backbone_of, trust_code=True)
    with pytest.raises(InputError, match=r"backbone: stray\.Backbone would be imported from .*stray\.py"):
        formats.open_merged(tmp_path, trusted)
    save_json({"config": {"backbone": {"_target_": "fractions.Fraction"}}}, tmp_path / "merge.json")
    with caplog.at_level("INFO"):
        formats.open_merged(tmp_path, trusted)
    assert "backbone: imports fractions.Fraction from" in caplog.text


def test_merge_without_data_names_its_model_and_has_no_coefficients(torchvision_run, tmp_path):
    pool = torchvision_run.parent / "pool.yaml"
    (tmp_path / "pool.yaml").write_text(
        pool.read_text().replace("file: ", f"file: {pool.parent}/") + "exclude: ['fc.*']\n"
    )
    ends(0, "merge", "--rule", "weight_average", "--pool", tmp_path / "pool.yaml", "--out", tmp_path / "merged")
    arguments = ["export", tmp_path / "merged", "--to", "torchvision", "--out", tmp_path / "out"]
    ends(2, *arguments)
    ends(0, *arguments, "--model", "shufflenet_v2_x0_5")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The rule is `WeightAverage()`, without data" in card
    assert "coefficients.png" not in card
    with pytest.raises(InputError, match=r"no heads\.safetensors, so that there are no logits"):
        export_as(tmp_path / "merged", "onnx", tmp_path / "other", model="ViT-B-32")


# timm encoders inside open_clip


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["test_vit", "test_resnet"])
def test_timm_encoders_inside_open_clip_are_models_like_the_others(tmp_path, monkeypatch, encoder):
    vision = {"image_size": 32, "timm_model_name": encoder, "timm_model_pretrained": False, "timm_pool": "avg",
              "timm_proj": "linear"}  # fmt: skip
    vision |= {"timm_pool": "token"} if encoder == "test_vit" else {}
    text = {**OPEN_CLIP["model_cfg"]["text_cfg"], "vocab_size": 49408}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    preprocess = {**OPEN_CLIP["preprocess_cfg"], "size": 32}
    monkeypatch.setitem(OPEN_CLIP, "model_cfg", config)
    monkeypatch.setitem(OPEN_CLIP, "preprocess_cfg", preprocess)
    model = open_clip_model(open_clip_folder(tmp_path / "model"))
    base = {key: tensor.detach().clone().contiguous() for key, tensor in model.state_dict().items()}
    backbone = ["backbone=open_clip", f"backbone.model={tmp_path / 'model'}", "batch_norm.batches=2"]
    run = adapted(tmp_path, base, backbone, shape=(3, 32, 32))
    assert (run / "batch_norm.safetensors").exists() == (encoder == "test_resnet")
    images = torch.randn(2, 3, 32, 32)
    expected = expected_logits(run, images)
    export_as(run, "open_clip", tmp_path / "open_clip")
    plain = open_clip.create_model(f"local-dir:{tmp_path / 'open_clip'}").eval()
    with torch.no_grad():
        features = plain.encode_image(images)
        torch.testing.assert_close(open_merged(run).head("cars")(features), expected["cars"], rtol=1e-4, atol=1e-4)
    export_as(run, "onnx", tmp_path / "onnx")
    with pytest.raises(InputError, match=rf"timm_model_name='{encoder}'.* has no place in Hugging Face's CLIP"):
        export_as(run, "hf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


# The card, and what lies beside


def test_card_tells_ingredients_licences_method_metrics_and_shows_the_coefficients(clip_run, tmp_path):
    export_as(clip_run, "open_clip", tmp_path / "my-merge")
    card = (tmp_path / "my-merge" / "README.md").read_text()
    header = header_of(card)
    assert header["license"] == "unknown"  # one is not stated
    assert header["library_name"] == "open_clip"
    assert header["pipeline_tag"] == "zero-shot-image-classification"
    assert {"merge", "adamerge"} <= set(header["tags"])
    (entry,) = header["model-index"]
    assert [result["dataset"]["name"] for result in entry["results"]] == ["cars", "dtd"]
    assert {result["metrics"][0]["name"] for result in entry["results"]} == {"accuracy"}
    assert "# my-merge" in card
    hashes = json.loads((clip_run / "merge.json").read_text())["hashes"]
    for name, licence in (("base", "MIT"), ("cars", "Apache-2.0"), ("dtd", "not stated")):
        assert f"{name}.safetensors | {licence} | `{hashes[name]}` |" in card
    assert "learned in 2 steps on unlabeled inputs, none of which was scored: objective `Imitation(" in card
    for name in ("open_clip_model", "heads", "coefficients"):
        assert f"| `{name}.{'json' if name == 'coefficients' else 'safetensors'}` | " in card
    assert "| `adamerge.json` | " in card
    assert "batch_norm.safetensors" not in card
    assert "Activation: QuickGELU." in card
    assert "Preprocessing of images: size 16" in card
    told = json.loads((clip_run / "merge.json").read_text())["stated"]
    assert told == json.loads((tmp_path / "my-merge" / "adamerge.json").read_text())["stated"]
    assert told == {
        "activation": "QuickGELU",
        "preprocessing": OpenClip(str(clip_run / "open_clip")).sidecar()["preprocess_cfg"],
    }
    assert "![Coefficients](coefficients.png)" in card
    assert (tmp_path / "my-merge" / "coefficients.png").read_bytes().startswith(b"\x89PNG")
    assert "| adapt |" in card
    assert "adapt --config-dir" in card
    facts = json.loads((tmp_path / "my-merge" / "adamerge.json").read_text())
    assert facts["ingredients"]["cars"]["sha256"] == hashes["cars"]
    for text in (card, json.dumps(facts)):
        assert str(clip_run.parent) not in text  # nothing of this machine's folders


def test_card_calls_scores_by_their_names():
    row = {"per_task": {"law": 0.5}, "mean": 0.5, "interval": [0.4, 0.6], "measures": {"KL": {"law": 0.25}}}
    row |= {"calibration_error": {}, "uses_labels": False}
    scores = {"metrics": {"law": "exact match"}, "measures": {"KL": {"unit": "nats", "lower_is_better": True}}}
    recipe = {"config": {"name": "own"}, "metrics": {"own": row}, "scores": scores}
    usage = merged.Usage("transformers", "text-generation", "", {}, {})
    (result,) = yaml.safe_load(card._header("x", recipe, usage))["model-index"][0]["results"]
    assert result["metrics"][0] | {"value": 0.5} == {"type": "exact match", "name": "exact match", "value": 0.5}
    assert "score, %" in card._scores(recipe)
    assert "KL, nats" in card._scores(recipe)


@pytest.mark.parametrize(("target", "is_text"), [("open_clip", True), ("hf", True), ("hf", False)])
def test_code_of_the_card_gives_the_merges_logits_and_classes(clip_run, tmp_path, monkeypatch, capsys, target, is_text):
    if not is_text:
        monkeypatch.setattr(hugging_face, "write_tokenizer", lambda sidecar, folder: False)
    export_as(clip_run, target, tmp_path / "out")
    blocks = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    image = Image.new("RGB", (16, 16), (200, 10, 60))
    names = {"image": image}
    capsys.readouterr()
    for block in blocks:
        exec(block.replace("FOLDER", str(tmp_path / "out")), names)
    expected = expected_logits(clip_run, OpenClip(str(clip_run / "open_clip")).preprocess()(image)[None])["cars"]
    torch.testing.assert_close(names["logits"], expected, rtol=1e-4, atol=1e-4)
    assert capsys.readouterr().out.splitlines()[-1] == Labelled.classes[expected.argmax()]


def test_card_without_matplotlib_has_no_picture(clip_run, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    export_as(clip_run, "open_clip", tmp_path / "out")
    assert not (tmp_path / "out" / "coefficients.png").exists()
    assert "![" not in (tmp_path / "out" / "README.md").read_text()
    assert "No coefficients.png: matplotlib is not installed" in caplog.text


def test_ingredients_of_the_hub_and_of_a_tag_are_named():
    pool = {"base": None, "experts": {"cars": "hf://org/clip-cars@abc"}, "licences": {"cars": "mit"}}
    backbone = {"model": "ViT-B-32", "pretrained": "laion2b_s34b_b79k"}
    found = ingredients({"config": {"pool": pool, "backbone": backbone}, "hashes": {"base": "1", "cars": "2"}})
    assert found["base"]["source"] == "ViT-B-32, pretrained=laion2b_s34b_b79k"
    assert found["cars"] == {"source": "hf://org/clip-cars@abc", "licence": "mit", "sha256": "2"}
    assert licence_of(["cc-by-4.0", "CC-BY-4.0"]) == "cc-by-4.0"
    assert licence_of(["of my own", "of my own"]) == "other"


def test_card_names_no_folder_of_this_machine():
    command = ["/home/alice/bin/adapt", "pool.file=/home/al ice/my zoo/pool.yaml", "--out=~/x/run", "/home/alice",
               "e={a: '/data/bob b/a.pt', b: hf://org/n@abc}", "../alice/y", "objective=entropy"]  # fmt: skip
    assert card._shown(command) == "adapt pool.file=... --out=... ... e=... ... objective=entropy"
    pool = {"base": None, "experts": {"cars": "/home/alice/cars/", "dtd": "/home/alice/dtd.pt"}}
    backbone = {"model": "/home/alice/models/tiny", "pretrained": "/home/alice/base.pt"}
    found = ingredients({"config": {"pool": pool, "backbone": backbone}})
    assert [part["source"] for part in found.values()] == ["tiny, pretrained=base.pt", "cars", "dtd.pt"]


def test_card_tells_how_the_coefficients_were_learned():
    recipe = {"config": {"objective": "Imitation", "granularity": "row", "steps": 30}, "protocol": "transductive"}
    assert card._method(recipe) == (
        "Its coefficients were learned in 30 steps on the scored inputs, unlabeled: objective `Imitation`, granularity "
        "`row`."
    )


def test_coefficients_are_read_by_label_from_either_file(tmp_path):
    content = {"experts": ["a", "b"], "coefficients": {"a": {"w": [0.0, 1.0], "v": 0.5}, "b": {"w": [1, 1], "v": [2]}}}
    learned = learned_of(content, tmp_path)
    assert learned.experts == ["a", "b"]
    assert {label: values.tolist() for label, values in learned.values.items()} == {
        "w": [[0, 1], [1, 1]],
        "v": [[0.5], [2]],
    }
    save_file({"w": torch.tensor([[1.0, 3.0], [5.0, 5.0]])}, tmp_path / "large.safetensors")
    learned = learned_of({"experts": ["a", "b"], "tensors": "large.safetensors"}, tmp_path)
    assert learned.values["w"].mean(1).tolist() == [2, 5]


# Refusals


def test_nothing_is_left_where_the_other_library_computes_something_else(clip_run, tmp_path, monkeypatch):
    encoder = merged.MergedFolder.encoder
    monkeypatch.setattr(
        merged.MergedFolder, "encoder", lambda self: torch.nn.Sequential(encoder(self), torch.nn.ReLU())
    )
    with pytest.raises(
        GuardError, match=r"in open_clip, loaded back, differs from the merge by .* nothing was exported"
    ):
        export_as(clip_run, "open_clip", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_wrong_folders_and_options_are_refused(clip_run, torchvision_run, tmp_path, capsys):
    ends(2, "export", clip_run, "--to", "torchvision", "--out", tmp_path / "out")
    assert "expected a merge of torchvision models, found OpenClip" in capsys.readouterr().err
    ends(2, "export", torchvision_run, "--to", "hf", "--out", tmp_path / "out")
    assert "expected a merge of open_clip models, found Torchvision shufflenet" in capsys.readouterr().err
    ends(2, "export", clip_run, "--to", "hf")
    assert "--to hf: give --out FOLDER" in capsys.readouterr().err
    ends(2, "export", clip_run, "--upload", "a/b", "--out", tmp_path / "out")
    assert "--upload: goes with --to" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"expected a merge, merged\.safetensors, found none"):
        export_as(tmp_path, "hf", tmp_path / "out")
    with pytest.raises(InputError, match=r"--task cras: expected one of .*'cars', 'dtd', found 'cras'\. Did you mean"):
        export_as(torchvision_run, "torchvision", tmp_path / "out", task="cras")
    with pytest.raises(InputError, match=r"--task cars: a CLIP has no classifier of its own"):
        export_as(clip_run, "hf", tmp_path / "out", task="cars")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(InputError, match=r"--out .*used: expected a new folder, found one with files"):
        export_as(clip_run, "hf", tmp_path / "used")
    assert not (tmp_path / "out").exists()


def test_atomic_folder_is_whole_or_not_there(tmp_path):
    def write(text):
        with atomic_folder(tmp_path / "a") as folder:
            (folder / "file").write_text(text)

    with pytest.raises(TypeError):  # after the file was opened
        write(0)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()  # an empty one is taken
    with atomic_folder(tmp_path / "a") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("whole")
        assert list((tmp_path / "a").iterdir()) == []
    assert (tmp_path / "a" / "inner" / "file").read_text() == "whole"
    with pytest.raises(OSError, match="not empty"):
        write("other")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "inner", "file"]


# Upload


class Hub:
    """Stands in for the Hub's client."""

    endpoint = "https://hub"

    def __init__(self, private=None, fails=None, **facts):
        self.private, self.fails, self.calls = private, fails, []

    def __call__(self, **facts):
        return self

    def create_repo(self, repository, *, private, exist_ok):
        if self.fails:
            raise self.fails
        self.calls.append(("create", repository, private))
        self.private = private if self.private is None else self.private

    def repo_info(self, repository):
        return self

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))


@pytest.fixture
def hub(monkeypatch):
    found = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", found)
    return found


def test_upload_goes_to_a_private_repository_unless_asked_otherwise(clip_run, tmp_path, hub, capsys):
    ends(0, "export", clip_run, "--to", "open_clip", "--out", tmp_path / "a", "--upload", "org/my-clip")
    create, sent = hub.calls
    assert create == ("create", "org/my-clip", True)
    assert sent[:2] == ("upload", "org/my-clip")
    assert {"README.md", "open_clip_model.safetensors", "coefficients.json"} <= set(sent[2])
    assert "merge.json" not in sent[2]  # it names folders of this machine
    assert "https://hub/org/my-clip" in capsys.readouterr().out
    assert "# my-clip" in (tmp_path / "a" / "README.md").read_text()
    hub.calls.clear()
    assert upload.upload(tmp_path / "a", "org/other", public=True) == "https://hub/org/other"
    assert hub.calls[0] == ("create", "org/other", False)


def test_export_without_upload_never_talks_to_the_hub(clip_run, tmp_path, hub):
    export_as(clip_run, "open_clip", tmp_path / "out")
    assert hub.calls == []


def test_upload_into_a_public_repository_needs_the_word(tmp_path, hub):
    hub.private = False
    with pytest.raises(InputError, match=r"--upload org/open: the repository is public already, .* Add --public if"):
        upload.upload(tmp_path, "org/open")
    assert [call[0] for call in hub.calls] == ["create"]
    upload.upload(tmp_path, "org/open", public=True)


def test_upload_that_fails_says_where_the_export_is(tmp_path, hub):
    import httpx

    hub.fails = httpx.ConnectError("Name or service not known")
    with pytest.raises(
        InputError, match=r"refused or cannot be reached: Name or service not known The export itself is"
    ):
        upload.upload(tmp_path, "org/name")
    for name in ("name", "a/b/c", "a/..", "a b/c"):
        with pytest.raises(InputError, match="expected ORG/NAME"):
            upload.upload(tmp_path, name)


# convert


def test_convert_there_and_back_gives_the_same_model(clip_run, tmp_path, capsys):
    source = clip_run / "open_clip"
    ends(0, "convert", source, "--to", "hf", "--out", tmp_path / "hf")
    ends(0, "convert", tmp_path / "hf", "--to", "open_clip", "--out", tmp_path / "own")
    first, second = (load_state_dict(folder / "open_clip_model.safetensors") for folder in (source, tmp_path / "own"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    configs = [OpenClip(str(folder)).sidecar() for folder in (source, tmp_path / "own")]
    assert configs[0]["preprocess_cfg"] == configs[1]["preprocess_cfg"]
    ends(0, "convert", tmp_path / "hf", "--to", "open_clip", "--out", tmp_path / "weights.safetensors")
    assert load_state_dict(tmp_path / "weights.safetensors").keys() == first.keys()
    before = (tmp_path / "weights.safetensors").read_bytes()
    ends(2, "convert", tmp_path / "weights.safetensors", "--to", "hf", "--out", tmp_path / "weights.safetensors")
    assert "expected a new file, found one" in capsys.readouterr().err
    assert (tmp_path / "weights.safetensors").read_bytes() == before


def test_convert_of_what_is_there_already_or_has_no_configuration_is_refused(clip_run, tmp_path, capsys):
    ends(2, "convert", clip_run / "open_clip", "--to", "open_clip", "--out", tmp_path / "out")
    assert "has the names of open_clip already; nothing to convert" in capsys.readouterr().err
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "weights.safetensors").write_bytes((clip_run / "merged.safetensors").read_bytes())
    ends(2, "convert", alone / "weights.safetensors", "--to", "hf", "--out", tmp_path / "out")
    assert "no open_clip_config.json beside it" in capsys.readouterr().err
    ends(2, "convert", clip_run / "open_clip", "--to", "hf", "--key-prefix", "x.", "--out", tmp_path / "out")
    assert "--key-prefix, --entry: only without --to" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
