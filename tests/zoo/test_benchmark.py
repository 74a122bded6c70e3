"""The offline benchmark: Fashion-MNIST from either place, its zoo made in miniature, and runs on it."""

import gzip
import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from adamerge import zoo
from adamerge.commands.cli import main
from adamerge.commands.run.compose import compose
from adamerge.commands.run.shipped import preset_file
from adamerge.data.benchmarks import open_split, opening
from adamerge.data.benchmarks.readers import IdxImages
from adamerge.errors import InputError
from adamerge.zoo import benchmark
from adamerge.zoo.benchmark import BENCHMARK_CLASSES, FashionImages, benchmark_design, benchmark_tasks
from adamerge.zoo.design import Curriculum, TrainingPlan
from tests.support.data_files import fashion_mnist, idx, put

for _package in ("mlxtend", "sklearn", "matplotlib"):
    pytest.importorskip(_package)


@pytest.fixture(autouse=True)
def _nowhere(tmp_path, monkeypatch):
    """Whether this machine has Debian's package must not matter."""
    opening.open_at.cache_clear()
    monkeypatch.setattr(benchmark, "DEBIAN", tmp_path / "usr")


def debian(folder: Path, train: int = 40, test: int = 20) -> Path:
    """Write files as Debian's package has them: compressed, and not below torchvision's folder."""
    rng = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", test)):
        images = idx(rng.integers(0, 256, (count, 28, 28)))
        put(folder / f"fashion-mnist/{prefix}-images-idx3-ubyte.gz", gzip.compress(images))
        put(folder / f"fashion-mnist/{prefix}-labels-idx1-ubyte.gz", gzip.compress(idx(np.arange(count) % 10)))
    return folder


def test_files_of_debians_package_are_a_layout_of_the_data_set(tmp_path):
    split = open_split("fashion_mnist", "test", debian(tmp_path / "datasets"))
    assert len(split) == 20
    image, label = split[13]
    assert (image.mode, image.size, label) == ("RGB", (28, 28), 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(idx(np.zeros((2, 28, 28))))[:-12], "cannot be decompressed.*complete"),
        (gzip.compress(b"\0\0\x0d\x03" + bytes(20)), "IDX format with 3 dimensions"),
        (gzip.compress(idx(np.zeros((2, 28, 28)))[:-5]), "expected 1568 bytes.*found 1563"),
        (gzip.compress(idx(np.zeros((3, 28, 28)))), "each of the 3 images.*found 2"),
        (b"plain", "cannot be decompressed"),
    ],
    ids=["cut", "another format", "too short", "too many", "not compressed"],
)
def test_damaged_idx_file_is_named(tmp_path, content, message):
    put(tmp_path / "i.gz", content)
    put(tmp_path / "l.gz", gzip.compress(idx(np.zeros(2))))
    with pytest.raises(InputError, match=message):
        IdxImages(tmp_path, "i.gz", "l.gz")


def test_fashion_images_are_the_same_from_either_place(tmp_path, monkeypatch):
    fashion_mnist(tmp_path / "data")
    own = FashionImages("train", tmp_path / "data", slice(5, 15))
    assert own.images.shape == (10, 3, 28, 28)
    assert own.images.dtype == torch.float32
    assert -1 <= own.images.min() < own.images.max() <= 1
    assert own.labels.tolist() == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]
    monkeypatch.setattr(benchmark, "DEBIAN", debian(tmp_path / "usr"))
    assert len(FashionImages("test", tmp_path / "data")) == 10  # data.root comes first
    assert len(FashionImages("test", tmp_path / "none")) == 20


def test_missing_fashion_mnist_names_both_ways_to_get_it(tmp_path):
    with pytest.raises(InputError) as caught:
        benchmark_tasks(tmp_path / "data")
    message = str(caught.value)
    assert "apt install dataset-fashion-mnist" in message
    assert f"adamerge data get fashion_mnist --root {tmp_path / 'data'}" in message
    assert "data.root=DIR" in message


def test_tasks_and_pretraining_images(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "DEBIAN", debian(tmp_path / "usr"))
    tasks = benchmark_tasks(tmp_path)
    assert list(tasks) == ["fashion", *zoo.TASKS]
    assert {name: list(task.classes) for name, task in tasks.items()} == {
        name: list(names) for name, names in BENCHMARK_CLASSES.items()
    }
    design = benchmark_design(tmp_path)
    images, labels = design.pretraining("generic", 80, 0)
    assert images.shape == (80, 3, 28, 28)
    assert (labels >= 50).sum() == 20
    assert labels.max() < len(design.pretraining_classes) == 60
    assert (design.pretraining("clean", 60, 0)[1] < 50).all()  # the curriculum's first images are of fonts only
    again = design.pretraining("generic", 80, 0)
    assert torch.equal(images, again[0])


def test_missing_zoo_is_one_problem_with_its_remedy(tmp_path, capsys):
    with pytest.raises(InputError, match="adamerge zoo build offline_benchmark --root"):
        compose(["experiment=offline_benchmark", f"data.root={tmp_path}"])
    with pytest.raises(SystemExit) as stopped:
        main(["check", "experiment=offline_benchmark", f"data.root={tmp_path}"])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert sum("is not there" in line for line in lines) == 1
    (tmp_path / "offline_benchmark").mkdir()
    (tmp_path / "offline_benchmark" / "building.json").write_text("{}")
    with pytest.raises(InputError, match="is not finished"):
        compose(["experiment=offline_benchmark", f"data.root={tmp_path}"])


def preset(folder: Path) -> str:
    """Write the benchmark's preset with those of its rows that are made at once."""
    content = OmegaConf.load(preset_file("compare", "offline_benchmark"))
    content.rows = {name: row for name, row in content.rows.items() if "experiment" not in str(row)}
    OmegaConf.save(content, folder / "preset.yaml")
    return str(folder / "preset.yaml")


@pytest.mark.slow
def test_build_and_runs_in_miniature(tmp_path, monkeypatch):
    root = tmp_path / "data"
    monkeypatch.setattr(benchmark, "DEBIAN", debian(tmp_path / "usr", train=25_010 + 600))
    tiny = replace(
        benchmark_design(root),
        base=TrainingPlan(steps=2, batch_size=16, learning_rate=1e-3, weight_decay=0.05),
        expert=TrainingPlan(steps=1, batch_size=16, learning_rate=1e-4, weight_decay=0.1),
        curriculum=Curriculum(num_images=120, clean_steps=1),
    )
    command = importlib.import_module("adamerge.zoo.benchmark")
    monkeypatch.setattr(command, "benchmark_design", lambda root: tiny)
    with pytest.raises(SystemExit) as ended:
        main(["zoo", "build", "offline_benchmark", "--root", str(root)])
    assert ended.value.code == 0
    own = [f"data.root={root}", "trainer=cpu", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(SystemExit) as ended:
        main(["adapt", "experiment=offline_benchmark", "steps=2", "data.batch_size=2", *own])
    assert ended.value.code == 0
    assert (tmp_path / "run" / "merged.safetensors").is_file()
    with pytest.raises(SystemExit) as ended:
        main(["compare", "--preset", preset(tmp_path), "--out", str(tmp_path / "rows"), *own[:2]])
    assert ended.value.code == 0
