"""Processes of a run: torchrun's, SLURM's, submitit's and the command's own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adamerge.commands.run import folder as run_folder
from adamerge.commands.run import processes
from adamerge.commands.run.compose import hand_over, read_line
from adamerge.commands.run.start import sweep_job
from adamerge.commands.terminal import interruptible
from adamerge.errors import InputError, Interrupted
from adamerge.system import ranks
from tests.support.command_line import as_rank, call, command, environment, refusal
from tests.support.processes import run_ranks

pytestmark = [pytest.mark.filterwarnings("ignore:.*LeafSpec.*"), pytest.mark.filterwarnings("ignore:.*workers.*")]


@pytest.mark.parametrize(
    ("trainer", "count"),
    [
        ({}, 1),
        ({"devices": 3}, 3),
        ({"devices": "2"}, 2),
        ({"devices": [0, 2]}, 2),
        ({"devices": "auto", "accelerator": "cpu"}, 1),
    ],
)
def test_wanted_processes_follow_from_the_devices(trainer, count):
    assert processes.wanted(trainer) == count


def test_several_nodes_need_a_launcher():
    with pytest.raises(InputError, match=r"trainer\.num_nodes.*torchrun or srun"):
        processes.wanted({"num_nodes": 2})


def test_slurm_trainer_needs_slurm(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(InputError, match="no job of SLURM's"):
        processes.wanted({"plugins": [{"_target_": "lightning.pytorch.plugins.environments.SLURMEnvironment"}]})


def slurm(monkeypatch, **variables):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SUBMITIT_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    for name, value in {"JOB_ID": "77", "JOB_NAME": "merge", "PROCID": "3", "LOCALID": "1", **variables}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


def test_slurm_says_how_many_devices_and_nodes_there_are(monkeypatch):
    slurm(monkeypatch, NTASKS="4", NTASKS_PER_NODE="2", NNODES="2")
    found = processes.environment()
    assert (found.world_size(), found.global_rank(), found.local_rank()) == (4, 3, 1)
    assert processes.trainer_options() == {"devices": 2, "num_nodes": 2}
    assert processes.job_id() == "77"


@pytest.mark.parametrize("tasks", ["1", "4"])
def test_under_submitit_lightning_does_not_requeue(monkeypatch, tasks):
    slurm(monkeypatch, NTASKS=tasks, NTASKS_PER_NODE=tasks, NNODES="1", ARRAY_JOB_ID="70", ARRAY_TASK_ID="2")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    (plugin,) = processes.trainer_options()["plugins"]
    assert plugin.auto_requeue is False
    assert processes.job_id() == "70_2"


def test_srun_without_processes_per_node_is_refused(monkeypatch):
    slurm(monkeypatch, NTASKS="4")
    with pytest.raises(InputError, match="--ntasks-per-node=4"):
        processes.environment()


def test_folder_belongs_to_the_job_that_made_it(tmp_path):
    assert not run_folder.is_of_job(tmp_path, "77")
    (tmp_path / "config.yaml").write_text("job: '77'\n")
    assert run_folder.is_of_job(tmp_path, "77")
    assert not run_folder.is_of_job(tmp_path, "78")
    assert not run_folder.is_of_job(tmp_path, None)


def test_lightnings_checkpoint_before_a_requeue_is_gone_on_from(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    own, of_requeue = tmp_path / run_folder.LAST, tmp_path / "hpc_ckpt_1.ckpt"
    assert run_folder.last_checkpoint(tmp_path) is None
    for number, path in enumerate((own, of_requeue, own)):
        path.write_text("")
        os.utime(path, (number, number))
        assert run_folder.last_checkpoint(tmp_path) == path
        assert run_folder.is_started(tmp_path)


# The command's own processes

SCRIPT = """
import os, signal, sys, time
sys.stdout.write(f"{os.environ['RANK']} of {os.environ['WORLD_SIZE']} {sys.argv[1]}\\n")
sys.stdout.flush()
%s
"""


def start(monkeypatch, body, count=2):
    monkeypatch.setattr(processes, "_PROGRAM", ("-c", SCRIPT % body))
    monkeypatch.setattr(processes, "_GRACE", 0.3)
    return processes.start(count, ["word"])


def test_start_runs_every_rank(monkeypatch, capfd):
    assert start(monkeypatch, "") == 0
    assert sorted(capfd.readouterr().out.splitlines()) == ["0 of 2 word", "1 of 2 word"]


def test_start_ends_all_when_one_fails(monkeypatch):
    before = time.monotonic()
    assert start(monkeypatch, "sys.exit(7) if os.environ['RANK'] == '1' else time.sleep(60)") == 7
    assert time.monotonic() - before < 30


def test_start_names_the_rank_that_was_killed(monkeypatch, caplog):
    assert start(monkeypatch, "os.kill(os.getpid(), 9) if os.environ['RANK'] == '1' else time.sleep(60)") == 137
    assert [record.getMessage().split(":")[1] for record in caplog.records] == [
        " process 1 of the run was ended by SIGKILL"
    ]


def test_ranks_end_with_the_process_that_started_them(monkeypatch):
    ending, held = os.pipe()
    monkeypatch.setenv("ADAMERGE_LIFELINE", str(ending))
    rank = os.fork()
    if rank == 0:
        os.close(held)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        processes._follow_parent()
        time.sleep(60)
        os._exit(0)
    os.close(held)
    assert os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) == -signal.SIGTERM
    os.close(ending)


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGTERM, 75, "Stopped by SIGTERM.\n"), (signal.SIGINT, 130, "Interrupted.\n")],
)
def test_signals_outside_of_steps_have_exit_codes_of_their_own(capfd, number, code, said):
    handler = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught, interruptible():
        signal.raise_signal(number)
    assert (caught.value.code, capfd.readouterr().err) == (code, said)
    assert signal.getsignal(number) is handler


def test_start_hands_signals_on(monkeypatch):
    body = (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\nopen(f'{os.getcwd()}/up' + os.environ['RANK'], 'w')\n"
    )
    body += "time.sleep(60)"
    monkeypatch.setattr(processes.signal, "signal", record := partial(_recording, {}, signal.signal))
    handlers = record.args[0]

    def send():
        while not all(os.path.exists(f"up{rank}") for rank in range(2)):
            time.sleep(0.02)
        handlers[signal.SIGTERM](signal.SIGTERM, None)

    thread = threading.Thread(target=send)
    thread.start()
    assert start(monkeypatch, body) == 75
    thread.join()


def _recording(handlers, original, number, handler):
    handlers.setdefault(number, handler)
    return original(number, handler)


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# The command line


@pytest.mark.slow
def test_adapt_on_two_processes_writes_what_one_does(arguments, tmp_path, capsys):
    small = [*arguments, "trainer=ddp", "trainer.accelerator=cpu", "references=false", "optimizer.lr=0.01"]
    assert call("adapt", *small, "data.batch_size=4", "run_dir=one", "evaluate=false") == 0
    named = [word for word in small if not word.startswith("run_dir")]
    (first, printed, _), (second, silent, said) = run_ranks(partial(as_rank, "adapt", *named, "data.batch_size=2"), 2)
    assert (first, second) == (0, 0)
    assert "accuracy" in printed
    assert (silent, said) == ("", "")
    (folder,) = (tmp_path / "runs" / "adapt").iterdir()  # named by the clock, and one for both
    whole, parts = (load_file(path / "merged.safetensors") for path in (tmp_path / "one", folder))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=2e-3, atol=2e-5, msg=name)  # rounded to half precision
    assert json.loads((folder / "summary.json").read_text())["rows"].keys() == {"adapt"}
    again = run_ranks(partial(as_rank, "adapt", f"resume={folder}"), 2)
    assert [code for code, _, _ in again] == [0, 0]


@pytest.mark.slow
def test_adapt_on_two_processes_refuses_in_one_line(arguments):
    (first, _, said), (second, _, silent) = run_ranks(partial(as_rank, "adapt", *arguments, "steps=none"), 2)
    assert (first, second) == (2, 2)
    assert said.count("error:") == 1
    assert "steps: expected a whole number" in said
    assert silent == ""


def test_sweep_of_several_processes_is_refused_with_the_remedy(arguments, capsys):
    named = [word for word in arguments if not word.startswith("run_dir")]
    text = refusal(capsys, "adapt", *named, "-m", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    assert "trainer.devices" in text
    assert "hydra/launcher=slurm" in text
    (code, _, said), _ = run_ranks(partial(as_rank, "adapt", *named, "-m", "seed=0,1"), 2)
    assert code == 2
    assert "every process would run the whole sweep" in said


# submitit


class _Captured(BaseException):
    pass


def test_sweep_on_slurm_asks_for_what_the_configuration_says(arguments, tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher.submitit_launcher")
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text("#!/bin/sh\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", str(srun.parent), prepend=os.pathsep)

    def capture(executor, function, *jobs):
        executor._executor.parameters["map_count"] = len(jobs[0])
        raise _Captured(executor._executor._make_submission_file_text("COMMAND", "id"), jobs[0])

    monkeypatch.setattr(submitit.AutoExecutor, "map_array", capture)
    named = [word for word in arguments if not word.startswith("run_dir")]
    options = ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=2"]
    options += ["hydra.launcher.tasks_per_node=2", "trainer=ddp", "hydra.sweep.dir=sweep"]
    with pytest.raises(_Captured) as caught:
        hand_over(read_line([*named, "-m", "seed=0,1", *options]), sweep_job)
    text, jobs = caught.value.args
    lines = text.splitlines()
    for line in (
        "#SBATCH --array=0-1%2",
        "#SBATCH --partition=gpu",
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --cpus-per-task=4",
        "#SBATCH --mem=32GB",
        "#SBATCH --time=240",
        "#SBATCH --signal=USR2@120",
        "#SBATCH --job-name=adapt",
        "#SBATCH --open-mode=append",
    ):
        assert line in lines, text
    assert [job[-1] for job in jobs] == ["seed=0", "seed=1"] or all("seed=" in " ".join(job) for job in jobs)
    assert ranks.count() == 1
    assert sys.argv[0] == "adamerge adapt"


def children(parent):
    """The processes that a process has started."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if path.read_text().rpartition(")")[2].split()[1] == str(parent):
                yield int(path.parent.name)


def preempt(sweep, process):
    """Send the signal of a job whose time runs out to the first job of a sweep, once that has saved something."""
    for _ in range(30_000):
        (controller, *_) = [*sorted(path.name for path in (sweep / ".submitit").glob("[0-9]*")), None]
        if controller and (sweep / "0" / run_folder.LAST).is_file():
            for job in children(controller):
                os.kill(job, signal.SIGUSR2)
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    raise AssertionError("the job has saved nothing")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the job's process in /proc")
def test_job_of_a_sweep_that_submitit_starts_again_ends_with_the_same_bytes(arguments, tmp_path, capsys):
    pytest.importorskip("submitit")
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher.submitit_launcher")
    named = [word for word in arguments if not word.startswith(("run_dir", "steps"))]
    small = [*named, "steps=300", "checkpoint_every=5", "evaluate=false", "logger=none"]
    sweep = tmp_path / "sweep"
    overrides = ["-m", "hydra/launcher=local", f"hydra.sweep.dir={sweep}", "objective=entropy,imitation"]
    process = subprocess.Popen(
        command("adapt", *small, *overrides), text=True, env=environment() | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        preempt(sweep, process)
        said, _ = process.communicate(timeout=900)
    finally:
        process.kill()
    assert process.returncode == 0, said
    logs = "".join(path.read_text() for path in (sweep / ".submitit").glob("*/*_log.err"))
    assert "SIGUSR2" in logs
    assert "this job is preempted" in logs
    assert call("adapt", *small, "objective=entropy", "run_dir=whole") == 0
    merged = [(path / "merged.safetensors").read_bytes() for path in (tmp_path / "whole", sweep / "0", sweep / "1")]
    assert merged[0] == merged[1]
    assert merged[1] != merged[2]
