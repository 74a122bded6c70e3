"""The command line as a user meets it: a small world of two tasks, and calls in it."""

import os
import sys

import pytest

from adamerge import zoo
from adamerge.commands import cli, terminal
from tests.support.small_tasks import POOL, write_images

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


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """A folder of a user's own yaml files, with two small ImageFolders."""
    folder = tmp_path_factory.mktemp("configs")
    write_images(folder)
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
def listed_benchmark(tmp_path, monkeypatch):
    """Let the configurations of zoos that users build find one, of which only the list of its files is read."""
    for name in ("offline_benchmark", "text_zoo", "llm_zoo"):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        (folder / "zoo.json").write_text("{}")
        (folder / "pool.yaml").write_text("base: base.safetensors\nexperts: {mnist: experts/mnist.safetensors}\n")
    monkeypatch.setenv("ADAMERGE_DATA", str(tmp_path / "data"))


@pytest.fixture
def arguments(configs, tmp_path, monkeypatch):
    """Arguments of a small run; the working directory is empty, as the command must work from anywhere."""
    monkeypatch.chdir(tmp_path)
    quick = ["pool=two", "data=tiny", "trainer=cpu", "report=false", "steps=3", "run_dir=run"]
    return ["--config-dir", str(configs), *quick]


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
