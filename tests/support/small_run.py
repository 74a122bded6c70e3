"""Runs of the command as processes of their own, small, and cheap to start, for tests that kill or starve them."""

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
import threading
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from adamerge import zoo
from tests.support.small_tasks import POOL, TASKS, write_images

# Each run is forked from a server that has imported everything: a real process, without the seconds of its imports.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "tests.support.small_run",
        "adamerge.commands.run.run",
        "adamerge.commands.cli",
        "open_clip",
        "torchmetrics",
        "hydra",
    ]
)

TASK = """
  {task}:
    _target_: adamerge.data.Task
    dataset: {{_target_: torchvision.datasets.ImageFolder, root: {root}}}
    classes: {classes}
    templates: ["a {{}}."]
"""


def write_configs(folder: Path, images: int = 2) -> Path:
    """Write a pool of two experts, and their tasks with ``images`` random images per class."""
    write_images(folder, images)
    data = "_target_: adamerge.data.UnlabeledTasks\nbatch_size: 2\nseed: ${seed}\ntasks:"
    for task in TASKS:
        data += TASK.format(task=task, root=folder / "images" / task, classes=list(zoo.CLASSES["mnist"]))
    for group, text in (("pool", POOL), ("data", data)):
        (folder / group).mkdir()
        (folder / group / "small.yaml").write_text(text)
    return folder


def arguments(configs: Path, folder: Path, *overrides: str) -> list[str]:
    """Arguments of a run."""
    quick = ["trainer=cpu", "references=false", "evaluate=false", "report=false"]
    return ["adapt", "--config-dir", str(configs), "pool=small", "data=small", *quick, f"run_dir={folder}", *overrides]


def start(
    *command: str,
    cwd: Path,
    kill: tuple[str, int, float] | None = None,
    by: signal.Signals = signal.SIGKILL,
    file_size: int = 0,
) -> BaseProcess:
    """Start a run in a process of its own; its output goes to ``cwd``/output.

    Args:
        command: What `adamerge` gets.
        cwd: Where it runs.
        kill: When it is killed: ("step", n, seconds after the start of its n-th step), or ("file", n, 0.0): at the
            n-th sync of a file, which is when it has been written under a temporary name; a float between 0 and 1 cuts
            it to that share before, as a kill in the middle of writing does.
        by: What it is killed by.
        file_size: Most bytes of any file it writes; 0 for no limit.
    """
    process = CONTEXT.Process(target=_run, args=(command, str(cwd), kill, by, file_size))
    process.start()
    return process


def run(*command: str, cwd: Path, **options: object) -> int:
    """Run a command to its end, and return its exit code; -9 where it was killed."""
    process = start(*command, cwd=cwd, **options)
    process.join(120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def output(cwd: Path) -> str:
    """What the latest run in a folder wrote to the terminal."""
    return (cwd / "output").read_text()


def _run(
    command: tuple[str, ...], cwd: str, kill: tuple[str, int, float] | None, by: signal.Signals, file_size: int
) -> None:
    os.chdir(cwd)
    file = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    if kill is not None:
        (_die_in_step if kill[0] == "step" else _die_in_file)(*kill[1:], by)
    if file_size:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    from adamerge.commands import cli

    try:
        cli.main(list(command))
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()


def _die_in_step(number: int, seconds: float, by: signal.Signals) -> None:
    from adamerge.methods import GradientMerging

    step, seen = GradientMerging.training_step, []

    def counted(self, *args):
        seen.append(1)
        if len(seen) == number:
            threading.Timer(seconds, os.kill, (os.getpid(), by)).start()
        return step(self, *args)

    GradientMerging.training_step = counted


def _die_in_file(number: int, share: float, by: signal.Signals) -> None:
    sync, seen = os.fsync, []

    def counted(file):
        seen.append(1)
        if len(seen) == number:
            if share:
                os.ftruncate(file, int(share * os.fstat(file).st_size))
            os.kill(os.getpid(), by)
        sync(file)

    os.fsync = counted
