import argparse
import io
import json
import pickle
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from adamerge import InputError, load_state_dict, zoo
from adamerge.checkpoints.checkpoint import open_checkpoint
from adamerge.checkpoints.convert import convert_file
from adamerge.commands import cli
from tests.support.small_run import CONTEXT

MODELING = """
import torch

class ImageEncoder(torch.nn.Module):
    def __init__(self, args, keep_lang=True):
        super().__init__()
        import open_clip
        import torchvision.transforms as t
        print(f"loading {args.model}")
        self.model = open_clip.create_model(f"local-dir:{args.model}", load_weights=False)
        convert = open_clip.transform._convert_to_rgb
        self.val_preprocess = t.Compose([t.Resize(28, t.InterpolationMode.BICUBIC), convert, t.ToTensor()])
        self.train_preprocess = self.val_preprocess
        self.activation = torch.nn.functional.gelu
        self.args, self.cache_dir = args, None
        if not keep_lang:
            delattr(self.model, "transformer")
"""


def make(folder: Path, model: Path) -> None:
    """Save modules of a class that is importable in this process only."""
    sys.path.insert(0, str(folder))
    from src.modeling import ImageEncoder

    torch.manual_seed(0)
    args = argparse.Namespace(model=str(model), lr=1e-5, train_dataset="MNIST")
    encoder = ImageEncoder(args)
    torch.save(encoder, folder / "zip.pt")
    torch.save(encoder, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    with open(folder / "plain.pt", "wb") as file:  # as older scripts of the field wrote it
        pickle.dump(encoder, file)
    torch.save(torch.nn.DataParallel(encoder.model), folder / "parallel.pt")
    torch.save({k: v.clone() for k, v in encoder.state_dict().items()}, folder / "wanted.pt")
    torch.save(ImageEncoder(args, keep_lang=False), folder / "vision.pt")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Files as task_vectors' code wrote them: whole modules of classes that are not importable here."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "src").mkdir()
    (folder / "src" / "__init__.py").touch()
    (folder / "src" / "modeling.py").write_text(MODELING)
    process = CONTEXT.Process(target=make, args=(folder, zoo.files()))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    (folder / "src" / "modeling.py").unlink()
    return folder


@pytest.mark.parametrize(("kind", "prefix"), [("zip", ""), ("legacy", ""), ("plain", ""), ("parallel", "module.")])
def test_convert_whole_model_loads_in_plain_open_clip(published, tmp_path, kind, prefix):
    assert "src.modeling" not in sys.modules
    done = convert_file(published / f"{kind}.pt", tmp_path / "x.safetensors", prefix or "model.")
    wanted = {k.removeprefix("model."): v for k, v in load_state_dict(published / "wanted.pt").items()}
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in wanted.items())
    assert done.prefix == ""
    assert done.dtypes == {"float32": len(wanted)}
    assert "open_clip.model.CLIP" in done.inert
    model = open_clip.create_model(f"local-dir:{zoo.files()}", load_weights=False)
    model.load_state_dict(found, strict=True)
    assert torch.equal(model.state_dict()["visual.proj"], wanted["visual.proj"])


def test_convert_image_encoder_says_what_it_holds(published, tmp_path, monkeypatch):
    text = command(monkeypatch, published / "zip.pt", "--out", tmp_path / "x.safetensors")
    assert "module src.modeling.ImageEncoder, torch zip archive" in text
    assert "All names begin with 'model.': --key-prefix model. takes it off." in text
    assert "'argparse.Namespace'" in text
    assert text.splitlines()[-1] == str(tmp_path / "x.safetensors")
    done = convert_file(published / "parallel.pt", tmp_path / "y.safetensors")
    assert done.prefix == "module."


def test_convert_vision_only_encoder_gives_a_pool_of_the_visual_tower(published, tmp_path):
    convert_file(published / "vision.pt", tmp_path / "x.safetensors", "model.visual.")
    tower = zoo.create_model().visual
    tower.load_state_dict(load_file(tmp_path / "x.safetensors"), strict=True)


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
def test_open_checkpoint_whole_model_points_to_convert(published, kind):
    with pytest.raises(InputError, match=rf"{kind}\.pt: holds pickled Python objects .*: adamerge convert .* --out"):
        open_checkpoint(published / f"{kind}.pt")


def test_convert_tied_and_integer_tensors_are_written_each(tmp_path):
    whole = torch.arange(6.0).view(2, 3)
    content = {"a": whole, "b": whole, "part": whole[:, 1], "n": torch.tensor(7), "mask": torch.tensor([True, False])}
    torch.save({"state_dict": content, "epoch": 3}, tmp_path / "x.pt")
    convert_file(tmp_path / "x.pt", tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert list(found) == sorted(content) or set(found) == set(content)
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in content.items())
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    assert all(checkpoint.spec(k) == (tuple(v.shape), v.dtype) for k, v in content.items())


def test_convert_other_values_and_prefixes_are_named(tmp_path):
    torch.save({"model.a": torch.ones(1), "b": torch.ones(1), "epoch": 3}, tmp_path / "x.pt")
    assert convert_file(tmp_path / "x.pt", tmp_path / "x.safetensors").left_out == ("epoch",)
    assert convert_file(tmp_path / "x.pt", tmp_path / "x.safetensors", "model.").left_out == ("epoch", "b")
    assert set(load_file(tmp_path / "x.safetensors")) == {"a"}


def test_convert_takes_a_prefix_off_safetensors_too(tmp_path):
    save_file({"net.a": torch.ones(1), "epoch": torch.zeros(1)}, tmp_path / "x.safetensors")
    done = convert_file(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "net.")
    assert done.left_out == ("epoch",)
    assert set(load_file(tmp_path / "y.safetensors")) == {"a"}


def test_convert_entry_takes_averaged_weights(tmp_path, monkeypatch):
    content = {"model": {"w": torch.ones(1)}, "model_ema": {"module.w": torch.zeros(1)}}
    torch.save(content, tmp_path / "x.pt")
    assert convert_file(tmp_path / "x.pt", tmp_path / "x.safetensors").left_out == ("model_ema",)
    command(
        monkeypatch, tmp_path / "x.pt", "--entry", "model_ema", "--key-prefix", "module.", "--out",
        tmp_path / "x.safetensors",
    )  # fmt: skip
    assert torch.equal(load_file(tmp_path / "x.safetensors")["w"], torch.zeros(1))
    with pytest.raises(InputError, match=r"x\.pt: no entry 'ema' with tensors; there are 'model', 'model_ema'"):
        convert_file(tmp_path / "x.pt", tmp_path / "x.safetensors", entry="ema")
    torch.save({"net": {"w": torch.ones(1)}, "epoch": 3}, tmp_path / "y.pt")
    with pytest.raises(InputError, match=r"found dict without tensors. There are tensors under 'net': .* --entry net"):
        open_checkpoint(tmp_path / "y.pt")


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_convert_joins_the_shards_that_an_index_lists(tmp_path, suffix, monkeypatch):
    shards = {f"model-{n}-of-2{suffix}": {f"a{n}": torch.full((2,), n), f"b{n}": torch.ones(n).half()} for n in (1, 2)}
    for file, tensors in shards.items():
        (torch.save if suffix == ".bin" else save_file)(tensors, tmp_path / file)
    index, out = tmp_path / f"model{suffix}.index.json", tmp_path / "whole.safetensors"
    index.write_text(json.dumps({"weight_map": {key: file for file, tensors in shards.items() for key in tensors}}))
    assert "4 tensors" in command(monkeypatch, index, "--out", out)
    wanted = {key: value for tensors in shards.values() for key, value in tensors.items()}
    found = load_file(out)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in wanted.items())
    out.unlink()
    with pytest.raises(InputError, match="--entry ema: of pickled files only"):
        convert_file(index, out, entry="ema")
    (tmp_path / f"model-2-of-2{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match=f"model-2-of-2{suffix}"):
        convert_file(index, out)
    assert not out.exists()


def test_convert_bad_input_is_refused_and_leaves_nothing(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pt")
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    (tmp_path / "empty.pt").touch()
    out = tmp_path / "out.safetensors"
    for source, target, prefix, message in (
        ("x.pt", tmp_path / "out.bin", "", r"--out .*out\.bin: expected a file name that ends in \.safetensors"),
        ("x.pt", out, "visual.", r"--key-prefix visual\.: no names begin so; there are 'a'"),
        ("x.pt", out, "a", "--key-prefix a: no names begin so"),
        ("x.safetensors", out, "", "is a safetensors file already"),
        ("x.safetensors", tmp_path / "x.safetensors", "", "is the source itself"),
        ("empty.pt", out, "", "empty file"),
        (".", out, "", "found a folder"),
    ):
        with pytest.raises(InputError, match=message):
            convert_file(tmp_path / source, target, prefix)
        assert not out.exists()
    with pytest.raises(FileNotFoundError, match=r"y\.pt: no such file\. Did you mean 'x\.pt'\?"):
        convert_file(tmp_path / "y.pt", out)


def test_convert_hostile_names_do_not_reach_the_terminal(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(1), "\x1b[2Jevil": 1}, tmp_path / "x.pt")
    text = command(monkeypatch, tmp_path / "x.pt", "--out", tmp_path / "x.safetensors")
    assert "\x1b" not in text
    torch.save({"\x1b[2Jevil": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="expected tensors with printable names") as caught:
        convert_file(tmp_path / "x.pt", tmp_path / "x.safetensors")
    assert "\x1b" not in str(caught.value)


def command(monkeypatch, *arguments: object) -> str:
    """Run ``adamerge convert`` and return what it prints."""
    stream = io.StringIO()
    monkeypatch.setattr("sys.stdout", stream)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["convert", *map(str, arguments)])
    assert stopped.value.code == 0
    return stream.getvalue()
