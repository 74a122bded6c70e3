"""``adamerge pool``: pool files that are made, listed, checked and named by runs."""

import json
import os
import re

import pytest
import torch
from huggingface_hub import constants
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from adamerge import Coefficients, ExpertPool, InputError
from adamerge.checkpoints import hashes as hash_cache
from adamerge.commands import cli
from adamerge.commands.run.compose import compose
from adamerge.commands.run.named_pools import named_pool
from adamerge.model.coefficients import save_coefficients
from adamerge.pool.pool_file import load_pool_file
from adamerge.system.files import sha256
from tests.support.hub_cache import add_model, commit_of
from tests.support.toy import make_toy, save_files


def run(capsys, *arguments):
    """Run the command line in this process; return exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


def refused(capsys, *arguments):
    """Run the command line, which refuses its input; return the message, which is one line."""
    code, _, errors = run(capsys, *arguments)
    assert code == 2, errors
    assert len(errors.strip().splitlines()) == 1
    return errors


@pytest.fixture
def toy():
    return make_toy()


@pytest.fixture
def files(tmp_path, toy, monkeypatch):
    """The toy's base and experts in the folder that the command runs in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ADAMERGE_POOLS", raising=False)
    return save_files(tmp_path, toy.base, toy.experts)


def added(capsys, name="mine", experts=("red", "green")):
    options = [word for expert in experts for word in ("--expert", f"{expert}={expert}.safetensors")]
    return run(capsys, "pool", "add", name, "--base", "base.safetensors", *options)


def test_add_makes_a_pool_with_hashes_that_commands_take_by_name(capsys, files, tmp_path):
    base, experts = files
    code, out, _ = added(capsys)
    assert code == 0
    assert out.splitlines()[-1] == "pools/mine.yaml"
    options = [
        "--expert",
        "blue=blue.safetensors",
        "--task",
        "blue=sky",
        "--licence",
        "blue=MIT",
        "--licence",
        "base=BSD",
    ]
    assert run(capsys, "pool", "add", "mine", *options)[0] == 0
    content = OmegaConf.to_container(OmegaConf.load(tmp_path / "pools" / "mine.yaml"))
    assert content["base"] == {"file": "../base.safetensors", "licence": "BSD", "sha256": sha256(base)}
    assert content["experts"]["blue"] == {
        "file": "../blue.safetensors", "task": "sky", "licence": "MIT", "sha256": sha256(experts["blue"]),
    }  # fmt: skip
    assert list(named_pool("mine").experts) == ["red", "green", "blue"]
    assert run(capsys, "merge", "--rule", "task_arithmetic", "--pool", "mine", "--out", "merged")[0] == 0
    config = compose(["pool=mine"])
    assert dict(config.pool.experts) == {name: str(path) for name, path in experts.items()}
    assert config.pool.sha256.red == sha256(experts["red"])
    assert compose(["pool.file=pools/mine.yaml"]).pool == config.pool
    assert compose(["pool=pools/mine.yaml"]).pool == config.pool


def test_names_are_looked_up_in_named_folders_and_wrong_ones_listed(capsys, files, tmp_path, monkeypatch):
    assert added(capsys, "other/far.yaml")[0] == 0
    assert "pools: none" in refused(capsys, "pool", "list", "far")
    monkeypatch.setenv("ADAMERGE_POOLS", f"{tmp_path / 'nowhere'}{os.pathsep}{tmp_path / 'other'}")
    assert named_pool("far").base.file == tmp_path / "base.safetensors"
    with pytest.raises(InputError, match=r"pool=fa: no pool of that name; shipped: clip_.*: far\. Did you mean 'far'"):
        compose(["pool=fa"])
    with pytest.raises(InputError, match=r"Name the folder: --config-dir FOLDER"):
        compose(["pool=ours"])
    assert compose(["pool=far"]).pool.base == str(tmp_path / "base.safetensors")
    assert "the name of a shipped pool" in refused(capsys, "pool", "add", "zoo", "--base", "base.safetensors")


def test_add_writes_paths_below_the_pool_file_relative_to_it(capsys, files, tmp_path):
    assert added(capsys, "./mine.yaml")[0] == 0
    content = OmegaConf.to_container(OmegaConf.load(tmp_path / "mine.yaml"))
    assert content["base"]["file"] == "base.safetensors"
    assert load_pool_file(tmp_path / "mine.yaml").experts["red"].file == tmp_path / "red.safetensors"


def test_add_writes_paths_that_move_with_the_folder_it_runs_in_and_others_whole(capsys, files, tmp_path, monkeypatch):
    project, away = tmp_path / "project", tmp_path / "away"
    project.mkdir()
    for name in ("base", "red"):
        (tmp_path / f"{name}.safetensors").rename(project / f"{name}.safetensors")
    monkeypatch.chdir(project)
    experts = ("--expert", "red=red.safetensors", "--expert", "green=../green.safetensors")
    assert run(capsys, "pool", "add", "ours", "--base", "base.safetensors", *experts)[0] == 0
    project.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    pool = named_pool("ours")
    assert str(pool.experts["red"].file) == "red.safetensors"
    assert pool.experts["green"].file == tmp_path / "green.safetensors"
    assert run(capsys, "pool", "verify", "ours")[0] == 0
    away.mkdir()
    (tmp_path / "moved" / "linked").symlink_to(away)  # where '..' is another folder
    assert added(capsys, "linked/pool.yaml", experts=["red"])[0] == 0
    assert load_pool_file(away / "pool.yaml").base.file == tmp_path / "moved" / "base.safetensors"


def test_add_refuses_what_does_not_fit_and_writes_nothing(capsys, files, tmp_path):
    other = load_file("red.safetensors")
    save_file({name: torch.zeros(*tensor.shape, 2) for name, tensor in other.items()}, tmp_path / "wide.safetensors")
    (tmp_path / "copy.safetensors").write_bytes((tmp_path / "red.safetensors").read_bytes())
    torch.save(torch.nn.Linear(2, 2), tmp_path / "pickled.pt")
    base = ("--base", "base.safetensors")
    for options, words in (
        (("--expert", "red=red.safetensors"), "no such pool yet"),
        ((*base, "--expert", "red"), "expected NAME=FILE"),
        ((*base, "--expert", "red=red.safetensors", "--expert", "red=blue.safetensors"), "given twice"),
        ((*base, "--expert", "red=rod.safetensors"), "no such file. Did you mean 'red.safetensors'?"),
        ((*base, "--expert", "wide=wide.safetensors"), "differ in shape"),
        ((*base, "--expert", "red=red.safetensors", "--expert", "copy=copy.safetensors"), "or copies"),
        ((*base, "--expert", "red=red.safetensors", "--task", "rod=x"), "Did you mean 'red'"),
        ((*base, "--expert", "red=red.safetensors", "--task", "red"), "expected NAME=VALUE"),
        (
            (*base, "--expert", "pickled=pickled.pt"),
            "which runs nothing: adamerge convert pickled.pt --out NAME.safetensors.",
        ),
        ((), "nothing to add"),
        (base, "expected at least one expert"),
    ):
        assert words in refused(capsys, "pool", "add", "mine", *options)
        assert not (tmp_path / "pools").exists()
    assert added(capsys)[0] == 0
    several = ("--expert", "wide=wide.safetensors", "--expert", "pickled=pickled.pt", "--expert", "red=red.safetensors")
    code, _, errors = run(capsys, "pool", "add", "another", *base, *several)
    assert code == 2
    assert [line.split()[1] for line in errors.splitlines()] == ["pickled.pt:", "Expert"]
    before = (tmp_path / "pools" / "mine.yaml").read_bytes()
    assert "has an expert of that name" in refused(capsys, "pool", "add", "mine", "--expert", "red=blue.safetensors")
    assert "has a base already" in refused(capsys, "pool", "add", "mine", *base, "--expert", "blue=blue.safetensors")
    assert (tmp_path / "pools" / "mine.yaml").read_bytes() == before


def test_changed_file_is_refused_where_it_is_loaded_and_by_verify(capsys, files, tmp_path):
    added(capsys)
    assert "All verified." in run(capsys, "pool", "verify", "mine")[1]
    save_file({name: tensor + 1 for name, tensor in load_file("red.safetensors").items()}, "red.safetensors")
    expected = r"red\.safetensors: expected the SHA-256 \w+ that the pool gives for red, found"
    for command in (("pool", "verify", "mine"), ("merge", "--rule", "ties", "--pool", "mine", "--out", "merged")):
        errors = refused(capsys, *command)
        assert re.search(expected, errors)
    node = named_pool("mine").node()
    with pytest.raises(InputError, match=expected):
        ExpertPool.from_files(node["base"], node["experts"], hashes=node["sha256"])
    (tmp_path / "green.safetensors").unlink()
    code, _, errors = run(capsys, "pool", "verify", "mine")
    assert code == 2
    assert "green" in errors
    assert "no such file" in errors


def test_list_says_what_is_here_of_shipped_and_own_pools(capsys, files, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    added(capsys)
    (tmp_path / "pools" / "broken.yaml").write_text("base: [")
    (tmp_path / "pools" / "dangling.yaml").symlink_to("nowhere.yaml")
    (tmp_path / "pools" / "folder.yaml").mkdir()
    found = {pool["name"]: pool for pool in json.loads(run(capsys, "pool", "list", "--json")[1])}
    assert found["mine"]["state"] == "3 of 3 files are here"
    assert found["zoo"]["state"] == "7 of 7 files are here"
    assert found["clip_vit_b32_8"]["state"] == "0 of 9 files are here"
    assert found["clip_vit_l14_20"]["experts"] == "20"
    assert "not readable as yaml" in found["broken"]["state"]
    assert all("no such pool file" in found[name]["state"] for name in ("dangling", "folder"))
    assert "mine" in run(capsys, "pool", "list")[1]
    listed = json.loads(run(capsys, "pool", "list", "clip_vit_b16_14", "--json")[1])
    assert listed["base"]["file"] == "hf://openai/clip-vit-base-patch16"
    assert not any(listed["there"].values())
    assert "missing" in run(capsys, "pool", "list", "clip_vit_b16_14")[1]
    code, _, errors = run(capsys, "pool", "verify", "clip_vit_b32_8")
    assert code == 2
    assert len(errors.splitlines()) == 1  # which names all
    assert errors.count("hf://") == 9


def test_hub_models_are_pinned_recorded_and_merged_offline(capsys, files, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    base, experts = files
    for name, path in {"base": base, **experts}.items():
        card = b"---\nlicense: apache-2.0\n---\n"
        add_model(
            tmp_path / "hub",
            f"org/{name}",
            {"config.json": b"{}", "model.safetensors": path.read_bytes(), "README.md": card},
        )
    options = [word for name in experts for word in ("--expert", f"{name}=hf://org/{name}")]
    assert run(capsys, "pool", "add", "far", "--base", "hf://org/base", *options)[0] == 0
    pool = named_pool("far")
    assert str(pool.experts["red"].file) == f"hf://org/red@{commit_of('org/red')}"
    assert pool.experts["red"].licence == "apache-2.0"
    assert pool.experts["red"].sha256 == sha256(experts["red"])
    assert run(capsys, "merge", "--rule", "ties", "--pool", "far", "--out", "far")[0] == 0
    added(capsys, experts=tuple(experts))
    assert run(capsys, "merge", "--rule", "ties", "--pool", "mine", "--out", "near")[0] == 0
    assert (tmp_path / "far" / "merged.safetensors").read_bytes() == (
        tmp_path / "near" / "merged.safetensors"
    ).read_bytes()
    assert "@" in json.loads((tmp_path / "far" / "merge.json").read_text())["files"]["base"]["file"]
    assert run(capsys, "merge", "--recipe", tmp_path / "far" / "merge.json", "--out", "again")[0] == 0
    assert run(capsys, "pool", "fetch", "far", "hf://org/red")[0] == 0
    assert "none is of the Hub" in refused(capsys, "pool", "fetch", "mine")
    assert "cannot be downloaded" in refused(capsys, "pool", "fetch", "hf://org/none")
    assert "adamerge pool fetch" in refused(capsys, "pool", "add", "far", "--expert", "none=hf://org/none")


def test_add_records_the_hashes_of_a_pool_written_by_hand(capsys, files, tmp_path):
    (tmp_path / "hand.yaml").write_text(
        "base: base.safetensors\nexperts: {red: red.safetensors}\nexclude: ['*.bias']\n"
    )
    assert "2 files have no hash" in run(capsys, "pool", "verify", "hand.yaml")[1]
    code, out, _ = run(capsys, "pool", "add", "hand.yaml", "--licence", "red=MIT")
    assert code == 0
    assert out.splitlines()[-1] == "hand.yaml"
    pool = load_pool_file(tmp_path / "hand.yaml")
    assert pool.options["exclude"] == ["*.bias"]
    assert pool.hashes == {"base": sha256(tmp_path / "base.safetensors"), "red": sha256(tmp_path / "red.safetensors")}


def test_export_replays_coefficients_on_a_named_pool(capsys, files, tmp_path):
    base, experts = files
    added(capsys, experts=tuple(experts))
    pool = ExpertPool.from_files(base, experts)
    save_coefficients(Coefficients(pool, "layer", 0.4), tmp_path / "coefficients.json", pool)
    options = ("--coefficients", "coefficients.json", "--output")
    assert run(capsys, "export", "--pool", "mine", *options, "one")[0] == 0
    named = [word for name, path in experts.items() for word in ("--expert", f"{name}={path}")]
    assert run(capsys, "export", "--base", base, *named, *options, "two")[0] == 0
    assert (tmp_path / "one" / "merged.safetensors").read_bytes() == (
        tmp_path / "two" / "merged.safetensors"
    ).read_bytes()


def test_file_hash_is_kept_until_the_file_changes(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"first")
    read = []
    monkeypatch.setattr(hash_cache, "sha256", lambda file: read.append(file) or sha256(file))
    first = hash_cache.file_hash(path)
    hash_cache.file_hash(path)
    assert len(read) == 2  # changed too lately to be sure
    monkeypatch.setattr(hash_cache, "_SETTLED", -1.0)
    hash_cache.file_hash(path)
    assert hash_cache.file_hash(path) == first == sha256(path)
    assert len(read) == 3
    path.write_bytes(b"other")
    assert hash_cache.file_hash(path) == sha256(path) != first
    hash_cache.forget(tmp_path)
    hash_cache.file_hash(path)
    assert len(read) == 5


def test_file_hash_without_a_home_or_a_cache_that_can_be_written_to(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"first")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # a file, below which nothing can be
    hash_cache.forget(path)
    assert hash_cache.file_hash(path) == sha256(path)
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(hash_cache.Path, "home", no_home)
    hash_cache.forget(path)
    assert hash_cache.file_hash(path) == sha256(path)
