"""Few samples are held out in parts, one after the other, and all of them adapt: from the command line."""

import json
from dataclasses import asdict
from functools import partial

import pytest
from safetensors.torch import load_file

from adamerge.callbacks.checkpoint_io import AtomicCheckpointIO
from adamerge.results.agreement import Comparison
from tests.support.command_line import QUIET, as_rank, call, refusal
from tests.support.interrupts import INTERRUPT, Interrupt
from tests.support.processes import run_ranks

pytestmark = [*QUIET, pytest.mark.usefixtures("uninterrupted")]
STEPS = 2
RATES = "+callbacks.rates._target_=lightning.pytorch.callbacks.LearningRateMonitor"  # of a logger, which folds lack


@pytest.fixture
def few(arguments):
    """Arguments of a run on five samples a task, that the experts judge."""
    return [
        *arguments, "objective=imitation", f"steps={STEPS}", "evaluate=false", "+data.limit=5", "+data.holdout=auto",
        "callbacks=never_worse", INTERRUPT,
    ]  # fmt: skip


def test_folds_judge_what_all_samples_teach(few, tmp_path, capsys):
    assert call("adapt", *few, "optimizer.lr=0.01", RATES) == 0
    proved = evidence(tmp_path / "run")
    comparisons = [folds_comparison(tmp_path / "run", number) for number in (1, 2, 3, 4)]
    assert [comparison.rows for comparison in comparisons] == [4, 2, 2, 2]  # two tasks of five samples
    whole = sum(comparisons[1:], comparisons[0])
    assert proved == {
        "exported": "result", "start": asdict(whole.start), "result": asdict(whole.result), "folds": 4,
        "kl_error": whole.kl_error,
    }  # fmt: skip
    plain = [word for word in few if "never_worse" not in word and "holdout" not in word]
    assert call("adapt", *plain, "optimizer.lr=0.01", "run_dir=plain") == 0
    merged, same = (load_file(tmp_path / run / "merged.safetensors") for run in ("run", "plain"))
    assert all(merged[name].equal(same[name]) for name in same)
    assert call("adapt", *few, "optimizer.lr=1000", "run_dir=bad") == 0
    assert evidence(tmp_path / "bad")["exported"] == "start"
    assert evidence(tmp_path / "bad")["start"] == proved["start"]


def folds_comparison(folder, number):
    """What a fold has measured, as its checkpoint says."""
    path = folder / "checkpoints" / f"fold_{number}" / "checkpoints" / "last.ckpt"
    states = AtomicCheckpointIO().load_checkpoint(path)["callbacks"]
    return Comparison(next(state["sums"] for name, state in states.items() if "NeverWorse" in name))


@pytest.mark.slow
@pytest.mark.parametrize("left", [1, STEPS + 2, 4 * STEPS + 1])  # in the first fold, the second, and the run itself
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
@pytest.mark.parametrize(("trainer", "objective"), [("ddp", "imitation"), ("fsdp", "imitation"), ("fsdp", "entropy")])
def test_folds_in_two_processes_judge_as_in_one(few, trainer, objective, tmp_path):
    few = [word for word in few if not word.startswith(("trainer=", "run_dir=", "objective="))]
    few.append(f"objective={objective}")
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
    Interrupt.left = STEPS + 1
    assert call("adapt", *few) == 130
    config = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(config.replace("\nsteps: 2\n", "\nsteps: 3\n"))
    assert "steps has changed since the run was begun" in refusal(capsys, "adapt", "resume=run", "--trust-code")
    keep = [word for word in few if not word.startswith("callbacks=")]
    text = refusal(capsys, "check", *keep, "callbacks=keep_best", "run_dir=other")
    assert "found none, as data.holdout=auto divides so few into folds" in text
    text = refusal(capsys, "check", *few, "first_stage={steps: 2}", "run_dir=other")
    assert "data.holdout: auto learns on parts of so few samples" in text
