import importlib.util
import logging
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from adamerge import InputError
from adamerge.commands.run import imports
from adamerge.commands.run.imports import announce, check_targets, targets_beyond
from adamerge.commands.run.listed import LISTED, is_listed
from adamerge.commands.run.shipped import shipped_folder

OBJECTIVE = """
from dataclasses import dataclass
print("imported my_objectives")

@dataclass(frozen=True)
class Confidence:
    def __call__(self, step):
        return -(step.outputs.logits.softmax(-1) ** 2).sum(-1).mean()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a module, a package and a folder without __init__.py."""
    (tmp_path / "my_objectives.py").write_text(OBJECTIVE)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("raise SystemExit('imported mine')")
    (tmp_path / "mine" / "inner.py").write_text("class Thing: pass")
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "inner.py").write_text("class Thing: pass")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(*paths: str) -> dict[str, object]:
    return {"objective": {"_target_": paths[0]}, "data": {"tasks": [{"_target_": path} for path in paths[1:]]}}


def test_targets_beyond_name_node_path_and_file_without_import(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    found = targets_beyond(config("my_objectives.Confidence", "mine.inner.Thing", "loose.inner.Thing", "nowhere.X"))
    assert [(t.node, t.path, t.file) for t in found if t.is_found] == [
        ("objective", "my_objectives.Confidence", folder / "my_objectives.py"),
        ("data.tasks[0]", "mine.inner.Thing", folder / "mine" / "inner.py"),
        ("data.tasks[1]", "loose.inner.Thing", folder / "loose" / "inner.py"),
    ]
    assert not {"my_objectives", "mine", "loose"} & (set(sys.modules) - before)


def test_configurations_that_ship_name_nothing_beyond_the_list():
    files = [path for path in shipped_folder("").rglob("*.yaml") if "_target_" in path.read_text()]
    assert len(files) > 60
    beyond = {(path.name, t.path) for path in files for t in targets_beyond(yaml.safe_load(path.read_text()))}
    assert not beyond


@pytest.mark.parametrize("name", [name for names in LISTED.values() for name in names if "*" not in name])
def test_names_of_the_list_exist_and_are_classes_or_functions(name):
    package = name.split(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    assert callable(pkgutil.resolve_name(name))


@pytest.mark.parametrize(
    "name",
    [
        *(
            "torch.load",
            "torch.optim.adam.torch.load",
            "torch.optim.lr_scheduler.warnings.warn",
            "torch.optim.functional",
        ),
        *("adamerge.objectives.entropy.Tensor", "adamerge.objectives.entropy.Entropy.__init__"),
        *("adamerge.commands.cli.main", "adamerge.backbones.open_clip.os.mkdir", "adamerge.data.Protocol.__class__"),
        *(
            "torchvision.transforms.functional.crop",
            "transformers.AutoModel.from_pretrained",
            "builtins.eval",
            "os.system",
        ),
        *("torch.optim.", "", ".", "torch.optim.Adam\n"),
    ],
)
def test_names_that_a_listed_module_merely_has_at_hand_are_not_listed(name):
    assert not is_listed(name)


def test_targets_beyond_leave_out_what_every_run_uses():
    own = ["adamerge.data.Task", "torch.optim.Adam", "torchvision.datasets.ImageFolder", "lightning.pytorch.Trainer"]
    assert targets_beyond(config(*own)) == []
    assert [t.path for t in targets_beyond({"a": {"_target_": None}, "b": {"_target_": "os.system"}})] == ["os.system"]
    through = "adamerge.system.files.os.system"  # what a module of ours has imported is not ours
    assert [t.path for t in targets_beyond({"a": {"_target_": through}})] == [through]
    assert "time.sleep from Python itself" in str(targets_beyond({"a": {"_target_": "time.sleep"}})[0])


def test_targets_beyond_see_through_hydras_own_functions(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    found = targets_beyond({"a": {"_target_": "hydra.utils.get_class", "path": "mine.inner.Thing"}})
    assert [t.path for t in found] == ["hydra.utils.get_class", "mine.inner.Thing"]


def test_announce_logs_each(folder, monkeypatch, caplog):
    monkeypatch.syspath_prepend(str(folder))
    with caplog.at_level(logging.INFO):
        announce(config("my_objectives.Confidence"))
    assert caplog.messages == [f"objective: imports my_objectives.Confidence from {folder / 'my_objectives.py'}"]


@pytest.mark.parametrize("path", ["my_objectives.Confidence", "mine.inner.Thing", "loose.inner.Thing"])
@pytest.mark.parametrize("entry", ["", None], ids=["python -c", "python -m"])
def test_check_targets_working_directory_by_the_interpreters_start_is_refused(folder, monkeypatch, path, entry):
    others = [other for other in sys.path if other]
    monkeypatch.setattr(sys, "path", [str(folder) if entry is None else "", *others])
    with pytest.raises(InputError, match=rf"objective: {path} would be imported from {folder}.*PYTHONPATH=\."):
        check_targets(config(path))
    monkeypatch.setattr(sys, "path", [str(folder), *others, str(folder)])  # PYTHONPATH, or an editable installation
    check_targets(config(path))
    monkeypatch.setattr(sys, "path", [others[0], str(folder), *others])  # the adamerge command with PYTHONPATH=.
    check_targets(config(path))


def test_check_targets_installed_module_comes_first(folder, monkeypatch):
    (folder / "numpy.py").write_text("raise SystemExit")
    monkeypatch.setattr(sys, "path", [*[other for other in sys.path if other], ""])
    assert imports.targets_beyond(config("numpy.array"))[0].file != folder / "numpy.py"
    check_targets(config("numpy.array"))


@pytest.mark.slow
@pytest.mark.parametrize("given", [True, False], ids=["PYTHONPATH", "nothing"])
def test_check_command_shows_or_refuses_code_of_the_working_directory(folder, given):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ({"PYTHONPATH": "."} if given else {})
    code = "from adamerge.commands.cli import main; main()"
    (folder / "my_configs" / "objective").mkdir(parents=True)
    (folder / "my_configs" / "objective" / "own.yaml").write_text("_target_: my_objectives.Confidence\n")
    arguments = ["check", "--config-dir", "my_configs", "objective=own"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        check=False,
    )
    file = Path(folder / "my_objectives.py").resolve()
    assert f"objective: imports my_objectives.Confidence from {file}" in done.stdout.replace("\n", "")
    if given:
        assert done.returncode == 0, done.stderr
        assert "imported my_objectives" in done.stdout
    else:
        assert done.returncode == 2
        assert "would be imported from" in done.stderr
        assert "imported my_objectives" not in done.stdout
