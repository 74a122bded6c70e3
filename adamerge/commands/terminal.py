"""What all commands share: the terminal, logs, errors and exit codes."""

import errno
import io
import json
import logging
import os
import platform
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
from rich.console import RenderableType
from rich.logging import RichHandler
from rich.text import Text

from adamerge import __version__
from adamerge.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, GuardError, InputError, Interrupted
from adamerge.results.numbers import size
from adamerge.results.table import Table
from adamerge.system import progress, ranks
from adamerge.system.files import open_own
from adamerge.system.progress import SafeConsole, SafeFormatter, printable

EXIT_INPUT = 2
EXIT_GUARD = 3

PIPED_WIDTH = 120  # characters, where there is no terminal to ask
_RECORD = logging.getLogger("adamerge.record")  # for log files only: what the terminal is shown in another form

# Texts are shown as they are, but for control characters: names of files and tensors may hold what rich reads as
# markup, such as [/x] or :cat:.
out = SafeConsole(soft_wrap=True, width=None if sys.stdout.isatty() else PIPED_WIDTH, markup=False, emoji=False)
err = SafeConsole(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


Option = Callable[[Callable[..., None]], Callable[..., None]]  # of a command, as a decorator


class Agreed(InputError):
    """An error that all processes of a run raise, and the first prints."""


class JobFailed(SystemExit):
    """Carries a job's error past Hydra, which would print more than the one line."""

    def __init__(self, error: InputError | OSError | GuardError) -> None:
        super().__init__(EXIT_GUARD if isinstance(error, GuardError) else EXIT_INPUT)
        self.error = error


def report(problems: Sequence[str], explain: Callable[[], None] | None = None) -> None:
    """Print all problems, one a line, then call ``explain``, and exit; do nothing without problems."""
    for problem in problems:
        err.print(Text.assemble(("error:", "red"), f" {' '.join(problem.split())}"))
    if problems:
        if explain is not None:
            explain()
        sys.exit(EXIT_INPUT)


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON on standard output, all else on standard error."
)
trust_option = click.option(
    "--trust-code", is_flag=True, help="Import code beyond adamerge's list of names for a folder (docs/security.md)."
)


def pool_options(*further: Option) -> Option:
    """Return the options that name a pool, and further ones after them."""
    path = click.Path(path_type=Path)
    options: tuple[Option, ...] = (
        click.option("--base", type=path, help="The base checkpoint."),
        click.option("--expert", "experts", multiple=True, metavar="NAME=FILE", help="An expert; repeat."),
        click.option("--pool", help="Instead: zoo, or a pool file (yaml; its paths start from its own folder)."),
        click.option("--key-prefix", "--prefix", help="Key prefix of the encoder in the files, such as visual."),
        click.option("--include", multiple=True, metavar="GLOB", help="Only parameters of such names; repeat."),
        click.option("--exclude", multiple=True, metavar="GLOB", help="Parameters to leave out; repeat."),
        click.option("--unplaced", type=click.Choice(["auto", "refuse", "list"]), help="As pool.unplaced.  [auto]"),
        *further,
    )

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorated


def rule_options(rule: str, recipe: str) -> Option:
    """Return the options that name a rule and the pool that it works on.

    Args:
        rule: What help says of ``--rule``.
        recipe: The file that holds all of them, and is given in their place.
    """
    return pool_options(
        click.option("--rule", help=rule),
        click.option("--set", "settings", multiple=True, metavar="OPTION=VALUE", help="An option of the rule; repeat."),
        click.option("--recipe", type=click.Path(path_type=Path), help=f"Instead of all else: a {recipe}, run again."),
    )


def print_json(content: Any) -> None:
    """Print a command's result for programs."""
    click.echo(json.dumps(content, indent=2))


def echo(path: object) -> None:
    """Print a path, or a text, that scripts read: as it is, but for characters that would change the terminal."""
    click.echo(printable(str(path)))


def list_files(folder: Path, pattern: str = "**/*") -> None:
    """List what a command made, unless it is to be quiet, and its folder as the last line."""
    for path in sorted(p for p in folder.glob(pattern) if p.is_file() and not progress.is_quiet()):
        out.print(Text.assemble(f"  {path.relative_to(folder)}  ", (size(path.stat().st_size), "dim")))
    echo(folder)


def print_files(files: Mapping[str, Path], as_json: bool) -> None:
    """Print the files that a command made, by their short names in JSON, else one a line."""
    if as_json:
        print_json({"files": {name: str(path) for name, path in files.items()}})
        return
    for path in files.values():
        out.print(str(path), highlight=False)


def print_table(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print lines of texts under the names of their columns."""
    out.print(Table(header, lines, title=title).terminal())


def fail(error: Exception, debug: bool) -> None:
    """Print an error in one line and exit; where all processes raise it, the first prints it."""
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
    err.print(Text.assemble((f"error{where}:", "red"), f" {' '.join(text.split())}"))
    sys.exit(code)


@contextmanager
def interruptible() -> Iterator[None]:
    """Leave on Ctrl-C, and with the exit code for "start it again" on SIGTERM, which is what a scheduler sends first.

    Not by KeyboardInterrupt, which Lightning turns into exit code 1. While steps are taken,
    :class:`~adamerge.callbacks.GracefulStop` stands in.
    """
    process = os.getpid()

    def leave(number: int, _: Any) -> None:
        if os.getpid() != process:  # forked to load data: it ends with its parent
            raise KeyboardInterrupt
        is_preempted = number == signal.SIGTERM
        if ranks.is_first():  # past what may be printing just now
            os.write(2, b"Stopped by SIGTERM.\n" if is_preempted else b"Interrupted.\n")
        raise Interrupted(EXIT_PREEMPTED if is_preempted else EXIT_INTERRUPTED)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may ask for signals
        yield
        return
    previous = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def configure_logging(debug: bool, quiet: bool = False) -> None:
    """Send adamerge's messages to the terminal, but not other libraries' chatter and harmless warnings.

    Args:
        debug: Show everything.
        quiet: Show warnings only, and no progress.
    """
    progress.set_quiet(quiet)
    handler: logging.Handler = logging.StreamHandler()
    if sys.stderr.isatty():
        handler = RichHandler(console=progress.console, show_path=False, show_time=False)

    def is_shown(record: logging.LogRecord) -> bool:
        if record.name == _RECORD.name or (record.name == progress.log.name and progress.is_drawn()):
            return False
        is_own = record.name.startswith("adamerge") and not quiet
        return debug or is_own or record.levelno >= logging.WARNING

    handler.addFilter(is_shown)
    handler.setFormatter(SafeFormatter("%(message)s"))
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.raiseExceptions = debug  # a log that cannot be written to, on a full disk, is not the error to report
    logging.getLogger("hydra").setLevel(logging.CRITICAL)  # its errors reach the user as exceptions
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # of torchao, whenever transformers is imported
    quiet_lightning()
    for message in (
        ".*does not have many workers.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*is not resumable.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def quiet_lightning() -> None:
    """Silence Lightning's loggers; to be called again once it is imported, which sets the levels of its packages anew.

    What it tells of devices, and advertises, comes from a module of each, whose level stays.
    """
    level = logging.DEBUG if logging.getLogger().level == logging.DEBUG else logging.ERROR
    packages = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning")
    for noisy in (*packages, *(f"{package}.utilities.rank_zero" for package in packages)):
        logging.getLogger(noisy).setLevel(level)


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Keep a complete log in the run's folder: messages, progress, what the terminal shows, and how it ended.

    A resumed run goes on in it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = os.fdopen(open_own(path, os.O_WRONLY | os.O_APPEND), "a", encoding="utf-8")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(SafeFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        command = f"{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}"
        where = f"process {os.getpid()} on {platform.node()}"
        _RECORD.info("%s  (adamerge %s, Python %s, %s)", command, __version__, platform.python_version(), where)
        yield
        _RECORD.info("Done.")
    except (InputError, GuardError, OSError, SystemExit) as error:
        _RECORD.error("%s: %s", type(error).__name__, error)
        raise
    except BaseException:
        _RECORD.exception("Ended by an error.")
        raise
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
        with suppress(OSError):  # of lines that a full disk did not take
            stream.close()


def record_line(text: object) -> None:
    """Write a line into the log files that the terminal has shown before they were open."""
    _RECORD.info("%s", text)


def record(shown: RenderableType) -> None:
    """Write a table that the terminal shows into the log files."""
    plain = SafeConsole(file=io.StringIO(), width=PIPED_WIDTH, color_system=None)
    with plain.capture() as captured:
        plain.print(shown)
    _RECORD.info("\n%s", captured.get().rstrip())
