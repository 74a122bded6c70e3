"""Processes that make rows: one for all that do not adapt, and what happens when one is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from adamerge.commands.compare import row as compare_row
from adamerge.commands.compare import row_processes
from adamerge.commands.compare.row import Spec, read_row
from adamerge.commands.compare.row_processes import RowProcesses


def row(spec: Spec, common, seed: int, folder: Path):
    """Stand in for a row: kills its process, takes long, or says which it is."""
    if seed > 100:
        time.sleep(seed)
    if seed < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"process": os.getpid(), "threads": torch.get_num_threads()}


@pytest.fixture(scope="module")
def submitted():
    """What a few rows say of their processes; one of them is killed."""
    patch = pytest.MonkeyPatch()
    patch.setattr(compare_row, "make_row", row)
    patch.delenv("OMP_NUM_THREADS", raising=False)
    patch.setattr(torch, "get_num_threads", lambda: 6)
    found = []
    with RowProcesses(2) as processes:
        for text, seed in (("tsvm", 0), ("ties", 1), ("steps=1", 0), ("wudi", -1), ("tsvm", 0)):
            future = processes.submit(read_row(text), [], seed, Path())
            try:
                found.append(processes.result(future))
            except RuntimeError as error:
                found.append(str(error))
    patch.undo()
    return found


def test_rows_that_do_not_adapt_share_a_process(submitted):
    tsvm, ties, adapted, *_ = submitted
    assert tsvm["process"] == ties["process"]
    assert adapted["process"] not in (tsvm["process"], os.getpid())


def test_idle_process_ends_before_a_row_adapts(monkeypatch):
    monkeypatch.setattr(compare_row, "make_row", row)
    with RowProcesses() as processes:
        first = processes.result(processes.submit(read_row("tsvm"), [], 0, Path()))
        adapts = processes.submit(read_row("steps=1"), [], 0, Path())
        assert processes._idle == []
        with pytest.raises(ProcessLookupError):
            os.kill(first["process"], 0)
        processes.result(adapts)


def test_error_does_not_wait_for_rows(monkeypatch):
    monkeypatch.setattr(compare_row, "make_row", row)
    before = time.monotonic()
    processes = RowProcesses(2)
    processes.submit(read_row("tsvm"), [], 200, Path())
    processes.__exit__(OSError, OSError("full"), None)
    assert time.monotonic() - before < 100


def test_killed_process_fails_its_row_only(submitted):
    *_, killed, last = submitted
    assert killed == "its process was killed, as the system does when memory runs out."
    assert last["process"] != submitted[0]["process"]


def test_rows_at_a_time_share_the_cores(submitted, monkeypatch):
    assert submitted[0]["threads"] == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert row_processes.RowProcesses(2)._start[0] == 0


def test_package_is_not_taken_from_the_working_directory(tmp_path):
    work = tmp_path / "work"
    (work / "adamerge").mkdir(parents=True)
    (work / "adamerge" / "__init__.py").write_text("raise SystemExit('taken from the working directory')\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nfrom adamerge.commands.compare.row_processes import RowProcesses\n"
        "if __name__ == '__main__':\n"
        "    with RowProcesses() as processes:\n"
        "        process = processes._new()\n"
        "        print(process.submit(os.getenv, 'PYTHONSAFEPATH').result(), os.getenv('PYTHONSAFEPATH'))\n"
        "        process.shutdown()\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    ran = subprocess.run([sys.executable, str(script)], cwd=work, env=environment, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.strip()) == (0, "1 None"), ran.stderr
