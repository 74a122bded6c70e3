"""A run's folder and files beside what the run was made with: what has changed is refused by the option's name."""

import json
import shutil

import pytest
import torch
from omegaconf import OmegaConf

from adamerge import zoo
from adamerge.commands.run.processes import device_of
from tests.support.command_line import QUIET, call, refusal

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:The dirpath has changed")]  # of folders that are copies


@pytest.fixture(scope="module")
def stopped(configs, tmp_path_factory):
    """The folder of a run that has saved and not exported, with an expert of its own beside it."""
    folder = tmp_path_factory.mktemp("stopped")
    expert, start = folder / "digits.safetensors", folder / "start.json"
    shutil.copyfile(zoo.files() / "experts" / "digits.safetensors", expert)
    quick = ["pool=two", "data=tiny", "trainer=cpu", "report=false", "references=false", "logger=none"]
    own = ["--config-dir", str(configs), *quick, f"pool.experts.digits={expert}"]
    assert call("adapt", *own, "steps=1", "evaluate=false", f"run_dir={folder / 'first'}") == 0
    shutil.copyfile(folder / "first" / "coefficients.json", start)
    assert call("adapt", *own, "steps=2", f"init={start}", f"run_dir={folder / 'run'}") == 0
    (folder / "run" / "merged.safetensors").unlink()
    return folder


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of it, whose expert and start are copies too."""
    shutil.copytree(stopped, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("config.yaml"):
        path.write_text(path.read_text().replace(str(stopped), str(tmp_path / "copy")))
    return tmp_path / "copy" / "run"


def edit(run, option, value):
    config = OmegaConf.load(run / "config.yaml")
    OmegaConf.update(config, option, value)
    OmegaConf.save(config, run / "config.yaml")


COMMANDS = [["adapt", "resume={run}"], ["export", "{run}", "--out", "{run}/out"], ["evaluate", "{run}"]]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_edited_configuration_is_refused_by_option(run, capsys, command):
    edit(run, "optimizer.lr", 0.5)
    edit(run, "granularity._target_", "adamerge.model.granularity.TaskWise")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    text = refusal(capsys, *(word.format(run=run) for word in command))
    assert "config.yaml: granularity._target_ has changed since the run was begun: " in text
    assert "'adamerge.model.granularity.Layer' then (last.ckpt), 'adamerge.model.granularity.TaskWise' now" in text
    assert "'optimizer.lr'" in text
    assert "init=FILE" in text
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", COMMANDS[1:], ids=lambda command: command[0])
def test_changed_expert_is_refused_by_option(run, capsys, command):
    shutil.copyfile(zoo.files() / "experts" / "latin.safetensors", run.parent / "digits.safetensors")
    first = run.parent / "first"
    text = refusal(capsys, *(word.format(run=first) for word in command))
    assert f"pool.experts.digits: its content has changed since the run in {first} was made: sha256 " in text
    assert not (first / "out").exists()


def test_changed_start_is_refused_by_option(run, capsys):
    path = run.parent / "start.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))
    for command in COMMANDS[:2]:
        assert f"init: {path} has changed since the run" in refusal(capsys, *(word.format(run=run) for word in command))


def test_options_of_the_export_are_compared_where_checkpoints_are_gone(run, capsys):
    shutil.rmtree(run / "checkpoints")
    edit(run, "seed", 5)
    assert "seed has changed since the run was begun: 0 then (merge.json), 5 now" in refusal(capsys, "evaluate", run)


def test_report_says_that_the_configuration_has_been_edited(run):
    edit(run, "optimizer.lr", 0.5)
    assert call("report", run) == 0
    assert "optimizer.lr has changed since the run was begun" in (run / "report.html").read_text()


def test_files_that_lie_elsewhere_now_and_their_content_does_not_differ_are_taken(run):
    moved = run.parent / "moved.safetensors"
    (run.parent / "digits.safetensors").rename(moved)
    edit(run, "pool.experts.digits", str(moved))
    assert call("export", run, "--out", run / "out") == 0
    assert (run / "out" / "merged.safetensors").is_file()


def test_resume_with_other_threads_warns(run, capsys):
    path = run / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    assert content["threads"] == torch.get_num_threads()
    torch.save({**content, "threads": 7}, path)
    assert call("adapt", f"resume={run}") == 0
    assert (
        "The run had 7 threads, this process has 1: its result may differ in the last bits" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("trainer", "has_gpu", "device"),
    [
        ({}, True, "cuda:0"),
        ({"accelerator": "gpu", "devices": [2]}, True, "cuda:2"),
        ({"accelerator": "gpu", "devices": 2}, True, "cuda:0"),
        ({"accelerator": "cpu"}, True, "cpu"),
        ({"accelerator": "auto"}, False, "cpu"),
        ({"accelerator": "gpu"}, False, "cpu"),
    ],
)
def test_device_of_is_the_trainers_first(monkeypatch, trainer, has_gpu, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert str(device_of(OmegaConf.create({"trainer": trainer}))) == device


def test_evaluate_and_rows_of_compare_run_on_the_trainers_device(run, arguments, monkeypatch, tmp_path):
    from adamerge.commands.compare import row
    from adamerge.commands.run import processes
    from adamerge.model.merged_model import MergedModel

    moved, to_device = [], MergedModel.to_device
    monkeypatch.setattr(
        MergedModel, "to_device", lambda self, device: (moved.append(device), to_device(self, "cpu"))[1]
    )
    monkeypatch.setattr(processes, "device_of", lambda config: torch.device("cuda", 1))
    shutil.copytree(run.parent / "first", tmp_path / "run")
    assert call("evaluate", tmp_path / "run") == 0
    assert moved == [torch.device("cuda", 1)]
    row.shared_assembly.cache_clear()
    row.shared_assembly(tuple(arguments), 0)
    assert moved == [torch.device("cuda", 1)] * 2
    row.shared_assembly.cache_clear()
