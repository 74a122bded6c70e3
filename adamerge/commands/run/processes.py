"""Where the processes of a run come from: torchrun, srun, or the command line itself."""

import atexit
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import hydra
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from omegaconf import DictConfig, ListConfig
from torch import distributed

from adamerge.errors import EXIT_PREEMPTED, InputError
from adamerge.methods.sharded_strategy import ShardedStrategy
from adamerge.system import ranks

log = logging.getLogger(__name__)

_LIFELINE = "ADAMERGE_LIFELINE"  # in the environment: a pipe that ends with the process that has started this one
_PROGRAM = ("-P", "-m", "adamerge.commands.cli")  # not from the folder that a run's configuration has led to
_GRACE = 20.0  # seconds that the other processes have to end by themselves after one has failed

Environment = TorchElasticEnvironment | SLURMEnvironment


def environment() -> Environment | None:
    """Return the launcher that tells this process its place among several; None where it is alone.

    Raises:
        InputError: If srun was called with options that do not say how many processes a node has.
    """
    if TorchElasticEnvironment.detect():
        launcher: Environment = TorchElasticEnvironment()
    elif SLURMEnvironment.detect():
        try:
            launcher = SLURMEnvironment(auto_requeue=False)
        except RuntimeError as error:
            raise InputError(f"srun: {error}") from error
    else:
        return None
    return launcher if launcher.world_size() > 1 else None


def join() -> None:
    """Join the other processes of the run, if a launcher has started several."""
    _follow_parent()
    launcher = environment()
    if launcher is None or distributed.is_initialized():
        return
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = launcher.main_address, str(launcher.main_port)
    has_gpus = torch.cuda.is_available()
    if has_gpus:
        torch.cuda.set_device(launcher.local_rank() % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if has_gpus else "gloo"
    distributed.init_process_group(backend, rank=launcher.global_rank(), world_size=launcher.world_size())
    atexit.register(_leave)
    if not ranks.is_first():
        logging.getLogger().setLevel(logging.ERROR)  # the first rank talks to the user


def trainer_options() -> dict[str, Any]:
    """Return the trainer's arguments that follow from the launcher, which knows better than a configuration."""
    launcher = environment()
    options: dict[str, Any] = {}
    if "SUBMITIT_EXECUTOR" in os.environ and SLURMEnvironment.detect():
        options["plugins"] = [SLURMEnvironment(auto_requeue=False)]  # submitit does it; Lightning must not too
    if launcher is None:
        return options
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) if isinstance(launcher, TorchElasticEnvironment) else 0
    local = local or launcher.world_size() // int(os.environ.get("SLURM_NNODES", 1))
    return {**options, "devices": local, "num_nodes": max(1, launcher.world_size() // local)}


def job_id() -> str | None:
    """Return the scheduler's name for this job, the same when it is started again; None without a scheduler."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{part}_ID") for part in ("JOB", "TASK"))
    if array and task:
        return f"{array}_{task}"
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("SUBMITIT_LOCAL_JOB_ID")


def wanted(trainer: Mapping[str, Any]) -> int:
    """Return how many processes a run of these trainer options needs on this machine.

    Raises:
        InputError: If it needs several machines, where only a launcher can start processes, or SLURM.
    """
    slurm = any("SLURMEnvironment" in str(plugin) for plugin in trainer.get("plugins") or [])
    if slurm and "SLURM_JOB_ID" not in os.environ:
        raise InputError("trainer=slurm: this is no job of SLURM's. Start it with srun, or set trainer=ddp.")
    if int(trainer.get("num_nodes") or 1) > 1:
        raise InputError(
            f"trainer.num_nodes: found {trainer['num_nodes']}, but this command runs on one machine. Start it on each "
            "with torchrun or srun (docs/cluster.md), and leave trainer.num_nodes out."
        )
    devices = trainer.get("devices", 1)
    if devices in ("auto", -1, "-1"):
        return max(1, torch.cuda.device_count()) if trainer.get("accelerator") != "cpu" else 1
    return int(devices) if isinstance(devices, (int, str)) else len(devices)


def device_of(config: DictConfig) -> torch.device:
    """Return the first device of a configuration's trainer; the processor, with a warning, where it is not here."""
    trainer = config.get("trainer") or {}
    accelerator, devices = trainer.get("accelerator") or "auto", trainer.get("devices")
    kinds = {"gpu": ("cuda", "mps"), "auto": ("cuda", "mps"), "cuda": ("cuda",), "mps": ("mps",)}
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    found = next((kind for kind in kinds.get(str(accelerator), ()) if here[kind]), "cpu")
    if found == "cpu" and accelerator not in ("cpu", "auto"):
        log.warning("trainer.accelerator=%s: torch finds none here, so that the processor scores.", accelerator)
    listed = list(devices) if isinstance(devices, (Sequence, ListConfig)) and not isinstance(devices, str) else []
    return torch.device(found, int(listed[0]) if listed else 0) if found == "cuda" else torch.device(found)


def is_sharded(config: DictConfig) -> bool:
    """Whether each device of a run holds a part of the model, as the trainer's strategy says (``trainer=fsdp``)."""
    trainer = config.get("trainer")
    strategy = trainer.get("strategy") if isinstance(trainer, DictConfig) else None
    if not isinstance(strategy, DictConfig) or "_target_" not in strategy:
        return False
    kind = hydra.utils.get_object(str(strategy._target_))
    return isinstance(kind, type) and issubclass(kind, ShardedStrategy)


def start(count: int, arguments: Sequence[str]) -> int:
    """Run a command of this program as processes of one group on this machine, and return the exit code.

    Ctrl-C and SIGTERM reach all of them once. When one fails, or this process ends in whatever way, the others end too.
    """
    ending, held = os.pipe()  # nothing is written: it ends with this process
    shared = {
        **{**os.environ, _LIFELINE: str(ending)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "TORCHELASTIC_RUN_ID": "adamerge"},
        **{"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0"},
    }
    shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    command = [sys.executable, *_PROGRAM, *arguments]
    options: dict[str, Any] = {"start_new_session": True, "pass_fds": [ending]}
    processes = [
        subprocess.Popen(command, env={**shared, "RANK": str(i), "LOCAL_RANK": str(i)}, **options) for i in range(count)
    ]
    os.close(ending)
    signals: list[int] = []

    def forward(number: int, _: Any) -> None:
        signals.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _exit_code(_wait(processes), signals)
    finally:
        os.close(held)
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(processes: Sequence["subprocess.Popen[bytes]"]) -> dict[int, int]:
    """Wait for all processes, or for a while after the first failure, and return codes by rank, the first to end first.

    Those that were told to end, or still run, are left out.
    """
    ended: dict[int, int] = {}
    limit = float("inf")
    while time.monotonic() < limit and len(ended) < len(processes):
        codes = {rank: process.poll() for rank, process in enumerate(processes) if rank not in ended}
        ended |= {rank: code for rank, code in codes.items() if code is not None}
        if limit == float("inf") and any(ended.values()):
            limit = time.monotonic() + _GRACE
        time.sleep(0.05)
    return ended


def _exit_code(codes: Mapping[int, int], signals: Sequence[int]) -> int:
    """Return the exit code of a run from those of its processes, by rank; say which of them was killed.

    Args:
        codes: In the order in which the processes ended.
        signals: That they were sent on purpose.
    """
    failed = [code for code in codes.values() if code]
    if EXIT_PREEMPTED in failed and signal.SIGTERM in signals:  # whatever else those met that lost the others
        return EXIT_PREEMPTED
    for rank, code in codes.items():
        if code < 0 and -code not in signals:
            name = signal.Signals(-code).name
            cause = ": the machine may have run out of memory" if name == "SIGKILL" else ""
            log.error("error: process %d of the run was ended by %s%s. All have ended.", rank, name, cause)
            return 128 - code
    code = next(iter(failed), 0)
    return 128 - code if code < 0 else code


def _follow_parent() -> None:
    """End this process soon after the one that has started it for a run (:func:`start`), should that be killed."""
    ending = os.environ.pop(_LIFELINE, None)
    if ending is None:
        return

    def follow() -> None:
        os.read(int(ending), 1)
        os.kill(os.getpid(), signal.SIGTERM)  # to save the step
        time.sleep(_GRACE)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=follow, daemon=True).start()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()
