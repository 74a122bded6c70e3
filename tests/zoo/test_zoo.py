"""The demo zoo: images, tokenizer, shipped files, and a tiny build."""

import hashlib
import importlib
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from adamerge import InputError, zoo
from adamerge.pool.pool_file import load_pool_file
from adamerge.zoo import CLASSES, TASKS, TEMPLATES, Tokenizer, ZooImages
from adamerge.zoo.design import DEMO, Curriculum, TrainingPlan
from adamerge.zoo.glyphs import FONTS, draw_glyph, require
from adamerge.zoo.images import PRETRAINING_CLASSES, pretraining_images
from adamerge.zoo.progress import BuildRecord

open_clip = pytest.importorskip("open_clip")
for _package in ("mlxtend", "sklearn", "matplotlib"):
    pytest.importorskip(_package)

build_module = importlib.import_module("adamerge.zoo.build")  # the package has a function of that name
TRAIN_SIZES = {"digits": 1000}
TEST_SIZES = {"digits": 797}


@pytest.fixture(scope="module")
def test_images():
    return {task: ZooImages(task) for task in TASKS}


@pytest.fixture(scope="module")
def base():
    model = zoo.create_model().eval()
    model.load_state_dict(load_file(zoo.files() / "base.safetensors"))
    return model


@torch.no_grad()
def accuracy(model, task, images, count=200):
    head = open_clip.build_zero_shot_classifier(model, Tokenizer(), CLASSES[task], TEMPLATES)
    predicted = (model.encode_image(images.images[:count]) @ head).argmax(1)
    return (predicted == images.labels[:count]).float().mean().item()


@pytest.mark.parametrize("task", TASKS)
def test_zoo_images_have_documented_shape_range_and_balance(task, test_images):
    images = test_images[task]
    size = TEST_SIZES.get(task, 1000)
    assert len(images) == size
    assert images.images.shape == (size, 3, 28, 28)
    assert images.images.dtype == torch.float32
    assert images.images.is_contiguous()
    assert -1 <= images.images.min() < -0.5
    assert 0.5 < images.images.max() <= 1
    assert images.classes == CLASSES[task]
    counts = images.labels.bincount(minlength=10)
    assert counts.min() >= 0.09 * size
    assert counts.max() <= 0.11 * size
    image, label = images[3]
    assert image.shape == (3, 28, 28)
    assert isinstance(label, int)


@pytest.mark.parametrize("task", ["mnist", "latin", "cyrillic"])
def test_zoo_images_same_arguments_same_images(task, test_images):
    again = ZooImages(task)
    assert torch.equal(again.images, test_images[task].images)
    assert torch.equal(again.labels, test_images[task].labels)


def test_zoo_images_other_seed_changes_drawn_images_only(test_images):
    assert torch.equal(ZooImages("mnist", seed=1).images, test_images["mnist"].images)
    assert not torch.equal(ZooImages("greek", seed=1).images, test_images["greek"].images)


@pytest.mark.parametrize("task", ["mnist", "digits", "math"])
def test_zoo_images_train_and_test_share_no_image(task, test_images):
    train = ZooImages(task, "train")
    assert len(train) == TRAIN_SIZES.get(task, 4000)
    seen = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in seen for image in test_images[task].images)


def test_fonts_of_splits_are_disjoint_and_cover_every_class():
    assert not set(FONTS["train"]) & set(FONTS["test"])
    for fonts in FONTS.values():
        for character in "7RωЖ∀":
            assert any(draw_glyph(font, character) is not None for font in fonts)


def test_pretraining_images_cover_all_classes():
    images, labels = pretraining_images("generic", 100)
    assert images.shape == (100, 3, 28, 28)
    assert images.abs().max() <= 1
    assert labels.bincount().tolist() == [2] * len(PRETRAINING_CLASSES) == [2] * 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("grek",), "'grek'.*Did you mean 'greek'"), (("math", "val"), "'train' or 'test', found 'val'")],
)
def test_zoo_images_unknown_name_says_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        ZooImages(*arguments)


def test_require_missing_package_names_the_extra():
    with pytest.raises(InputError, match=r"'nonesuch'.*pip install \"adamerge\[demo\]\""):
        require("nonesuch_module", "nonesuch")


def test_tokenizer_keeps_padding_smallest_and_end_of_text_largest():
    tokenizer = Tokenizer()
    prompts = [template.format(name) for name in PRETRAINING_CLASSES for template in TEMPLATES]
    tokens = tokenizer(prompts)
    assert tokens.shape == (300, 16)
    assert tokens.dtype == torch.int64
    assert tokens.min() == 0
    assert (tokens.max(1).values == tokenizer.vocab_size - 1).all()
    assert ((tokens == tokenizer.vocab_size - 1).sum(1) == 1).all()
    assert len(tokens.unique(dim=0)) == 300
    assert torch.equal(tokenizer(prompts[0]), tokens[:1])


@pytest.mark.parametrize(("text", "message"), [("a picture of the zebra.", "zebra"), ("the " * 15, "too long")])
def test_tokenizer_text_that_does_not_fit_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer()(text)


def test_files_are_complete_and_as_hashed():
    folder = zoo.files()
    facts = json.loads((folder / "zoo.json").read_text(encoding="utf-8"))
    names = {"open_clip_config.json", "base.safetensors", *(f"experts/{task}.safetensors" for task in TASKS)}
    assert set(facts["sha256"]) == names
    for name, digest in facts["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 8e6
    assert "CC BY" in (folder / "LICENCES.md").read_text(encoding="utf-8")


def test_files_hold_keys_of_the_architecture(base):
    expected = {name: value.shape for name, value in base.state_dict().items()}
    visual = {name: shape for name, shape in expected.items() if name.startswith("visual.")}
    weights = load_file(zoo.files() / "base.safetensors")
    assert {name: value.shape for name, value in weights.items()} == expected
    for task in TASKS:
        expert = load_file(zoo.files() / "experts" / f"{task}.safetensors")
        assert {name: value.shape for name, value in expert.items()} == visual
        assert all(value.dtype == torch.float16 and value.isfinite().all() for value in expert.values())


def test_files_open_with_open_clip_local_dir(base):
    model = open_clip.create_model(f"local-dir:{zoo.files()}").eval()
    images = torch.rand(2, 3, 28, 28)
    assert torch.allclose(model.encode_image(images), base.encode_image(images), atol=1e-5)
    assert model.visual.preprocess_cfg["mean"] == [0.5] * 3


def test_base_beats_chance_widely(base, test_images):
    scores = [accuracy(base, task, test_images[task]) for task in TASKS]
    assert min(scores) > 0.3
    assert 0.55 < sum(scores) / len(scores) < 0.9


@pytest.mark.parametrize("task", TASKS)
def test_expert_masters_its_task(task, base, test_images):
    model = zoo.create_model().eval()
    expert = load_file(zoo.files() / "experts" / f"{task}.safetensors")
    model.load_state_dict({**base.state_dict(), **expert})
    assert accuracy(model, task, test_images[task]) > max(0.75, accuracy(base, task, test_images[task]))


@pytest.mark.slow
def test_import_stays_light():
    heavy = "{'open_clip', 'mlxtend'}"
    code = f"import sys, adamerge.zoo; sys.exit(len({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_damaged_file_of_a_finished_zoo_is_made_anew_alone(tmp_path):
    (tmp_path / "experts").mkdir()
    names = ["open_clip_config.json", "base.safetensors", *(f"experts/{task}.safetensors" for task in TASKS)]
    for name in names:
        (tmp_path / name).write_text(name)
    key, record = {"seed": 3}, BuildRecord(tmp_path, {"seed": 3})
    hashes = build_module._write_pool(DEMO, record)
    accuracy = {task: {"base": 0.5, "expert": 0.9} for task in TASKS}
    seconds = dict.fromkeys(("base", *TASKS), 1.0)
    record.finish({**key, "sha256": hashes, "held_out_accuracy": accuracy, "seconds": seconds})
    pool, expert = tmp_path / "pool.yaml", tmp_path / "experts" / "mnist.safetensors"
    pool.write_text("# mine\n" + pool.read_text())
    assert BuildRecord(tmp_path, key).finished["seed"] == 3
    expert.write_text("damaged")
    made = BuildRecord(tmp_path, key)
    assert made.finished is None
    assert not made.is_written("experts/mnist.safetensors")
    assert made.is_written("experts/digits.safetensors")
    assert made.accuracy["digits"] == accuracy["digits"]
    expert.write_text("experts/mnist.safetensors")  # made anew
    assert build_module._write_pool(DEMO, made)["pool.yaml"] == hashes["pool.yaml"]
    assert pool.read_text().startswith("# mine")
    made.add("base.safetensors", 1.0)
    assert made.is_written("experts/digits.safetensors")
    (tmp_path / "base.safetensors").write_text("another")  # as other versions of packages make it
    made.add("base.safetensors", 1.0)
    assert not made.is_written("experts/digits.safetensors")
    made = BuildRecord(tmp_path, key)  # after an interruption
    assert made.is_written("base.safetensors")
    assert made.finished is None


TINY = replace(
    DEMO,
    base=TrainingPlan(steps=4, batch_size=16, learning_rate=1e-3, weight_decay=0.05, warmup=2),
    expert=TrainingPlan(steps=2, batch_size=16, learning_rate=1e-4, weight_decay=0.1),
    curriculum=Curriculum(num_images=300, clean_steps=2),
)


@pytest.mark.slow
def test_build_tiny_is_deterministic_and_leaves_no_temporary_file(tmp_path):
    state = torch.random.get_rng_state()
    facts = zoo.build(tmp_path / "a", 3, progress=False, design=TINY)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert facts == json.loads((tmp_path / "a" / "zoo.json").read_text(encoding="utf-8"))
    again = zoo.build(tmp_path / "b", 3, progress=False, design=TINY)
    assert again["sha256"] == facts["sha256"]
    files = {str(path.relative_to(tmp_path / "a")) for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert files == {*facts["sha256"], "zoo.json"}
    zoo.create_model(tmp_path / "a").load_state_dict(load_file(tmp_path / "a" / "base.safetensors"))
    pool = load_pool_file(tmp_path / "a" / "pool.yaml")
    pool.verify()
    assert tuple(pool.experts) == TASKS


@pytest.mark.slow
def test_build_goes_on_after_an_interruption_and_refuses_other_zoos(tmp_path, monkeypatch):
    whole = zoo.build(tmp_path / "whole", 3, progress=False, design=TINY)
    assert zoo.build(tmp_path / "whole", 3, progress=False, design=TINY) == whole  # nothing left to do
    broken = replace(TINY, images=lambda task, seed: DEMO.images(task, seed) if task != "greek" else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        zoo.build(tmp_path / "parts", 3, progress=False, design=broken)
    trained = []
    own = build_module.train_expert
    monkeypatch.setattr(build_module, "train_expert", lambda *args: (trained.append(1), own(*args)))
    monkeypatch.setattr(build_module, "train_base", lambda *args: 1 / 0)
    assert zoo.build(tmp_path / "parts", 3, progress=False, design=TINY)["sha256"] == whole["sha256"]
    assert len(trained) == 3  # greek, cyrillic, math
    with pytest.raises(InputError, match="holds a zoo with another seed: expected 4, found 3"):
        zoo.build(tmp_path / "parts", 4, progress=False, design=TINY)
