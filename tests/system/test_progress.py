"""Bars on real terminals, lines in logs, and nothing that moves anywhere else."""

import io
import logging
import os
import pty
import re
import subprocess
import sys

import pytest
from rich.table import Table
from rich.text import Text

from adamerge.system import progress

PHASE = """
import sys
from rich.table import Table
from rich.text import Text

from adamerge.system import progress
if "quiet" in sys.argv: progress.set_quiet(True)
with progress.phase("Scoring it", 3, "images") as advance:
    print("a result")
    for _ in range(3): advance(1)
"""


def test_phase_shows_count_and_logs_how_long_it_took(terminal, caplog):
    with caplog.at_level(logging.INFO, "adamerge"), progress.phase("Scoring it", 6, "images") as advance:
        advance(2)
        advance(4)
    assert "Scoring it" in terminal.getvalue()
    assert "6/6 images" in terminal.getvalue()
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h") == 1
    (record,) = caplog.records
    assert re.fullmatch(r"Scoring it: 6 images in \d+\.\d s, \d+\.\d images/s", record.getMessage())


def test_phase_that_fails_takes_its_bar_away_and_logs_nothing(terminal, caplog):
    with pytest.raises(RuntimeError), caplog.at_level(logging.INFO), progress.phase("Reading"):
        raise RuntimeError
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h") == 1
    assert not caplog.records


def test_phase_within_another_is_drawn_too(terminal):
    with progress.phase("Outer"):
        assert list(progress.track([1, 2], "Inner", "tasks")) == [1, 2]
    assert "Inner" in terminal.getvalue()


@pytest.mark.parametrize(
    ("terminal", "quiet", "environment", "shown"),
    [
        (True, (), {}, True),
        (True, ("quiet",), {}, False),
        (True, (), {"TERM": "dumb"}, False),
        (False, (), {"FORCE_COLOR": "1"}, False),  # as in the cells of a notebook
        (False, (), {"TTY_INTERACTIVE": "1", "CLICOLOR_FORCE": "1"}, False),
    ],
)
def test_bar_is_drawn_on_a_real_terminal_only(terminal, quiet, environment, shown):
    ours, theirs = pty.openpty() if terminal else os.pipe()
    environment = {"TERM": "xterm", **{k: v for k, v in os.environ.items() if "COLOR" not in k}, **environment}
    with os.fdopen(ours, "rb", buffering=0) as reading:
        with os.fdopen(theirs, "wb") as writing:
            done = subprocess.run(
                [sys.executable, "-c", PHASE, *quiet], stdout=subprocess.PIPE, stderr=writing, env=environment
            )
        try:
            text = reading.read(100_000)
        except OSError:  # how a terminal says that nothing was written to it
            text = b""
    assert done.returncode == 0
    assert done.stdout == b"a result\n"  # which a bar on standard error leaves alone
    assert (b"Scoring it" in text) == (b"\x1b" in text) == shown
    assert shown or text == b""


def test_names_cannot_steer_the_terminal():
    file, name = io.StringIO(), "a\x1b[2J\x07\u202eb\rc"
    table = Table()
    table.add_column(name)
    table.add_row(Text(name))
    console = progress.SafeConsole(file=file, width=80, force_terminal=True, color_system="truecolor")
    for shown in (name, Text(name, style="red"), table):
        console.print(shown, markup=False)
    assert not [sign for sign in ("\x1b[2J", "\x07", "\u202e", "\r") if sign in file.getvalue()]
    assert file.getvalue().count("a\\x1b") == 4
    record = logging.LogRecord("x", logging.INFO, "", 0, "%s", (name,), None)
    assert progress.SafeFormatter("%(message)s").format(record) == "a\\x1b[2J\\x07\\u202eb\\rc"
