"""A page: what it is made of besides charts and tables, and one file with everything in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jinja2

from adamerge import __version__
from adamerge.errors import InputError
from adamerge.results.report import drawing
from adamerge.results.report.charts import Chart
from adamerge.results.table import Table
from adamerge.system.files import atomic_path

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Tiles:
    """The figures that matter most: label, value, and what it refers to."""

    tiles: Sequence[tuple[str, str, str]]
    block: ClassVar[str] = "tiles"


@dataclass(frozen=True)
class Note:
    """A sentence; a warning where something is wrong."""

    text: str
    is_warning: bool = False
    block: ClassVar[str] = "note"


@dataclass(frozen=True)
class Facts:
    """Facts by name, one a line."""

    facts: Sequence[tuple[str, str]]
    block: ClassVar[str] = "facts"


@dataclass(frozen=True)
class Code:
    """A command or a file; folded where it is long."""

    title: str
    text: str
    is_folded: bool = False
    block: ClassVar[str] = "code"


Block = Chart | Table | Tiles | Note | Facts | Code


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        key: Its anchor.
        title: Its heading.
        blocks: What it holds, in order.
    """

    key: str
    title: str
    blocks: Sequence[Block]


Plan = Sequence[tuple[str, str, Sequence[Callable[[Any], Any]]]]


def build_sections(subject: Any, plan: Plan, notes: Sequence[str]) -> list[Section]:
    """Build the sections for which something is known, after one that holds what to know before reading.

    Args:
        subject: What the page is about.
        plan: Key and title of each section, and functions of the subject, each of which returns a block, a list of
            blocks, or None. A block that cannot be made of a broken file becomes a note.
        notes: Warnings.
    """
    warnings, sections = [*notes], []
    for key, title, makers in plan:
        blocks: list[Block] = []
        for make in makers:
            try:
                content = make(subject)
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                warnings.append(f"A part of the report is missing, as a file is not as adamerge writes it ({error!r}).")
                continue
            blocks += content if isinstance(content, list) else [content] if content is not None else []
        if blocks:
            sections.append(Section(key, title, blocks))
    first = [Section("notes", "To know", [Note(text, is_warning=True) for text in warnings])] if warnings else []
    return first + sections


def write_page(path: Path, title: str, subtitle: str, sections: Sequence[Section]) -> None:
    """Write a page, atomically.

    Raises:
        InputError: If a package of the extra ``report`` is missing.
        OSError: If the file cannot be written.
    """
    charts = [block for section in sections for block in section.blocks if isinstance(block, Chart)]
    try:
        figures = {chart.key: drawing.svg(chart) for chart in charts}
    except ImportError as error:
        raise InputError(f'A report needs the package {error.name}: pip install "adamerge[report]".') from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    text = environment.get_template("page.html").render(
        title=title, subtitle=subtitle, sections=sections, figures=figures, version=__version__
    )
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
