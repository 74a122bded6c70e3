"""A table apart from how it is printed: on a terminal, in Markdown or on a page."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.table

_NUMBER = re.compile(r"-|((sd )?[±+-]?[\d.,]+(e[+-]?\d+)?( ?(%|B|kB|MB|GB|ms|s|min|h))?( \d+ \w+)?( of \d+)?)?")


@dataclass(frozen=True)
class Table:
    """Rows of texts under the names of their columns; the first column names the row.

    Attributes:
        header: Names of the columns.
        rows: A text for each column.
        caption: What the columns are.
        title: Above the table.
        marks: Row to what follows its name, such as `` *``.
        strong: Rows that the table is about.
        strong_columns: Names of the columns that it is about.
        styles: Row and column to a cell's style on a terminal, such as ``"red"``.
        optional: How many of the last columns may be left out, one after another, where a terminal is too narrow.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    title: str = ""
    marks: Mapping[int, str] = field(default_factory=dict)
    strong: frozenset[int] = frozenset()
    strong_columns: frozenset[str] = frozenset()
    styles: Mapping[tuple[int, int], str] = field(default_factory=dict)
    optional: int = 0
    block: str = "table"

    @property
    def lines(self) -> list[list[str]]:
        """The rows, with their marks."""
        return [[name + self.marks.get(at, ""), *cells] for at, (name, *cells) in enumerate(self.rows)]

    @property
    def text_columns(self) -> list[bool]:
        """Whether each column holds words rather than numbers."""
        return [at == 0 or not all(_NUMBER.fullmatch(row[at]) for row in self.rows) for at in range(len(self.header))]

    def filled(self) -> "Table":
        """Return the table without the columns that are empty in every row."""
        return self._only([at for at in range(len(self.header)) if any(row[at] for row in self.rows)])

    def _only(self, columns: Sequence[int]) -> "Table":
        rows = [[row[at] for at in columns] for row in self.rows]
        styles = {(row, columns.index(at)): style for (row, at), style in self.styles.items() if at in columns}
        return replace(self, header=[self.header[at] for at in columns], rows=rows, styles=styles)

    def terminal(self, width: int | None = None) -> "rich.table.Table":
        """Return the table for a terminal.

        Args:
            width: In characters; optional columns are left out where they do not fit.
        """
        from rich.box import SIMPLE_HEAD
        from rich.table import Table as RichTable
        from rich.text import Text

        shown = self if width is None else self._within(width)
        table = RichTable(
            title=Text(shown.title) if shown.title else None, caption=Text(shown.caption) if shown.caption else None,
            title_justify="left", caption_justify="left", header_style="bold", box=SIMPLE_HEAD, pad_edge=False,
            show_edge=False, collapse_padding=True,
        )  # fmt: skip
        for name, is_text in zip(shown.header, shown.text_columns, strict=True):
            style = "bold" if name in shown.strong_columns else None
            table.add_column(
                Text(name), justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold", style=style
            )
        for row, line in enumerate(shown.lines):
            table.add_row(*(Text(cell, style=shown.styles.get((row, at), "")) for at, cell in enumerate(line)))
        return table

    def _within(self, width: int) -> "Table":
        widths = [2 + max(map(len, column)) for column in zip(self.header, *self.lines, strict=True)]
        needed = len(widths) - self.optional
        kept, used = list(range(needed)), sum(widths[:needed]) - 2
        for at in range(needed, len(widths)):
            if used + widths[at] <= width:
                kept.append(at)
                used += widths[at]
        return self._only(kept)

    def markdown(self, code: Sequence[int] = ()) -> str:
        """Return the table and its caption as Markdown.

        Args:
            code: Columns whose texts are code; marks are not.
        """
        rows = [
            [f"`{cell}`" if at in code and cell else cell for at, cell in enumerate(row)]
            for row in map(list, self.rows)
        ]
        marks = ["---" if is_text else "---:" for is_text in self.text_columns]
        lines = [[*self.header], marks, *replace(self, rows=rows).lines]
        escaped = [" | ".join(cell.replace("|", r"\|") for cell in line) for line in lines]
        return "\n".join(f"| {line} |" for line in escaped) + (f"\n\n{self.caption}" if self.caption else "") + "\n"

    def html(self) -> str:
        """Return the table as HTML, in a region of its own that scrolls."""
        words = [' class="text"' if is_text else "" for is_text in self.text_columns]
        names = zip(self.header, words, strict=True)
        head = "".join(f'<th scope="col"{word}>{escape(name)}</th>' if name else "<td></td>" for name, word in names)
        body = []
        for at, (name, *cells) in enumerate(self.lines):
            others = "".join(f"<td{w}>{escape(cell)}</td>" for cell, w in zip(cells, words[1:], strict=True))
            strong = ' class="strong"' if at in self.strong else ""
            body.append(f'<tr{strong}><th scope="row">{escape(name)}</th>{others}</tr>')
        caption = escape(self.caption)
        return (
            f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}">\n'
            f'<table style="--columns: {len(self.header)}">\n'
            f"<caption><span>{caption}</span></caption>\n<thead><tr>{head}</tr></thead>\n"
            "<tbody>\n" + "\n".join(body) + "\n</tbody>\n</table>\n</div>"
        )
