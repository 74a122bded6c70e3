"""The command ``adamerge transform``: packed task vectors of transformed experts, and the pool file beside them."""

import json

import pytest
import torch
from omegaconf import OmegaConf

from adamerge import ExpertPool
from adamerge.commands import cli
from adamerge.commands.run.compose import compose
from adamerge.pool.pack import write_packed
from adamerge.pool.pool_file import load_pool_file
from adamerge.transforms import Dare, Lines, Ties, Trim
from tests.support.toy import make_toy, save_files


def run(capsys, *arguments):
    """Run the command line in this process; return exit code and lines of errors."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    return stopped.value.code or 0, capsys.readouterr().err.strip().splitlines()


@pytest.fixture
def files(tmp_path):
    toy = make_toy()
    return save_files(tmp_path, toy.base, toy.experts)


@pytest.fixture
def pool(files, tmp_path):
    path = tmp_path / "pool.yaml"
    base, experts = files
    entries = {name: file.name for name, file in experts.items()}
    entries["red"] = {"file": "red.safetensors", "task": "roses", "licence": "MIT"}
    path.write_text(OmegaConf.to_yaml({"base": base.name, "experts": entries, "storage": "ram"}))
    return path


@pytest.mark.parametrize("transform", [Ties(0.4), Ties(0.4, "tensor"), Trim(0.3), Dare(0.5), Lines(), None])
def test_packed_while_transformed_equals_transformed_in_memory(files, tmp_path, transform):
    whole = ExpertPool.from_files(*files, transform=transform)
    raw = ExpertPool.from_files(*files, storage="stream")
    path = write_packed(raw, tmp_path / "packed.safetensors", transform=transform)
    if transform is not None:
        assert path.read_bytes() == write_packed(raw, tmp_path / "again.safetensors", transform=transform).read_bytes()
    packed = ExpertPool.from_files(*files, task_vectors=path)
    assert packed.names == whole.names
    assert packed.skipped.keys() == whole.skipped.keys()
    for name in whole.names:
        assert torch.equal(packed.task_vectors(name), whole.task_vectors(name)), name


def test_writing_leaves_a_pool_in_memory_as_it_is(files, tmp_path):
    pool = ExpertPool.from_files(*files, storage="ram")
    before = {name: pool.task_vectors(name).clone() for name in pool.names}
    write_packed(pool, tmp_path / "packed.safetensors", transform=Ties(0.2))
    assert all(torch.equal(before[name], pool.task_vectors(name)) for name in pool.names)


def test_transform_writes_files_that_replay_and_that_merge_reads(capsys, pool, files, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    assert run(capsys, "transform", "--rule", "ties", "--set", "density=0.5", "--pool", pool, "--out", first)[0] == 0
    recipe = json.loads((first / "transform.json").read_text())
    assert recipe["rule"]["density"] == 0.5
    assert set(recipe["hashes"]) == {"base", "red", "green", "blue"}
    assert run(capsys, "transform", "--recipe", first / "transform.json", "--out", again)[0] == 0
    for name in ("task_vectors.safetensors", "pool.yaml"):
        assert (first / name).read_bytes() == (again / name).read_bytes()
    found = load_pool_file(first / "pool.yaml")
    assert found.experts["red"].file == files[1]["red"]
    assert found.experts["red"].task == "roses"
    expected = ExpertPool.from_files(*files, transform=Ties(0.5))
    opened = found.open()
    assert opened.storage == "packed"
    assert all(torch.equal(opened.task_vectors(name), expected.task_vectors(name)) for name in expected.names)
    assert run(
        capsys, "merge", "--rule", "task_arithmetic", "--pool", first / "pool.yaml", "--out", tmp_path / "m"
    )[0] == 0  # fmt: skip
    replayed = run(capsys, "merge", "--recipe", tmp_path / "m" / "merge.json", "--out", tmp_path / "n")
    assert replayed[0] == 0
    (first / "task_vectors.safetensors").write_bytes(b"damaged")
    code, errors = run(capsys, "merge", "--recipe", tmp_path / "m" / "merge.json", "--out", tmp_path / "o")
    assert code == 2
    assert "task_vectors.safetensors" in errors[0]


def test_dtype_none_and_a_changed_expert(capsys, pool, files, tmp_path):
    arguments = ["transform", "--rule", "none", "--dtype", "bfloat16", "--pool", pool, "--out", tmp_path / "half"]
    assert run(capsys, *arguments)[0] == 0
    opened = load_pool_file(tmp_path / "half" / "pool.yaml").open()
    assert opened.dtype_name == "bfloat16"
    files[1]["blue"].write_bytes(files[1]["green"].read_bytes())
    recipe = tmp_path / "half" / "transform.json"
    code, errors = run(capsys, "transform", "--recipe", recipe, "--out", tmp_path / "again")
    assert code == 2
    assert "expected the SHA-256" in errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rule", "tyes"], "Did you mean 'ties'?"),
        (["--rule", "ties", "--set", "densty=1"], "Did you mean 'density'?"),
        (["--rule", "ties", "--set", "density=7"], "density: expected a number"),
        (["--rule", "ties", "--dtype", "int4"], "expected float32, bfloat16, float16"),
        ([], "give --rule NAME"),
    ],
)
def test_wrong_transform_is_one_line(capsys, pool, tmp_path, arguments, message):
    code, errors = run(capsys, "transform", "--pool", pool, "--out", tmp_path / "out", *arguments)
    assert (code, len(errors)) == (2, 1)
    assert message in errors[0]
    assert not (tmp_path / "out" / "task_vectors.safetensors").exists()


def test_transform_of_a_packed_pool_is_refused(capsys, pool, tmp_path):
    assert run(capsys, "transform", "--rule", "none", "--pool", pool, "--out", tmp_path / "a")[0] == 0
    code, errors = run(
        capsys, "transform", "--rule", "ties", "--pool", tmp_path / "a" / "pool.yaml", "--out", tmp_path / "b"
    )
    assert code == 2
    assert "packed task vectors already" in errors[0]


def test_adapt_reads_a_pool_file(capsys, pool, files, tmp_path):
    assert run(capsys, "transform", "--rule", "none", "--pool", pool, "--out", tmp_path / "a")[0] == 0
    config = compose(["pool=files", f"pool.file={tmp_path / 'a' / 'pool.yaml'}", "pool.include=['proj']"])
    assert config.pool.base == str(files[0])
    assert dict(config.pool.experts) == {name: str(file) for name, file in files[1].items()}
    assert config.pool.task_vectors == str(tmp_path / "a" / "task_vectors.safetensors")
    assert config.pool.include == ["proj"]
    assert "file" not in config.pool
    assert compose(["pool=files", f"pool.file={pool}"]).pool.storage == "ram"
    with pytest.raises(ValueError, match=r"pool\.base: pool\.file=.* says it already"):
        compose(["pool=files", f"pool.file={pool}", "pool.base=x"])
    with pytest.raises(FileNotFoundError, match="no such pool file"):
        compose(["pool=files", "pool.file=gone.yaml"])
