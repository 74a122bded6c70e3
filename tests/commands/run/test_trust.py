"""A stranger's folder runs no code, whatever command reads it; the user's own does, where a key says whose it is."""

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from adamerge import InputError
from adamerge.commands.run import trust
from adamerge.commands.run.folder import load_config, look_at_config, resume_command, save_config
from adamerge.commands.run.imports import check_builds_no_library, check_listed
from tests.support.command_line import QUIET, call, refusal

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:The dirpath has changed")]  # of folders that are copies

OBJECTIVE = """
class Confidence:
    def __call__(self, step):
        return -(step.outputs.logits.softmax(-1) ** 2).sum(-1).mean()
"""


class Mark:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def mark(tmp_path):
    """A folder that is there only if code of a stranger's has run."""
    path = tmp_path / "mark"
    yield path
    assert not path.exists(), "code of a stranger's has run"


@pytest.fixture
def attack(tmp_path, mark):
    """A node that opens a pickle, which makes the mark."""
    torch.save(Mark(mark), tmp_path / "words.pt")
    return {"_target_": "torch.load", "f": str(tmp_path / "words.pt"), "weights_only": False}


@pytest.fixture(scope="module")
def finished(configs, tmp_path_factory):
    """The folder of a run of two stages, with all that other commands read."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    quick = ["pool=two", "data=tiny", "trainer=cpu", "report=false", "steps=2", "references=false"]
    stage = "first_stage={steps: 1, granularity: {_target_: adamerge.model.granularity.TaskWise}}"
    assert call("adapt", "--config-dir", configs, *quick, stage, f"run_dir={folder}") == 0
    return folder


@pytest.fixture
def stranger(finished, attack, tmp_path):
    """A copy of the run, whose configuration opens a pickle."""
    folder = tmp_path / "stranger"
    shutil.copytree(finished, folder)
    config = OmegaConf.load(folder / "config.yaml")
    config.backbone.tokenizer = attack
    OmegaConf.save(config, folder / "config.yaml")
    recipe = json.loads((folder / "merge.json").read_text())
    recipe["config"]["backbone"]["tokenizer"] = attack
    (folder / "merge.json").write_text(json.dumps(recipe))
    return folder


# Every command that reads a folder


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "{run}"],
        ["export", "{run}", "--out", "out"],
        ["export", "{run}", "--coefficients", "{run}/coefficients.json", "--out", "out"],
        ["export", "{run}", "--to", "open_clip", "--out", "out"],
        ["adapt", "resume={run}"],
    ],
    ids=" ".join,
)
def test_strangers_folder_is_refused_by_name_before_anything_is_built(stranger, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in stranger.rglob("*") if path.is_file()}
    text = refusal(capsys, *(word.format(run=stranger) for word in command))
    assert "config.yaml: backbone.tokenizer: torch.load is not on adamerge's list of names" in text
    assert "--trust-code" in text
    assert before == {path: path.read_bytes() for path in stranger.rglob("*") if path.is_file()}
    assert not (tmp_path / "out").exists()


def test_export_of_a_recipe_without_configuration_is_refused(stranger, tmp_path, capsys):
    (stranger / "config.yaml").unlink()
    text = refusal(capsys, "export", stranger, "--to", "open_clip", "--out", tmp_path / "out")
    assert "merge.json: backbone.tokenizer: torch.load is not on adamerge's list of names" in text


def test_first_stage_of_a_strangers_folder_is_refused(finished, attack, tmp_path, capsys):
    folder = tmp_path / "stranger"
    shutil.copytree(finished, folder)
    stage = OmegaConf.load(folder / "stage_1" / "config.yaml")
    stage.backbone.tokenizer = attack
    OmegaConf.save(stage, folder / "stage_1" / "config.yaml")
    text = refusal(capsys, "adapt", f"resume={folder}")
    assert "stage_1/config.yaml: backbone.tokenizer: torch.load" in text


def test_report_of_a_strangers_folder_builds_nothing_of_it(stranger):
    (stranger / "report.json").unlink(missing_ok=True)
    assert call("report", stranger) == 0
    assert (stranger / "report.html").is_file()


def test_run_that_goes_on_in_a_strangers_folder_builds_what_the_command_says(configs, finished, attack, tmp_path):
    folder = tmp_path / "stranger"
    shutil.copytree(finished, folder)
    for path in (folder / "config.yaml", folder / "stage_1" / "config.yaml"):
        config = OmegaConf.load(path)
        config.logger.evil = attack  # which no command compares
        OmegaConf.save(config, path)
    quick = ["pool=two", "data=tiny", "trainer=cpu", "report=false", "steps=2", "references=false"]
    stage = "first_stage={steps: 1, granularity: {_target_: adamerge.model.granularity.TaskWise}}"
    assert call("adapt", "--config-dir", configs, *quick, stage, "resume=auto", f"run_dir={folder}") == 0


@pytest.mark.parametrize("command", ["merge", "transform"])
def test_recipe_of_a_stranger_is_refused(tmp_path, mark, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    rule = {"merge": "weight_average", "transform": "trim"}[command]
    assert call(command, "--rule", rule, "--pool", "zoo", "--out", "own") == 0
    recipe = json.loads((tmp_path / "own" / f"{command}.json").read_text())
    recipe["rule"] = {"_target_": "os.mkdir", "path": str(mark)}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    text = refusal(capsys, command, "--recipe", "recipe.json", "--out", "again")
    assert "recipe.json: rule: os.mkdir is not on adamerge's list of names" in text


@pytest.mark.slow
def test_recipe_of_a_stranger_that_composes_a_strangers_files_is_refused(tmp_path, attack, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        call("merge", "--rule", "weight_average", "--pool", "zoo", "--batch-norm", "recalibrate", "--out", "own") == 0
    )
    (tmp_path / "evil" / "backbone").mkdir(parents=True)
    OmegaConf.save({"defaults": ["zoo"], "tokenizer": attack}, tmp_path / "evil" / "backbone" / "evil.yaml")
    recipe = json.loads((tmp_path / "own" / "merge.json").read_text())
    recipe["overrides"] = [f"--config-dir={tmp_path / 'evil'}", "backbone=evil"]
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    text = refusal(capsys, "merge", "--recipe", "recipe.json", "--out", "again")
    assert "recipe.json: backbone.tokenizer: torch.load is not on adamerge's list" in text


def test_check_lists_and_builds_no_name_of_a_library_beyond_the_list(arguments, configs, attack, capsys):
    (configs / "backbone").mkdir(exist_ok=True)
    OmegaConf.save({"defaults": ["zoo"], "tokenizer": attack}, configs / "backbone" / "evil.yaml")
    assert call("check", *arguments, "backbone=evil") == 2
    shown = capsys.readouterr()
    assert "backbone.tokenizer: imports torch.load from " in shown.out
    assert "error: backbone.tokenizer: torch.load from " in shown.err
    assert "--trust-code" in shown.err
    assert call("check", *arguments, "backbone=evil", "--json") == 2
    found = json.loads(capsys.readouterr().out)
    assert [len(found["problems"]), len(found["imports"])] == [1, 1]


# Ways to write a name


@pytest.mark.parametrize(
    "text",
    [
        "logger: {x: {_target_: os.mkdir, path: MARK}}",
        "callbacks: {x: {_target_: adamerge.system.files.os.mkdir, path: MARK}}",
        "callbacks: {x: {_target_: adamerge.callbacks.ExportMergedWeights, dirpath: MARK}}",
        "data: {tasks: {x: {dataset: {loader: {_target_: torch.load, _partial_: true}}}}}",
        "a: {_target_: torch.optim.Adam, _args_: [[{_target_: os.mkdir, path: MARK}]]}",
        "a: {_target_: hydra.utils.get_method, path: os.mkdir}",
        "a: {_target_: torch.optim.adam.torch.load}",
        "a: {_target_: torchvision.datasets.DatasetFolder}",
        "a: {_target_: builtins.eval}",
        "a: {_target_: pandas.read_pickle}",
        "a: {_target_: numpy.load}",
        "a: {_target_: torch.jit.load}",
        "a: {_target_: torch.hub.load}",
        "a: {_target_: adamerge.commands.cli.main}",
        "a: {_target_: not.there.at.all}",
    ],
)
def test_configuration_of_a_stranger_is_refused_however_it_names_code(tmp_path, mark, text):
    (tmp_path / "config.yaml").write_text(text.replace("MARK", str(mark)) + "\n")
    with pytest.raises(InputError, match=r"config\.yaml: \S+: .* is not on adamerge's list of names"):
        load_config(tmp_path)
    assert bool(check_builds_no_library(look_at_config(tmp_path))) == ("_target_: not." not in text)
    load_config(tmp_path, trust_code=True)  # builds nothing by itself


@pytest.mark.parametrize(
    "text",
    [
        "logger: {a: {_target_: lightning.pytorch.loggers.CSVLogger, save_dir: x, name: ../../x}}",
        "logger: {a: {_target_: lightning.pytorch.loggers.CSVLogger, save_dir: x, name: m, version: ..}}",
        "logger: {a: {_target_: lightning.pytorch.loggers.TensorBoardLogger, _args_: [elsewhere]}}",
        "logger: {a: {_target_: lightning.pytorch.loggers.WandbLogger, settings: {x_executable: evil}}}",
        "backbone: {head_cache: elsewhere}",
        "teacher_cache: elsewhere",
    ],
)
def test_what_a_stranger_configures_writes_into_the_runs_folder_only(tmp_path, text):
    (tmp_path / "config.yaml").write_text(f"{text}\n")
    with pytest.raises(InputError, match=r"config\.yaml: [\w.]+: .* elsewhere than into the run's folder"):
        load_config(tmp_path)
    assert resume_command(tmp_path).endswith(" --trust-code")
    load_config(tmp_path, trust_code=True)


def test_nothing_is_imported_from_the_folder_that_a_run_was_launched_in(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.chdir(here := Path.cwd())
    (tmp_path / "config.yaml").write_text(f"cwd: {tmp_path}\n")
    load_config(tmp_path)
    assert (Path.cwd(), sys.path[0]) == (tmp_path, str(here))


@pytest.mark.parametrize(
    "text",
    [
        "a: {_target_: '${b}'}\nb: os.mkdir",
        "a: ${b}\nb: {_target_: os.mkdir, path: MARK}",
        "a: '${oc.create:\"{_target_: os.mkdir, path: MARK}\"}'",
        "a: '\\${oc.create:\"{_target_: os.mkdir, path: MARK}\"}'",
        "a: {_target_: '${oc.env:HOME}'}",
        "a: {_target_: '${nowhere}'}",
    ],
)
def test_interpolations_count_as_what_they_lead_to_and_are_refused_in_a_strangers_file(tmp_path, mark, text):
    text = text.replace("MARK", str(mark))
    with pytest.raises(InputError, match=r"file: \S+: .* is not on adamerge's list of names"):
        check_listed(OmegaConf.create(text), "file", "it is a stranger's")
    for written in (text, text.replace("'", '"').replace("${", "\\x24{")):  # which yaml reads as the same
        (tmp_path / "config.yaml").write_text(written + "\n")
        with pytest.raises(InputError, match=r"config\.yaml"):
            load_config(tmp_path)


def test_nodes_deep_inside_one_another_are_refused():
    content = {"_target_": "os.mkdir"}
    for _ in range(200):
        content = {"a": content}
    with pytest.raises(InputError, match="expected nodes of up to 100 levels"):
        check_listed(content, "file", "it is a stranger's")


# The key


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder of configurations of a user's, empty at first."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def own_config(folder):
    """Write a configuration that names code beyond the list."""
    folder.mkdir(exist_ok=True)
    save_config(OmegaConf.create({"objective": {"_target_": "my_objectives.Confidence"}}), folder / "config.yaml")
    return folder


def test_key_is_made_on_first_need_and_readable_by_its_user_alone(home, tmp_path):
    own_config(tmp_path / "run")
    key = home / "adamerge" / "key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.stat().st_size == 32
    before = key.read_bytes()
    assert load_config(own_config(tmp_path / "run")).objective._target_ == "my_objectives.Confidence"
    assert key.read_bytes() == before
    assert [path.name for path in key.parent.iterdir()] == ["key"]
    assert resume_command(tmp_path / "run") == f"adamerge adapt resume={tmp_path / 'run'}"


def test_configuration_edited_after_it_was_written_is_no_longer_the_users(home, tmp_path):
    path = own_config(tmp_path / "run") / "config.yaml"
    path.write_text(path.read_text().replace("Confidence", "Another"))
    with pytest.raises(InputError, match="has been edited since adamerge wrote it"):
        load_config(path.parent)


@pytest.mark.parametrize("lost", ["removed", "another", "readable", "link"])
def test_configuration_without_the_users_key_is_not_trusted_and_the_command_to_go_on_says_so(home, tmp_path, lost):
    folder, key = own_config(tmp_path / "run"), home / "adamerge" / "key"
    if lost == "removed":
        key.unlink()
    elif lost == "another":
        key.write_bytes(bytes(32))
    elif lost == "readable":
        key.chmod(0o644)
    else:
        key.rename(home / "elsewhere")
        key.symlink_to(home / "elsewhere")
    with pytest.raises(InputError, match=r"my_objectives\.Confidence is not on adamerge's list .*--trust-code"):
        load_config(folder)
    assert resume_command(folder) == f"adamerge adapt resume={folder} --trust-code"


def test_configuration_is_written_where_no_key_can_be_kept(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    folder = own_config(tmp_path / "run")
    with pytest.raises(InputError, match="it has no keyed hash"):
        load_config(folder)
    assert load_config(folder, trust_code=True).objective._target_ == "my_objectives.Confidence"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")  # which is to be left out of account
    assert trust.key_file().is_absolute()


def test_own_objective_goes_on_is_scored_and_exported_with_the_key_and_without_it_when_trusted(
    home, arguments, configs, tmp_path, monkeypatch, capsys
):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "trusted_objectives.py").write_text(OBJECTIVE)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    (configs / "objective").mkdir(exist_ok=True)
    (configs / "objective" / "trusted.yaml").write_text("_target_: trusted_objectives.Confidence\n")
    own = [*arguments, "logger=none", "references=false", "objective=trusted"]
    assert call("adapt", *own) == 0
    merged = (tmp_path / "run" / "merged.safetensors").read_bytes()
    again = (("adapt", "resume=run"), ("evaluate", "run"), ("export", "run", "--out", "again"))
    for command in (again[0], again[2]):
        assert call(*command) == 0
    assert (tmp_path / "run" / "merged.safetensors").read_bytes() == merged
    shutil.rmtree(home)
    for command in again:
        assert "there is no key of yours in" in refusal(capsys, *command)
    shutil.rmtree(tmp_path / "again")
    for command in again[1:]:
        assert call(*command, "--trust-code") == 0
    assert not home.exists()  # commands that write no configuration need no key
    assert call("adapt", "resume=run", "--trust-code") == 0
    assert (tmp_path / "again" / "merged.safetensors").read_bytes() == merged


def test_pickle_of_these_tests_does_make_the_mark(tmp_path):
    pickle.loads(pickle.dumps(Mark(tmp_path / "made")))
    assert (tmp_path / "made").is_dir()
