"""What all commands share: the terminal, logs, errors and exit codes."""

import errno
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.logging import RichHandler

from adamerge import ranks
from adamerge.errors import GuardError, InputError

EXIT_INPUT = 2
EXIT_GUARD = 3

_PIPED_WIDTH = 120  # characters, where there is no terminal to ask

out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else _PIPED_WIDTH)
err = Console(stderr=True, soft_wrap=True, highlight=False)


class Agreed(InputError):
    """Raised by all processes of a run; the first says it."""


class JobFailed(SystemExit):
    """Carries a job's error past Hydra, which would print more than the one line."""

    def __init__(self, error: InputError | OSError | GuardError) -> None:
        super().__init__(EXIT_GUARD if isinstance(error, GuardError) else EXIT_INPUT)
        self.error = error


def report(problems: Sequence[str]) -> None:
    """List all problems, one a line, and leave; nothing where there are none."""
    for problem in problems:
        err.print(f"[red]error:[/] {escape(problem)}")
    if problems:
        sys.exit(EXIT_INPUT)


def list_files(folder: Path) -> None:
    """List what a command made, and its folder as the last line."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        out.print(f"  {path.relative_to(folder)}  [dim]{size(path.stat().st_size)}[/]", highlight=False)
    click.echo(str(folder))


def size(count: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def fail(error: Exception, debug: bool) -> None:
    """Say what is wrong in one line and leave; where all processes know, the first says it."""
    code = EXIT_GUARD if isinstance(error, GuardError) else EXIT_INPUT
    if not ranks.is_first() and isinstance(error, (Agreed, GuardError)):
        sys.exit(code)
    if debug:
        err.print_exception()
    text = str(error)
    if "Original Traceback" in text:  # from a process that loads data
        text = text.strip().splitlines()[-1].removeprefix("adamerge.errors.InputError: ")
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        text += ". Free some space." if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    where = "" if ranks.is_first() else f" (process {ranks.rank()})"
    err.print(f"[red]error{where}:[/] {escape(' '.join(text.split()))}")
    sys.exit(code)


def escape(text: str) -> str:
    """Return a text that rich prints as it is."""
    return text.replace("[", r"\[")


def configure_logging(debug: bool) -> None:
    """Own messages to the terminal; Lightning's and open_clip's chatter and known-harmless warnings not."""
    handler: logging.Handler = logging.StreamHandler()
    if err.is_terminal:
        handler = RichHandler(console=err, show_path=False, show_time=False)
    handler.addFilter(lambda record: debug or record.name.startswith("adamerge") or record.levelno >= logging.WARNING)
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.INFO, format="%(message)s", handlers=[handler], force=True
    )
    logging.captureWarnings(True)
    logging.raiseExceptions = debug  # a log that cannot be written to, on a full disk, is not the error to report
    logging.getLogger("hydra").setLevel(logging.CRITICAL)  # its errors reach the user as exceptions
    quiet_lightning()
    for message in (
        ".*does not have many workers.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*is not resumable.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def quiet_lightning() -> None:
    """Silence Lightning's loggers; to be called again once it is imported, which sets their levels anew."""
    level = logging.DEBUG if logging.getLogger().level == logging.DEBUG else logging.ERROR
    for noisy in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(noisy).setLevel(level)


def log_to(path: Path) -> logging.Handler:
    """Keep a complete log file in the run's folder, made with its first line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    return handler
