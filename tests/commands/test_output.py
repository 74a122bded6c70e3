"""What commands print: results on standard output, all else on standard error and in the run's log."""

import json
import logging
import subprocess
import sys

import pytest

from adamerge import zoo
from adamerge.commands import cli
from adamerge.commands.terminal import list_files, print_files
from adamerge.system import progress
from tests.support.small_run import arguments, write_configs

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*log_dir.*"),
]


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    return write_configs(tmp_path_factory.mktemp("configs"))


@pytest.fixture(autouse=True)
def _as_before():
    """Leave the process as it was: the command sets up logging."""
    yield
    logging.captureWarnings(False)
    progress.set_quiet(False)


def call(capsys, *command):
    """Run a command in this process; return exit code, standard output and standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main([str(word) for word in command])
    return caught.value.code or 0, *capsys.readouterr()


def test_adapt_json_prints_one_document_and_logs_everything(configs, tmp_path, capsys):
    folder = tmp_path / "run"
    command = arguments(configs, folder, "steps=2", "references=true", "evaluate=true")
    code, printed, errors = call(capsys, *command, "--json")
    assert code == 0
    content = json.loads(printed)
    assert content["run_dir"] == str(folder)
    assert {"merged.safetensors", "summary.json", "adapt.log"} <= set(content["files"])
    assert content["summary"] == json.loads((folder / "summary.json").read_text())
    text = (folder / "adapt.log").read_text()
    for words in (
        "adamerge adapt", "Reading the pool", "Asking the experts: 2 tasks", "Adapting: 2/2 steps", "loss", "steps/s",
        "mean coefficient", "Scoring the merged checkpoint: 20 inputs", "accuracy, %", "Done.",
    ):  # fmt: skip
        assert words in text
    assert "\x1b" not in text + errors
    assert "Adapting: 2/2 steps" in errors  # there is no terminal to draw a bar on
    assert "accuracy, %" not in printed + errors


@pytest.mark.slow
def test_lightning_stays_silent_where_it_is_imported_afterwards():
    code = (
        "from adamerge.commands.terminal import configure_logging\nconfigure_logging(debug=False)\n"
        "from lightning.pytorch import Trainer\nTrainer(accelerator='cpu', logger=False)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout + result.stderr == ""


def test_adapt_quiet_prints_the_folder_only(configs, tmp_path, capsys):
    code, printed, errors = call(capsys, *arguments(configs, tmp_path / "run", "steps=2"), "--quiet")
    assert (code, printed, errors) == (0, f"{tmp_path / 'run'}\n", "")
    assert "Adapting: 2/2 steps" in (tmp_path / "run" / "adapt.log").read_text()


def test_adapt_that_is_stopped_says_so_in_its_log(configs, tmp_path, capsys):
    options = ("steps=1", "constraint=none", "optimizer.lr=1e30")
    code, printed, errors = call(capsys, *arguments(configs, tmp_path / "run", *options), "--quiet")
    assert (code, printed) == (3, "")
    assert errors.startswith("error: ")
    assert "GuardError" in (tmp_path / "run" / "adapt.log").read_text().splitlines()[-1]


def test_adapt_json_of_a_sweep_is_refused(configs, tmp_path, capsys):
    code, printed, errors = call(capsys, *arguments(configs, tmp_path, "-m", "seed=0,1"), "--json")
    assert (code, printed) == (2, "")
    assert "summary.json" in errors


def test_check_json_lists_problems(configs, tmp_path, capsys):
    command = ("check", *arguments(configs, tmp_path / "run")[1:], "--json")
    assert call(capsys, *command)[:2] == (0, '{\n  "problems": [],\n  "imports": []\n}\n')
    code, printed, _ = call(capsys, *command, "pool.base=gone.safetensors")
    assert code == 2
    assert "gone.safetensors" in json.loads(printed)["problems"][0]


def test_merge_json_names_the_files(tmp_path, capsys):
    command = ("merge", "--rule", "weight_average", "--pool", "zoo", "--out", tmp_path / "merged", "--json")
    code, printed, errors = call(capsys, *command)
    assert code == 0
    assert json.loads(printed)["files"]["merged"] == str(tmp_path / "merged" / "merged.safetensors")
    assert "Merging: " in errors
    assert call(capsys, *command[:-1], "--quiet")[2] == ""


def test_export_and_evaluate_json(configs, tmp_path, capsys):
    call(capsys, *arguments(configs, tmp_path / "run", "steps=1"))
    again = ("export", tmp_path / "run", "--coefficients", tmp_path / "run" / "coefficients.json")
    code, printed, _ = call(capsys, *again, "--output", tmp_path / "again", "--json")
    assert code == 0
    assert json.loads(printed)["files"]["merged"] == str(tmp_path / "again" / "merged.safetensors")
    code, printed, _ = call(capsys, "evaluate", tmp_path / "run", "--json")
    assert code == 0
    assert json.loads(printed)["tasks"] == ["mnist", "digits"]


def test_convert_json_names_what_was_found(tmp_path, capsys):
    source = zoo.files() / "base.safetensors"
    code, printed, errors = call(capsys, "convert", source, "--out", tmp_path / "a.safetensors", "--json")
    assert (code, printed) == (2, "")  # refused, as it is no pickle
    assert errors.startswith("error: ")


def test_folders_that_look_like_markup_are_listed_as_they_are(tmp_path, capfd):
    for name in ("[bold]", ":cat:"):
        (tmp_path / "[/x]" / name).mkdir(parents=True)
        (tmp_path / "[/x]" / name / "[red]a").touch()
    list_files(tmp_path / "[/x]")
    print_files({"a": tmp_path / "[/x]" / "[red]a"}, as_json=False)
    printed = capfd.readouterr().out
    assert {"[bold]/[red]a", ":cat:/[red]a", str(tmp_path / "[/x]"), str(tmp_path / "[/x]" / "[red]a")} <= {
        line.split("  0")[0].strip() for line in printed.splitlines()
    }
