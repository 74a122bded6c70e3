"""Zero-shot heads that are kept: found again, never those of anything else."""

import open_clip
import pytest
import torch
from torch.utils.data import TensorDataset

from adamerge import InputError, zoo
from adamerge.backbones import OpenClip
from adamerge.checkpoints.checkpoint import MemoryCheckpoint, load_state_dict
from adamerge.data import Task

BASE = {key: value.float() for key, value in load_state_dict(zoo.files() / "base.safetensors").items()}
CLASSES, TEMPLATES = ["digit one", "digit two"], ["the {} in print.", "this is the {}."]


def heads(folder, base=BASE, classes=CLASSES, templates=TEMPLATES, tokenizer=None):
    backbone = OpenClip(str(zoo.files()), tokenizer=tokenizer or zoo.Tokenizer(), head_cache=folder)
    task = Task(TensorDataset(torch.zeros(1, 3, 28, 28)), classes=classes, templates=templates)
    return backbone.heads(MemoryCheckpoint("base", base), {}, {"pets": task})["pets"]


def changed(prefix):
    return {key: value + 0.1 if key.startswith(prefix) else value for key, value in BASE.items()}


@pytest.fixture
def _not_made(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a head was made")

    monkeypatch.setattr(open_clip, "build_zero_shot_classifier", refuse)


def test_head_is_found_again_and_equals_the_one_that_was_made(tmp_path, request):
    made, plain = heads(str(tmp_path)), heads("off")
    (file,) = tmp_path.iterdir()
    assert file.suffix == ".safetensors"
    request.getfixturevalue("_not_made")
    found = heads(str(tmp_path))
    for other in (made, plain):
        assert torch.equal(found.weight, other.weight)
        assert torch.equal(found.scale, other.scale)


@pytest.mark.parametrize(
    "other",
    [
        {"base": changed("transformer.")},
        {"base": changed("logit_scale")},
        {"classes": ["digit one", "digit six"]},
        {"classes": ["digit two", "digit one"]},
        {"templates": ["this is the {}."]},
        {"templates": ["the {} in print.", "a small, rough {}."]},
        {"tokenizer": lambda texts: zoo.Tokenizer()([f"{text} {text}" for text in texts])},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_decides_a_head_gives_it_another_name(tmp_path, other):
    first, second = heads(str(tmp_path)), heads(str(tmp_path), **other)
    assert len(list(tmp_path.iterdir())) == 2
    same = torch.equal(first.weight, second.weight) and torch.equal(first.scale, second.scale)
    assert not same or other.get("templates") == [
        "the {}.",
        "a {}.",
    ]  # the order of templates only changes a file's name


def test_image_tower_does_not_decide_a_head(tmp_path, request):
    heads(str(tmp_path))
    request.getfixturevalue("_not_made")
    heads(str(tmp_path), base=changed("visual."))


def test_damaged_file_is_made_anew(tmp_path, caplog):
    made = heads(str(tmp_path))
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert torch.equal(heads(str(tmp_path)).weight, made.weight)
    assert "a damaged file is made anew" in caplog.text
    caplog.clear()
    heads(str(tmp_path))
    assert caplog.text == ""


def test_deleting_the_folder_only_costs_time(tmp_path):
    made = heads(str(tmp_path / "heads"))
    for file in (tmp_path / "heads").iterdir():
        file.unlink()
    (tmp_path / "heads").rmdir()
    assert torch.equal(heads(str(tmp_path / "heads")).weight, made.weight)


@pytest.mark.parametrize("off", ["off", False])
def test_off_writes_nothing(tmp_path, monkeypatch, off):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    heads(off)
    assert list(tmp_path.iterdir()) == []


def test_default_folder_is_the_users_and_need_not_be_writable(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    heads("auto")
    assert len(list((tmp_path / "adamerge/heads").iterdir())) == 1
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    heads("auto")


def test_folder_that_was_given_must_be_writable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is not writable"):
        heads(str(tmp_path / "file" / "heads"))
    with pytest.raises(InputError, match=r"backbone.head_cache: expected auto, off or a folder, found True"):
        heads(True)


def test_tokenizer_of_another_model_is_refused():
    with pytest.raises(InputError, match=r"backbone.tokenizer: expected token ids below \d+, .* found 9999"):
        heads("off", tokenizer=lambda texts: torch.full((len(texts), 16), 9999))
