"""`adamerge inspect`: which files it reads, and what it says where they do not fit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from adamerge import zoo
from adamerge.commands import cli
from adamerge.commands.run.named_pools import named_pool
from adamerge.errors import InputError

BASE = zoo.files() / "base.safetensors"
MNIST = zoo.files() / "experts" / "mnist.safetensors"
DIGITS = zoo.files() / "experts" / "digits.safetensors"


def call(capsys, *arguments):
    """Run `inspect` in this process; return exit code, output and lines of errors."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["inspect", *map(str, arguments)])
    captured = capsys.readouterr()
    return exit_info.value.code or 0, captured.out, captured.err.splitlines()


@pytest.fixture
def pool(tmp_path):
    """Write a pool's yaml with more lines; return its path."""

    def write(more=""):
        path = tmp_path / "mine.yaml"
        path.write_text(f"base: {BASE}\nexperts: {{mnist: {MNIST}, digits: {DIGITS}}}\n{more}")
        return path

    return write


def parameters(output):
    return json.loads(output)["parameters"]


def test_inspect_honours_include_and_exclude_of_the_pool(capsys, pool):
    code, output, _ = call(capsys, "--pool", pool("exclude: ['*bias']\n"), "--prefix", "visual.", "--json")
    assert code == 0
    fewer = parameters(output)
    assert 0 < fewer < 56
    code, output, _ = call(capsys, "--pool", pool("include: ['*bias']\n"), "--prefix", "visual.", "--json")
    assert parameters(output) == 56 - fewer


def test_inspect_options_narrow_what_merges(capsys, pool):
    arguments = ["--base", BASE, "--expert", f"mnist={MNIST}", "--prefix", "visual.", "--json"]
    _, output, _ = call(capsys, *arguments, "--exclude", "*bias", "--exclude", "proj")
    fewer = parameters(output)
    _, output, _ = call(capsys, *arguments, "--include", "*bias", "--include", "proj")
    assert parameters(output) == 56 - fewer
    _, output, _ = call(
        capsys, "--pool", pool("exclude: ['*bias']\n"), "--prefix", "visual.", "--exclude", "proj", "--json"
    )
    assert parameters(output) == fewer


def test_inspect_lists_all_layout_problems(capsys, tmp_path):
    tensors = load_file(DIGITS)
    del tensors["visual.ln_post.bias"]
    tensors["visual.extra"] = torch.zeros(3)
    tensors["visual.proj"] = torch.zeros(2, 2)
    save_file(tensors, tmp_path / "odd.safetensors")
    code, output, errors = call(
        capsys, "--base", BASE, "--expert", f"mnist={tmp_path / 'gone.safetensors'}",
        "--expert", f"digits={tmp_path / 'odd.safetensors'}", "--prefix", "visual.",
    )  # fmt: skip
    assert code == 2
    assert output == ""
    assert len(errors) == 4
    for line, word in zip(
        errors, ("gone.safetensors", "visual.proj", "visual.ln_post.bias", "visual.extra"), strict=True
    ):
        assert line.startswith("error: ")
        assert word in line
    assert not any("lists all" in line for line in errors)


def test_inspect_exclude_leaves_out_what_does_not_fit(capsys, tmp_path):
    tensors = load_file(DIGITS)
    tensors["visual.head.weight"] = torch.zeros(3)
    save_file(tensors, tmp_path / "head.safetensors")
    arguments = ["--base", BASE, "--expert", f"digits={tmp_path / 'head.safetensors'}", "--prefix", "visual."]
    assert call(capsys, *arguments)[0] == 2
    assert call(capsys, *arguments, "--exclude", "head.*")[0] == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: [unclosed", ["yaml"]),
        ("\tbase: x", ["yaml"]),
        ("base: x\nexperts: [a.safetensors]", ["experts", "{name: FILE"]),
        ("base: x\nexperts: a.safetensors", ["experts", "{name: FILE"]),
        ("base: x\nexperts: {}", ["experts", "must be given"]),
        ("base: x\nexperts: {a: null}", ["experts.a", "None"]),
        ("base: null\nexperts: {a: b}", ["base"]),
        ("base: x\nexperts: {a: b}\nexclude: proj", ["exclude", "list of globs"]),
        ("base: ${nothing}\nexperts: {a: b}", ["nothing"]),
        ("[base, experts]", ["base, experts"]),
        ("just words", ["base"]),
        ("", ["base"]),
    ],
)
def test_inspect_wrong_pool_file_is_one_line_that_names_it(capsys, tmp_path, text, words):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    code, output, errors = call(capsys, "--pool", path)
    assert (code, output, len(errors)) == (2, "", 1)
    assert str(path) in errors[0]
    for word in words:
        assert word in errors[0]


def test_named_pool_shipped_name_or_nearest():
    assert list(named_pool("zoo").experts) == list(zoo.TASKS)
    with pytest.raises(InputError, match="Did you mean 'zoo'"):
        named_pool("zooo")


def test_inspect_paths_of_a_pool_file_start_from_its_folder(capsys, tmp_path, monkeypatch):
    shutil.copy(BASE, tmp_path / "base.safetensors")
    shutil.copy(MNIST, tmp_path / "mnist.safetensors")
    (tmp_path / "pool.yaml").write_text("base: base.safetensors\nexperts: {mnist: mnist.safetensors}\n")
    monkeypatch.chdir("/")
    assert call(capsys, "--pool", tmp_path / "pool.yaml", "--prefix", "visual.")[0] == 0


def test_names_that_look_like_markup_are_shown_as_they_are(capsys, tmp_path):
    folder = tmp_path / "[old]" / ":cat:"
    folder.mkdir(parents=True)
    tensors = load_file(BASE)
    for name in ("base", "expert"):
        save_file({"such [/x] as.weight": torch.zeros(1), **tensors}, folder / f"{name}.safetensors")
        tensors["visual.proj"] = tensors["visual.proj"] + 1
    pool = ["--base", folder / "base.safetensors", "--expert", f"a[/b]={folder / 'expert.safetensors'}"]
    code, output, errors = call(capsys, *pool, "--prefix", "visual.")
    assert (code, errors) == (0, [])
    assert str(folder / "base.safetensors") in output
    assert "such [/x] as.weight" in output
    assert "a[/b]" in output
    code, _, errors = call(capsys, *pool, "--prefix", "[/b]")
    assert code == 2
    assert "'[/b]'" in errors[0]
