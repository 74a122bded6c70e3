"""Progress of long work: bars on a terminal, lines in logs everywhere.

Whether anything moves follows from the terminal alone; what the environment says about colours (``FORCE_COLOR``, which
Jupyter sets for its cells' commands) has no say in it. The lines go to the logger of this module, whose name lets
the command line keep them off a terminal that shows the bars.
"""

import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.segment import Segment
from rich.text import Text

from adamerge.system import ranks

T = TypeVar("T")
log = logging.getLogger(__name__)

# Control characters but tab and line feed, and those that turn the direction of texts.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""Return a text with escapes in the place of control characters, which would act on the terminal.

    >>> printable("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    return _CONTROL.sub(lambda match: ascii(match.group())[1:-1], text)


@contextmanager
def only_errors(name: str = "") -> Iterator[None]:
    """Let a logger (default: the root) pass errors only while a block lasts."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class SafeConsole(Console):
    """A console that texts cannot steer: names in files of others may hold control characters."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield what is shown, its texts :func:`printable`; rich adds colours only afterwards."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


class SafeFormatter(logging.Formatter):
    """Formats log lines, :func:`printable`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        return printable(super().format(record))


console = SafeConsole(stderr=True, highlight=False)  # of bars, and of log lines, which stand above a bar that is drawn
_quiet = False


def set_quiet(quiet: bool) -> None:
    """Draw nothing from now on, or draw again."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    """Whether nothing but results, warnings and errors is wanted."""
    return _quiet


def is_drawn() -> bool:
    """Whether bars are drawn: a terminal is there to draw on, and this process is the one that talks to the user."""
    return not _quiet and sys.stderr.isatty() and not console.is_dumb_terminal and ranks.is_first()


def bar(unit: str, *, draw: bool = True) -> Progress:
    """Return a bar of one line: count, rate, time left, and the field ``detail``, which each of its tasks must have.

    Args:
        unit: What is counted, such as ``"steps"``.
        draw: False hides it also where :func:`is_drawn`.
    """
    columns = TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), _Facts(unit)
    return Progress(
        *columns, console=console, transient=True, disable=not (draw and is_drawn()),
        redirect_stdout=False,  # results may go to a file
    )  # fmt: skip


@contextmanager
def phase(
    description: str, total: int | None = None, unit: str = "", *, draw: bool = True
) -> Iterator[Callable[[int], None]]:
    """Show a phase of work while it lasts, and log at its end how long it took.

    Args:
        description: What is done.
        total: How much there is to do; None where that is not known.
        unit: What is counted, such as ``"images"``.
        draw: See :func:`bar`.

    Yields:
        What is to be called with the amount just done.
    """
    start, done = time.perf_counter(), 0
    with bar(unit, draw=draw) as progress:
        task = progress.add_task(description, total=total, detail="")

        def advance(amount: int = 1) -> None:
            nonlocal done
            done += amount
            progress.advance(task, amount)

        yield advance
    seconds = time.perf_counter() - start
    count = f"{done} {unit} in " if total is not None else ""
    rate = f", {done / seconds:.1f} {unit}/s" if total is not None and seconds > 0 else ""
    log.info("%s: %s%.1f s%s", description, count, seconds, rate)


def track(items: Sequence[T], description: str, unit: str, *, draw: bool = True) -> Iterator[T]:
    """Yield the items of a :func:`phase`, one after the other."""
    with phase(description, len(items), unit, draw=draw) as advance:
        for item in items:
            yield item
            advance(1)


def line(done: int, total: int | None, rate: float | None, unit: str, detail: str = "") -> str:
    """Return a line about work in progress: count, rate, time left and a detail.

    >>> line(30, 150, 12.0, "steps", "loss 0.5")
    '30/150 steps, 12.0 steps/s, 0:00:10 left, loss 0.5'
    """
    parts = [f"{done}/{total} {unit}" if total else ""]
    if rate and unit:
        parts.append(f"{rate:.1f} {unit}/s")
    if rate and total:
        parts.append(f"{timedelta(seconds=round((total - done) / rate))} left")
    return ", ".join(part for part in (*parts, detail) if part)


class _Facts(ProgressColumn):
    """The text after the bar."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        total = None if task.total is None else int(task.total)
        text = line(int(task.completed), total, task.speed, self._unit, str(task.fields["detail"]))
        return Text(text if total is not None else str(timedelta(seconds=round(task.elapsed or 0))), no_wrap=True)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """Return the seconds so far."""
        return time.perf_counter() - self._start
