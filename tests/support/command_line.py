"""The command line as a user meets it: a small world of two tasks, and calls in it."""

import os
import sys

import pytest
import torch
from PIL import Image

from adamerge import zoo
from adamerge.commands import cli, terminal

QUIET = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*is not resumable.*"),
    pytest.mark.filterwarnings("ignore:.*log_dir.*"),
]
TINY = """
_target_: adamerge.data.UnlabeledTasks
tasks:
  mnist: &task
    _target_: adamerge.data.Task
    dataset: {{_target_: torchvision.datasets.ImageFolder, root: {root}/mnist}}
    classes: {classes}
    templates: {templates}
  digits:
    <<: *task
    dataset: {{_target_: torchvision.datasets.ImageFolder, root: {root}/digits}}
batch_size: 4
protocol: split
seed: ${{seed}}
"""
POOL = """
base: ${zoo:base.safetensors}
experts:
  mnist: ${zoo:experts/mnist.safetensors}
  digits: ${zoo:experts/digits.safetensors}
storage: ram
"""


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """A folder of a user's own yaml files, with two small ImageFolders."""
    folder = tmp_path_factory.mktemp("configs")
    generator = torch.Generator().manual_seed(0)
    for task in ("mnist", "digits"):
        for label in range(10):
            for number in range(2):
                pixels = torch.randint(0, 256, (28, 28, 3), generator=generator, dtype=torch.uint8)
                path = folder / "images" / task / f"class{label}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.numpy()).save(path)
    for group, name, text in (
        (
            "data",
            "tiny",
            TINY.format(root=folder / "images", classes=list(zoo.CLASSES["mnist"]), templates=list(zoo.TEMPLATES)),
        ),
        ("pool", "two", POOL),
    ):
        (folder / group).mkdir(exist_ok=True)
        (folder / group / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture
def arguments(configs, tmp_path, monkeypatch):
    """Arguments of a small run; the working directory is empty, as the command must work from anywhere."""
    monkeypatch.chdir(tmp_path)
    return ["--config-dir", str(configs), "pool=two", "data=tiny", "trainer=cpu", "steps=3", "run_dir=run"]


def call(*arguments):
    """Run a command in this process; return its exit code."""
    with pytest.raises(SystemExit) as exit_info:
        cli.main([str(a) for a in arguments])
    return exit_info.value.code or 0


def refusal(capsys, *arguments):
    """Run a command that must be refused; return its message, which must be one line."""
    capsys.readouterr()
    assert call(*arguments) == 2
    captured = capsys.readouterr()
    lines = [
        line
        for line in captured.err.splitlines()
        if line.strip() and ": imports " not in line and not line.startswith("Reading the pool")  # announced
    ]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


def command(*arguments):
    """A real process of the installed command."""
    return [sys.executable, "-c", "from adamerge.commands.cli import main; main()", *map(str, arguments)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def as_rank(*words):
    """Run a command as one of several processes; return its exit code and what it printed."""
    from io import StringIO

    printed, said = StringIO(), StringIO()
    terminal.out.file, terminal.err.file = printed, said
    try:
        cli.main([str(word) for word in words])
    except SystemExit as left:
        return left.code, printed.getvalue(), said.getvalue()
