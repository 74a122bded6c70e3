"""Few samples are held out in parts, one after the other, and all of them adapt: from the command line."""

import json
import os
import signal
from functools import partial

import pytest
from lightning.pytorch import Callback
from safetensors.torch import load_file

from tests.support.command_line import QUIET, as_rank, call, refusal
from tests.support.processes import run_ranks

pytestmark = QUIET
STEPS = 2


class Interrupt(Callback):
    """Sends Ctrl-C to this process in the middle of the step that is the last of ``left``, counted over the fits."""

    left = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        Interrupt.left -= 1
        if Interrupt.left == 0:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def few(arguments):
    """Arguments of a run on five samples a task, that the experts judge."""
    return [
        *arguments, "objective=imitation", f"steps={STEPS}", "evaluate=false", "+data.limit=5", "+data.holdout=auto",
        "callbacks=never_worse", "+callbacks.interrupt._target_=tests.commands.run.test_folds.Interrupt",
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def _uninterrupted():
    Interrupt.left = 0


def test_folds_judge_what_all_samples_teach(few, tmp_path):
    assert call("adapt", *few, "optimizer.lr=0.01") == 0
    recipe = json.loads((tmp_path / "run" / "merge.json").read_text())
    evidence, folds = recipe["evidence"], json.loads((tmp_path / "run" / "folds.json").read_text())["folds"]
    assert (len(folds), evidence["folds"]) == (4, 4)
    assert [fold["result"]["rows"] for fold in folds] == [4, 2, 2, 2]  # two tasks of five samples
    for kind in ("start", "result"):
        for number in ("agreement", "kl"):
            mean = sum(fold[kind][number] * fold[kind]["rows"] for fold in folds) / 10
            assert evidence[kind][number] == pytest.approx(mean)
        assert evidence[kind]["rows"] == 10
    assert evidence["exported"] == "result"
    assert not (tmp_path / "run" / "folds").exists()
    plain = [word for word in few if "never_worse" not in word and "holdout" not in word]
    assert call("adapt", *plain, "optimizer.lr=0.01", "run_dir=plain") == 0
    merged, same = (load_file(tmp_path / run / "merged.safetensors") for run in ("run", "plain"))
    assert all(merged[name].equal(same[name]) for name in same)
    assert call("adapt", *few, "optimizer.lr=100", "run_dir=bad") == 0
    recipe = json.loads((tmp_path / "bad" / "merge.json").read_text())
    assert recipe["evidence"]["exported"] == "start"
    assert recipe["evidence"]["start"] == evidence["start"]


@pytest.mark.slow
@pytest.mark.parametrize("left", [2, STEPS + 2, 4 * STEPS + 2])  # in the first fold, the second, and the run itself
def test_a_run_that_is_interrupted_in_a_fold_goes_on_there(few, left, tmp_path, capsys):
    assert call("adapt", *few, "run_dir=whole") == 0
    Interrupt.left = left
    assert call("adapt", *few, "run_dir=cut") == 130
    told = capsys.readouterr().err
    assert f"Go on with: adamerge adapt resume={tmp_path}/cut" in told
    assert ("adamerge export" in told) is (left > 4 * STEPS)
    assert call("adapt", "resume=cut") == 0
    assert Interrupt.left == left - 5 * STEPS  # the interrupted step was saved: none is taken twice
    for name in ("merged.safetensors", "coefficients.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert evidence(tmp_path / "cut") == evidence(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_folds_in_two_processes_judge_as_in_one(few, trainer, tmp_path):
    few = [word for word in few if not word.startswith(("trainer=", "run_dir="))]
    assert call("adapt", *few, "trainer=cpu", "data.batch_size=4", "run_dir=one") == 0
    parts = [*few, f"trainer={trainer}", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=2"]
    codes = [code for code, _, _ in run_ranks(partial(as_rank, "adapt", *parts, "run_dir=two"), 2, timeout=180)]
    assert codes == [0, 0]
    one, two = (evidence(tmp_path / name) for name in ("one", "two"))
    assert (one["folds"], one["exported"]) == (two["folds"], two["exported"])
    for kind in ("start", "result"):
        assert two[kind] == pytest.approx(one[kind], rel=1e-3)


def evidence(folder):
    return json.loads((folder / "merge.json").read_text())["evidence"]


def test_bad_input_of_folds_is_refused(few, tmp_path, capsys):
    Interrupt.left = STEPS + 2
    assert call("adapt", *few) == 130
    (tmp_path / "run" / "folds.json").write_text('{"folds": [{"start": null}]}')
    assert "folds.json: not what folds have measured" in refusal(capsys, "adapt", "resume=run")
    keep = [word for word in few if not word.startswith("callbacks=")]
    text = refusal(capsys, "check", *keep, "callbacks=keep_best", "run_dir=other")
    assert "found none, as data.holdout=auto divides so few into folds" in text
    text = refusal(capsys, "check", *few, "first_stage={steps: 2}", "run_dir=other")
    assert "data.holdout: auto divides so few samples into folds" in text
