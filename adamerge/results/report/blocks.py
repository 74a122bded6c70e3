"""What a page is made of, besides charts and tables, and how files of all kinds of damage become a note on it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from adamerge.results.report.charts import Chart
from adamerge.results.table import Table


@dataclass(frozen=True)
class Tiles:
    """The figures that matter most: label, value, and what it refers to."""

    tiles: Sequence[tuple[str, str, str]]
    block: str = "tiles"


@dataclass(frozen=True)
class Note:
    """A sentence; a warning where something is wrong."""

    text: str
    is_warning: bool = False
    block: str = "note"


@dataclass(frozen=True)
class Facts:
    """Names and what they are."""

    facts: Sequence[tuple[str, str]]
    block: str = "facts"


@dataclass(frozen=True)
class Code:
    """A command or a file; folded where it is long."""

    title: str
    text: str
    is_folded: bool = False
    block: str = "code"


Block = Chart | Table | Tiles | Note | Facts | Code


@dataclass
class Section:
    """A part of a page."""

    key: str
    title: str
    blocks: list[Block] = field(default_factory=list)


def built(*makers: Callable[[], Any], notes: list[str]) -> list[Block]:
    """Call what makes blocks; a block that cannot be made of a broken file becomes a note.

    Args:
        makers: Each returns a block, a sequence of blocks, or None.
        notes: Extended by what went wrong.
    """
    blocks: list[Block] = []
    for make in makers:
        try:
            made = make()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
            notes.append(f"A part of the report is missing, as a file is not as adamerge writes it ({error!r}).")
            continue
        if made is not None:
            blocks += made if isinstance(made, list) else [made]
    return blocks
