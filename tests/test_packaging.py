"""The installed package: everything that a command needs is in the wheel."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow  # `.ci/run` runs these all the same


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The unpacked wheel, in a folder of its own away from the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # without what earlier builds left
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("adamerge", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source],
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_wheel_holds_every_module_config_and_zoo_file(installed):
    def names(root, pattern):
        return {str(p.relative_to(root)) for p in root.rglob(pattern) if "__pycache__" not in p.parts}

    modules = names(ROOT / "adamerge", "*.py") | {"configs/__init__.py"}
    assert names(installed / "adamerge", "*.py") == modules
    assert names(ROOT / "configs", "*.yaml") == names(installed / "adamerge" / "configs", "*.yaml")
    shipped = {name for name in names(ROOT / "adamerge" / "zoo" / "files", "*") if "." in name}
    assert shipped <= names(installed / "adamerge" / "zoo" / "files", "*")
    assert (installed / "adamerge" / "py.typed").is_file()
    assert not (installed / "tests").exists()


def test_wheel_runs_from_any_directory(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    code = "import adamerge, adamerge.configs; print(adamerge.__file__); from adamerge.commands.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "adapt", "--cfg", "job", "objective=entropy"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert str(installed) in result.stdout.splitlines()[0]
    assert "adamerge.objectives.entropy.Entropy" in result.stdout
