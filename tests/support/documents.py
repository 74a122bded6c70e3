"""What README.md and docs/ show: commands, and files that the reader is told to write."""

import ast
import importlib
import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


class Command(NamedTuple):
    """A command line of adamerge, in whatever starts it."""

    page: str
    line: int
    arguments: list[str]

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {shlex.join(self.arguments)}"


def blocks(page: Path, *languages: str):
    """Yield (first line's number, text) of the fenced blocks in these languages ("" for none given)."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if found[1] in languages:
            yield text.count("\n", 0, found.start(2)) + 1, found[2]


def commands(page: Path) -> list[Command]:
    """Return the commands of adamerge in a page's shell blocks."""
    return [
        Command(page.name, number, arguments)
        for first, block in blocks(page, "bash", "sh", "console", "")
        for number, line in _logical_lines(block, first)
        for arguments in _of_adamerge(line)
    ]


def written_files(page: Path) -> dict[str, str]:
    """Return path and text of the files in a page: blocks whose first line is a comment with their path."""
    files = {}
    for _, block in blocks(page, "python", "yaml"):
        name = re.match(r"# (\S+\.(?:py|yaml))\n", block)
        if name:
            files[name[1]] = block
    return files


def unknown_imports(code: str) -> list[str]:
    """Return what code imports from adamerge that is not there."""
    wanted = [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "adamerge"
        for alias in node.names
    ]
    modules = {module: importlib.import_module(module) for module, _ in wanted}
    return [f"{module}.{name}" for module, name in wanted if not hasattr(modules[module], name)]


def _logical_lines(block: str, first: int):
    """Yield (number, line) with lines that end in a backslash joined."""
    number, held = first, ""
    for i, line in enumerate(block.splitlines()):
        number = number if held else first + i
        held += line.removesuffix("\\")
        if not line.endswith("\\"):
            yield number, held
            held = ""


def _of_adamerge(line: str):
    """Yield the arguments of each adamerge command of a line."""
    if "adamerge" not in line:
        return
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words, found = list(lexer), None
    for word in words:
        if word in ("&&", ";", "|", "||", "&"):
            if found is not None:
                yield found
            found = None
        elif found is not None:
            found.append(word)
        elif word in ("adamerge", "adamerge.commands.cli"):
            found = []
    if found is not None:
        yield found
