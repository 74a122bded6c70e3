"""Runs that are killed: whatever the moment, a resume ends with the bytes of an uninterrupted run."""

import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

from tests.support.small_run import arguments, output, run, write_configs

STEPS, EVERY = 8, 2
FILES = ("merged.safetensors", "coefficients.safetensors")
OPTIONS = (f"steps={STEPS}", f"checkpoint_every={EVERY}", "granularity=row", "optimizer.lr=0.01", "logger=none")


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    return write_configs(tmp_path_factory.mktemp("configs"))


@pytest.fixture(scope="module")
def whole(configs, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(*arguments(configs, folder / "run", *OPTIONS), cwd=folder) == 0, output(folder)
    return folder / "run"


def points(count: int) -> list[tuple[int, float]]:
    """Steps and moments within about a step's time, at random but the same each time."""
    generator = random.Random(0)
    return [(generator.randint(1, STEPS), generator.uniform(0, 0.03)) for _ in range(count)]


def assert_resumes(folder, whole, cwd):
    assert run("adapt", f"resume={folder}", cwd=cwd) == 0, output(cwd)
    for name in FILES:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    left = [path.name for path in folder.rglob("*") if path.name.endswith(".tmp") or path.name == ".lock"]
    assert left == []


@pytest.mark.parametrize(
    ("step", "seconds"),
    [pytest.param(*point, marks=[pytest.mark.slow] if number >= 2 else []) for number, point in enumerate(points(20))],
)
def test_run_killed_anywhere_resumes_to_the_same_bytes(configs, whole, tmp_path, step, seconds):
    folder = tmp_path / "run"
    assert run(*arguments(configs, folder, *OPTIONS), cwd=tmp_path, kill=("step", step, seconds)) == -9
    assert_resumes(folder, whole, tmp_path)


def syncs(folder: Path) -> dict[int, str]:
    """The files that a run syncs, by number; each sync of a file is followed by one of its folder."""
    saved = [f"step {step}" for step in range(EVERY, STEPS + 1, EVERY)]
    names = ["config.yaml", *saved, "merged.safetensors", "coefficients.safetensors", "coefficients.json"]
    return {1 + 2 * number: name for number, name in enumerate(names)}


@pytest.mark.parametrize(
    ("number", "share"),
    [(5, 0.5), (11, 0.5), pytest.param(15, 0.3, marks=pytest.mark.slow)],
    ids=["checkpoint", "export", "coefficients"],
)
def test_run_killed_while_it_writes_leaves_no_half_file(configs, whole, tmp_path, number, share):
    folder = tmp_path / "run"
    assert run(*arguments(configs, folder, *OPTIONS), cwd=tmp_path, kill=("file", number, share)) == -9
    temporary = [path.name for path in folder.rglob(".*.tmp")]
    assert len(temporary) == 1, temporary  # the file that was being written, under no final name
    name = syncs(folder)[number]
    final = "last.ckpt" if name.startswith("step") else name
    assert temporary[0].startswith(f".{final}."), temporary
    saved = folder / "checkpoints" / "last.ckpt"
    if name == "step 4":
        assert torch.load(saved, weights_only=True)["global_step"] == 2
    elif not name.startswith("step"):
        assert not (folder / final).exists()
        assert torch.load(saved, weights_only=True)["global_step"] == STEPS
    assert_resumes(folder, whole, tmp_path)


def test_run_killed_before_its_first_checkpoint_starts_anew(configs, whole, tmp_path):
    command = [*arguments(configs, tmp_path / "run", *OPTIONS), "resume=auto"]
    assert run(*command, cwd=tmp_path, kill=("file", 3, 0.0)) == -9
    assert not list((tmp_path / "run").rglob("last.ckpt"))
    assert run(*command, "seed=1", cwd=tmp_path) == 2  # other options than the stored ones
    assert run(*command, cwd=tmp_path) == 0, output(tmp_path)
    assert all((tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes() for name in FILES)


def test_torn_checkpoint_is_refused_by_name(configs, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    last = folder / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-3000])
    assert run("adapt", f"resume={folder}", cwd=tmp_path) == 2
    text = " ".join(output(tmp_path).split())
    assert f"error: {last}: damaged checkpoint (" in text
    assert "Traceback" not in text


def test_checkpoint_holds_coefficients_optimizer_generators_positions_and_recipe(whole):
    path = whole / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    assert {"state_dict", "optimizer_states", "generators", "recipe", "pool", "loops"} <= set(content)
    assert content["recipe"]["steps"] == STEPS
    assert set(content["generators"]) == {"python", "numpy", "torch", "cuda"}
    numbers = sum(value.numel() for value in content["state_dict"].values())
    assert path.stat().st_size < 4 * 3 * numbers + 60_000  # float32: coefficients and Adam's two moments; no weights


@pytest.mark.slow
@pytest.mark.parametrize(("by", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_during_an_export_leave_whole_files_only(configs, whole, tmp_path, by, code):
    folder = tmp_path / "run"
    assert run(*arguments(configs, folder, *OPTIONS), cwd=tmp_path, kill=("file", 13, 0.5), by=by) == code
    assert "Go on with: adamerge adapt resume=" in output(tmp_path)
    for command in (["--out", "out"], ["--coefficients", str(whole / "coefficients.json"), "--out", "out"]):
        assert run("export", str(folder), *command, cwd=tmp_path, kill=("file", 1, 0.5), by=by) == code
        assert list((tmp_path / "out").rglob("*")) == [], output(tmp_path)
    assert list(tmp_path.rglob("*.tmp")) == []
    assert run("export", str(folder), cwd=tmp_path) == 0, output(tmp_path)  # the one that was stopped is replaced
    shutil.rmtree(folder / "open_clip")
    (folder / "merge.json").unlink()
    assert_resumes(folder, whole, tmp_path)
