"""Runs of two stages, from the command line: interruption in either, what is kept, what is refused."""

import json

import pytest
from lightning.pytorch import Callback
from omegaconf import OmegaConf
from safetensors.torch import load_file

from adamerge.commands.run.compose import compose
from adamerge.commands.run.stages import first_stage, running_stage
from adamerge.errors import InputError
from tests.support.command_line import QUIET, call, refusal
from tests.support.interrupts import INTERRUPT, Interrupt

pytestmark = [*QUIET, pytest.mark.usefixtures("uninterrupted")]


class Ends(Callback):
    """A callback of a user's own that ends the run, and says why."""

    reason = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.reason, trainer.should_stop = "Enough, said a callback.", True


@pytest.fixture
def two(arguments):
    """Arguments of a small run of two stages with four steps each."""
    return [
        *arguments, "granularity=importance", "steps=4", "evaluate=false", "checkpoint_every=3",
        "first_stage={steps: 4, granularity: {_target_: adamerge.model.granularity.Layer}}",
        INTERRUPT, "optimizer.lr=0.05",
    ]  # fmt: skip


RESULTS = ("merged.safetensors", "coefficients.json", "start.json", "stage_1/coefficients.json")


@pytest.mark.slow
def test_two_stages_interrupted_in_either_equal_an_uninterrupted_run(two, tmp_path, capsys):
    assert call("adapt", *two, "run_dir=whole") == 0
    whole = {name: (tmp_path / "whole" / name).read_bytes() for name in RESULTS}
    Interrupt.left = 2
    assert call("adapt", *two, "run_dir=first") == 130
    assert f"adamerge export {tmp_path}/first/stage_1" in capsys.readouterr().err
    assert not (tmp_path / "first" / "start.json").exists()
    assert call("export", "first/stage_1") == 0  # it is a run's folder too
    assert (tmp_path / "first" / "stage_1" / "merged.safetensors").is_file()
    text = refusal(capsys, "export", "first")
    assert "first stage has not ended" in text
    assert call("adapt", "resume=first") == 0
    Interrupt.left = 6
    assert call("adapt", *two, "run_dir=second", "resume=auto") == 130
    first = (tmp_path / "second" / "stage_1" / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    assert call("adapt", *two, "run_dir=second", "resume=auto") == 0
    assert (tmp_path / "second" / "stage_1" / "checkpoints" / "last.ckpt").stat().st_mtime_ns == first
    for folder in ("first", "second"):
        for name, content in whole.items():
            assert (tmp_path / folder / name).read_bytes() == content, f"{folder}/{name}"
    text = refusal(capsys, "adapt", *two, "run_dir=second", "resume=auto", "first_stage.steps=3")
    assert "other options: first_stage.steps" in text


@pytest.mark.slow
def test_two_stages_interrupted_between_them_and_at_the_last_step(two, tmp_path):
    assert call("adapt", *two, "run_dir=whole") == 0
    Interrupt.left = 4
    assert call("adapt", *two, "run_dir=cut") == 130
    Interrupt.left = 4
    assert call("adapt", "resume=cut") == 130  # again, in the last step of all
    assert call("adapt", "resume=cut") == 0
    for name in RESULTS:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_two_stages_record_the_chunks_and_their_result_is_replayed(two, tmp_path, capsys):
    two = [argument for argument in two if argument != "evaluate=false"]
    assert call("adapt", *two, "granularity.budget=1.5") == 0
    log = (tmp_path / "run" / "adapt.log").read_text()
    recipe = json.loads((tmp_path / "run" / "merge.json").read_text())
    pieces = recipe["start"]["granularity"]["pieces"]
    assert recipe["start"]["file"] == "start.json"
    assert len(pieces) == 56
    chunks, frozen = sum(pieces.values()), sum(number == 0 for number in pieces.values())
    assert 0 < chunks <= 1.5 * 56
    assert f"Chunks by importance: {chunks} in {56 - frozen} tensors, {frozen} tensors frozen" in log
    for stage in (1, 2):
        assert f"Stage {stage} of 2: 4/4 steps" in log
    one, two_ = (
        json.loads((tmp_path / "run" / folder / "coefficients.json").read_text())["coefficients"]["mnist"]
        for folder in ("stage_1", "")
    )
    for name, number in pieces.items():
        if number == 0:
            assert two_[name] == one[name], f"{name} is frozen at its value of stage 1"
    assert any(number > 1 and len(set(two_[name])) > 1 for name, number in pieces.items() if number > 1)
    merged = (tmp_path / "run" / "merged.safetensors").read_bytes()
    assert call("export", "run", "--coefficients", "run/coefficients.json", "--output", "again") == 0
    assert (tmp_path / "again" / "merged.safetensors").read_bytes() == merged
    assert call("export", "run", "--output", "checkpoint") == 0
    assert (tmp_path / "checkpoint" / "merged.safetensors").read_bytes() == merged
    before = json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]["adapt"]["per_task"]
    capsys.readouterr()
    assert call("evaluate", "run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"]["adapt"]["per_task"] == before
    assert call("export", "run/stage_1") == 0
    capsys.readouterr()
    assert call("evaluate", "run/stage_1", "--json") == 0
    assert "adapt_stage_1" in json.loads(capsys.readouterr().out)["rows"]


def test_init_from_a_file_starts_where_the_other_run_ended(two, tmp_path):
    plain = [a for a in two if not a.startswith("first_stage") and a != "granularity=importance"]
    assert call("adapt", *plain, "run_dir=layer") == 0
    options = ["run_dir=row", "granularity=row", "init=layer/coefficients.json", "optimizer.lr=0"]
    assert call("adapt", *plain, *options) == 0
    layer, row = (load_file(tmp_path / run / "merged.safetensors") for run in ("layer", "row"))
    assert all(abs(row[name].float() - layer[name].float()).max() < 1e-3 for name in layer)
    options = ["run_dir=chunk", "granularity=importance", "init=layer/coefficients.json"]
    assert call("adapt", *plain, *options) == 0
    recipe = json.loads((tmp_path / "chunk" / "merge.json").read_text())
    assert recipe["start"]["file"] == "layer/coefficients.json"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("first_stage=null", ["ImportanceChunks needs coefficients learned before", "first_stage", "init="]),
        ("first_stage.steps=0", ["first_stage: steps", ">= 1", "0"]),
        ("+first_stage.stps=3", ["first_stage.stps", "Did you mean 'steps'?"]),
        ("+first_stage.data=3", ["first_stage.data", "no part of a stage"]),
        ("first_stage=4", ["first_stage: expected a mapping", "4"]),
        ("+first_stage.objective.temperature=-1", ["first_stage: objective.temperature", "-1"]),
        (
            "first_stage.granularity._target_=adamerge.model.granularity.Lair",
            ["first_stage: granularity._target_", "Lair"],
        ),
        ("granularity.budget=-1", ["granularity.budget", "-1"]),
        ("init=gone.json", ["init", "gone.json", "no such file"]),
        ("teacher_cache=[1]", ["teacher_cache: expected a folder"]),
    ],
)
def test_wrong_stages_are_one_line_and_leave_nothing(two, capsys, tmp_path, override, words):
    text = refusal(capsys, "adapt", *two, override)
    for word in words:
        assert word in text
    assert list(tmp_path.iterdir()) == []


def test_budget_that_buys_nothing_is_said_and_the_first_stage_is_kept(two, capsys, tmp_path):
    assert call("adapt", *two, "granularity.budget=0.001") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: granularity.budget: 0.001 leaves all 56 tensors without a chunk")
    assert (tmp_path / "run" / "start.json").is_file()


def test_reason_of_a_callback_ends_the_run_in_its_first_stage(two, capsys, tmp_path):
    assert call("adapt", *two, "+callbacks.ends._target_=tests.commands.run.test_stages.Ends") == 3
    assert capsys.readouterr().err.splitlines()[-1] == "error: Enough, said a callback."
    assert (tmp_path / "run" / "stage_1" / "coefficients.json").is_file()
    assert not (tmp_path / "run" / "merged.safetensors").exists()


def test_first_stage_takes_over_and_changes_parts_of_the_run():
    config = compose([
        "granularity=row", "optimizer.lr=0.5", "run_dir=run", "name=mine", "steps=9",
        "first_stage={steps: 3, optimizer: {lr: 0.1}, granularity: {_target_: adamerge.model.granularity.TaskWise}}",
    ])  # fmt: skip
    stage = OmegaConf.to_container(first_stage(config), resolve=True)
    assert stage["granularity"] == {"_target_": "adamerge.model.granularity.TaskWise"}
    assert stage["optimizer"] == {"_target_": "torch.optim.Adam", "_partial_": True, "lr": 0.1}
    assert stage["method"]["optimizer"]["lr"] == 0.1
    assert stage["trainer"]["max_steps"] == 3
    assert stage["logger"]["csv"]["save_dir"] == "run/stage_1"
    assert (stage["run_dir"], stage["name"], stage["first_stage"]) == ("run/stage_1", "mine_stage_1", None)
    assert OmegaConf.to_container(config, resolve=True)["trainer"]["max_steps"] == 9
    assert first_stage(compose([])) is None
    with pytest.raises(InputError, match="first_stage: expected a mapping"):
        first_stage(compose(["first_stage=[1]"]))


def test_running_stage_is_the_first_until_the_start_of_the_second_is_there(tmp_path):
    assert running_stage(tmp_path) == tmp_path
    (tmp_path / "stage_1").mkdir()
    assert running_stage(tmp_path) == tmp_path / "stage_1"
    (tmp_path / "start.json").write_text("{}")
    assert running_stage(tmp_path) == tmp_path


def test_expert_merging_pp_takes_another_objective():
    for objective in ("imitation", "entropy", "alignment", "expert_merging"):
        config = compose(["experiment=expert_merging_pp", f"objective={objective}"])
        stage = first_stage(config)
        assert stage.objective == config.objective
        assert stage.granularity._target_.endswith("Layer")
        assert config.granularity._target_.endswith("ImportanceChunks")
    assert compose(["experiment=expert_merging_pp"]).objective.anchor == 0.8


def test_teacher_cache_from_the_command_line(arguments, tmp_path, capsys):
    options = [*arguments, "evaluate=false", "teacher_cache=teachers"]
    assert call("check", *options) == 0
    assert not (tmp_path / "teachers").exists()
    assert call("adapt", *options) == 0
    assert "Teachers: 0 batches read from teachers, 2 computed and added" in capsys.readouterr().err
    assert call("adapt", *options, "run_dir=other", "granularity=row") == 0
    assert "Teachers: 2 batches read from teachers, 0 computed and added" in capsys.readouterr().err
    (tmp_path / "file").write_text("in the way")
    text = refusal(capsys, "adapt", *options, "run_dir=no", "teacher_cache=file")
    assert "teacher_cache: expected a folder, found file: a file" in text
