"""Processes in which ``adamerge compare`` makes its rows.

Rows that adapt get a process each: fresh, forked from one that has imported everything but computed nothing. All others
share one (as many as run at a time), so that images, heads and pool are made once per seed; it ends when a row that
adapts begins while it has nothing to do, as its memory may be needed. One that is killed takes no other row along.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver, get_context
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from adamerge.commands.compare import row as compare_row

Result = dict[str, Any]


class RowProcesses:
    """Makes rows in other processes.

    Args:
        jobs: Rows at a time; they share the processor's cores, unless the environment sets ``OMP_NUM_THREADS``.
        on_start: Called first in each process, such as to set up logging; importable.
    """

    def __init__(self, jobs: int = 1, on_start: Callable[[], None] | None = None) -> None:
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload([compare_row.__name__])
        _start_server()
        threads = 0 if jobs == 1 or "OMP_NUM_THREADS" in os.environ else max(1, torch.get_num_threads() // jobs)
        self._start = (threads, on_start)
        self._used: dict[Future[Result], tuple[ProcessPoolExecutor, bool]] = {}
        self._idle: list[ProcessPoolExecutor] = []

    def __enter__(self) -> "RowProcesses":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        processes = [*self._idle, *(process for process, _ in self._used.values())]
        if isinstance(error, Exception):  # a signal has reached the rows already
            for process in processes:
                _stop(process)
        for process in processes:
            process.shutdown(cancel_futures=True)

    def submit(self, spec: compare_row.Spec, common: Sequence[str], seed: int, folder: Path) -> Future[Result]:
        """Begin a row; to be ended by :meth:`result`. One that adapts has the memory of idle processes."""
        while spec.adapts and self._idle:
            self._idle.pop().shutdown()
        process = self._idle.pop() if self._idle and not spec.adapts else self._new()
        future = process.submit(compare_row.make_row, spec, common, seed, folder)
        self._used[future] = process, not spec.adapts
        return future

    def result(self, future: Future[Result]) -> Result:
        """Wait for a row and return it.

        Raises:
            RuntimeError: If its process was killed.
        """
        process, is_shared = self._used[future]
        try:
            found = future.result()
        except BrokenProcessPool as error:
            is_shared = False
            raise RuntimeError("its process was killed, as the system does when memory runs out.") from error
        finally:
            del self._used[future]
            if is_shared:
                self._idle.append(process)
            else:
                process.shutdown()
        return found

    def _new(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=self._context, initializer=_set_up, initargs=self._start)


def _stop(process: ProcessPoolExecutor) -> None:
    """End a row that is being made, so that an error need not wait for it; one that adapts saves its step first."""
    for worker in (process._processes or {}).values():
        worker.terminate()


def _start_server() -> None:
    """Start the process that all others are forked from, without the working directory on its import path."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"  # it would preload a folder ./adamerge in place of the installed package
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def _set_up(threads: int, on_start: Callable[[], None] | None) -> None:
    if threads:
        torch.set_num_threads(threads)
    if on_start is not None:
        on_start()
