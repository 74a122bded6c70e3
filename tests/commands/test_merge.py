"""The command ``adamerge merge``, its pool files and recipes."""

import json
from pathlib import Path

import adamerge.configs
import hydra
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from adamerge.commands import cli
from adamerge.commands.run.build import build, check_options
from adamerge.commands.run.shipped import rule_node
from adamerge.pool.pool_file import load_pool_file
from adamerge.system.files import sha256
from tests.support.toy import make_toy, save_files

RULES = sorted((Path(adamerge.configs.__file__).parent / "merge").glob("*.yaml"))
GIVEN = {"layer_swapping": ["outer=red", "inner=blue"], "metrics_weighted": ["scores={red: 1, green: 2, blue: 3}"]}


def run(capsys, *arguments):
    """Run the command line in this process; return exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


@pytest.fixture
def files(tmp_path):
    toy = make_toy()
    base, experts = save_files(tmp_path, toy.base, toy.experts)
    return base, experts


@pytest.fixture
def pool(files, tmp_path):
    path = tmp_path / "pool.yaml"
    base, experts = files
    entries = {name: file.name for name, file in experts.items()}
    entries["red"] = {"file": "red.safetensors", "task": "roses", "licence": "MIT", "sha256": sha256(experts["red"])}
    path.write_text(OmegaConf.to_yaml({"base": base.name, "experts": entries}))
    return path


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.stem)
def test_rule_file_names_a_class_and_its_defaults(path):
    node = OmegaConf.create(rule_node("merge", path.stem, GIVEN.get(path.stem, [])))
    target = hydra.utils.get_object(node._target_)
    check_options("merge", target, node)
    rule = build(OmegaConf.create({"merge": node}), "merge")
    for option, value in OmegaConf.to_container(OmegaConf.load(path)).items():
        if option != "_target_" and value != "???":
            default = target.__dataclass_fields__[option].default
            assert value == (list(default) if isinstance(default, tuple) else default), option
    assert getattr(rule, "needs_data", False) == (path.stem in {"fisher", "regmean", "regmean++"})


def test_merge_writes_a_checkpoint_and_a_recipe_that_replays(capsys, files, pool, tmp_path):
    first, again, named = tmp_path / "first", tmp_path / "again", tmp_path / "named"
    code, out, _ = run(capsys, "merge", "--rule", "ties", "--set", "density=0.5", "--pool", pool, "--out", first)
    assert code == 0
    assert str(first / "merged.safetensors") in out
    recipe = json.loads((first / "merge.json").read_text())
    assert recipe["rule"]["density"] == 0.5
    assert recipe["files"]["experts"]["red"]["licence"] == "MIT"
    assert set(recipe["hashes"]) == {"base", "red", "green", "blue"}
    assert run(capsys, "merge", "--recipe", first / "merge.json", "--out", again)[0] == 0
    base, experts = files
    options = [part for name, file in experts.items() for part in ("--expert", f"{name}={file}")]
    assert run(
        capsys, "merge", "--rule", "ties", "--set", "density=0.5", "--base", base, *options, "--out", named
    )[0] == 0  # fmt: skip
    content = (first / "merged.safetensors").read_bytes()
    assert content == (again / "merged.safetensors").read_bytes() == (named / "merged.safetensors").read_bytes()
    merged, original = load_file(first / "merged.safetensors"), load_file(base)
    assert {name: (t.shape, t.dtype) for name, t in merged.items()} == {
        name: (t.shape, t.dtype) for name, t in original.items()
    }


def test_recipe_with_a_changed_expert_is_refused(capsys, files, pool, tmp_path):
    assert run(capsys, "merge", "--rule", "weight_average", "--pool", pool, "--out", tmp_path / "a")[0] == 0
    files[1]["blue"].write_bytes(files[1]["green"].read_bytes())
    code, _, err = run(capsys, "merge", "--recipe", tmp_path / "a" / "merge.json", "--out", tmp_path / "b")
    assert code == 2
    assert "expected the SHA-256" in err
    assert not (tmp_path / "b" / "merged.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rule", "tsm"], "Did you mean 'tsvm'?"),
        (["--rule", "my_rules.Mine"], "cannot import 'my_rules.Mine'"),
        (["--rule", "ties", "--set", "densty=0.1"], "Did you mean 'density'?"),
        (["--rule", "ties", "--set", "density=much"], "TiesMerge.density: expected a number"),
        (["--rule", "ties", "--set", "density"], "expected OPTION=VALUE"),
        (["--rule", "layer_swapping", "--set", "outer=red"], "inner must be given"),
        (["--rule", "ties", "data=zoo"], "reads no data"),
        (["--rule", "regmean", "steps=3"], "only backbone, data and seed"),
        ([], "give --rule NAME"),
    ],
)
def test_wrong_merge_is_one_line(capsys, pool, tmp_path, arguments, message):
    code, _, err = run(capsys, "merge", "--pool", pool, "--out", tmp_path / "out", *arguments)
    assert code == 2
    assert message in " ".join(err.split())
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_merge_without_a_pool_is_one_line(capsys, tmp_path):
    code, _, err = run(capsys, "merge", "--rule", "ties", "--pool", "zo", "--out", tmp_path)
    assert code == 2
    assert "Did you mean 'zoo'?" in err
    code, _, err = run(capsys, "merge", "--rule", "ties", "--base", "b.safetensors", "--out", tmp_path)
    assert code == 2
    assert "--expert NAME=FILE" in err


def test_pool_file_paths_start_from_its_folder_and_hashes_are_verified(pool, files):
    found = load_pool_file(pool)
    assert found.base.file == files[0]
    assert found.experts["red"].task == "roses"
    assert found.experts["green"].sha256 is None
    found.verify()
    with files[1]["red"].open("ab") as file:
        file.write(b" ")
    with pytest.raises(ValueError, match="expected the SHA-256"):
        found.verify()
    files[1]["green"].unlink()
    files[1]["red"].write_bytes(files[1]["red"].read_bytes()[:-1])
    with pytest.raises(FileNotFoundError, match="start from its own folder"):
        found.verify()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("base: b\nexprts: {a: a}", "unknown key 'exprts'. Did you mean 'experts'?"),
        ("base: b\nexperts: {a: {file: a, license: MIT}}", "Did you mean 'licence'?"),
        ("base: b\nexperts: {a: {task: x}}", "experts.a: expected a checkpoint FILE"),
        ("base: b\nexperts: [a]", "expected {name: FILE"),
        ("experts: {a: a}", "base: must be given"),
        ("base: b\nexperts: {a: a}\nexclude: head", "expected a list of globs"),
        ("base: [", "not readable as yaml"),
        ("- a", "expected a mapping"),
    ],
)
def test_wrong_pool_file_is_refused(tmp_path, content, message):
    path = tmp_path / "pool.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message.replace("?", r"\?").replace("{", r"\{")):
        load_pool_file(path)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["regmean", "regmean++"])
def test_merge_with_data_works_on_the_zoo_and_replays(capsys, tmp_path, rule):
    arguments = ["--set", "examples=16", "--pool", "zoo", "--out", tmp_path / "a"]
    assert run(capsys, "merge", "--rule", rule, *arguments)[0] == 0
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "merged.safetensors", "merge.json", "heads.safetensors", "open_clip",
    }  # fmt: skip
    assert run(capsys, "merge", "--recipe", tmp_path / "a" / "merge.json", "--out", tmp_path / "b")[0] == 0
    first, second = (load_file(tmp_path / folder / "merged.safetensors") for folder in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_merge_of_lora_folders_is_replayed_to_the_same_bytes(capsys, tmp_path):
    lora = Path(__file__).parents[1] / "golden" / "lora"
    experts = [f"--expert={name}={lora / name}" for name in ("plain", "turned")]
    command = ("merge", "--rule", "weight_average", "--base", str(lora / "base.safetensors"), *experts)
    assert run(capsys, *command, "--out", str(tmp_path / "a"))[0] == 0
    assert run(capsys, "merge", "--recipe", str(tmp_path / "a" / "merge.json"), "--out", str(tmp_path / "b"))[0] == 0
    assert (tmp_path / "a" / "merged.safetensors").read_bytes() == (tmp_path / "b" / "merged.safetensors").read_bytes()
