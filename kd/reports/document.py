"""What a report is made of: headings, text, tables and charts. Written once, rendered as Markdown or as a page of HTML.

Everything in it is plain text; escaping is the business of the renderers, ``markdown_text.py`` and ``page.py``.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Number:
    """A number with its text; columns are sorted by the number. NaN is shown as a dash."""

    value: float
    text: str


@dataclass(frozen=True)
class Share:
    """A number from 0 to 1 with its text, with a bar of that length behind it on a page."""

    value: float
    text: str


@dataclass(frozen=True)
class Curve:
    """A small curve, values from 0 to 1 at equal steps. On a page only."""

    values: tuple[float, ...]


@dataclass(frozen=True)
class Sound:
    """A player for an MP3 file, if there is one. On a page only."""

    mp3: bytes | None


Cell = str | Number | Share | Curve | Sound


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Code:
    """Lines to copy."""

    text: str


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Table:
    """Cells under their headings. A column is numeric if its cells are."""

    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    folded: bool = False
    """On a page, shown only when it is opened."""


@dataclass(frozen=True)
class Chart:
    """A drawing. In Markdown, where it cannot be, its description stands for it."""

    svg: str
    caption: str
    description: str = ""
    """What it shows, in words and numbers, for those who do not see it."""


Block = Text | Code | Facts | Table | Chart


@dataclass(frozen=True)
class Section:
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    title: str
    subtitle: str
    headline: tuple[tuple[str, str, str], ...]
    """The numbers that come first: name, value, what it is of."""
    sections: tuple[Section, ...]


def number(value: float | None, text: str = "{:.3f}") -> Number:
    """A number as a cell, formatted by ``text``; a dash for None and NaN."""
    if value is None or math.isnan(value):
        return Number(math.nan, "–")
    return Number(value, text.format(value))


def share(value: float, text: str = "{:.3f}") -> Cell:
    """A number from 0 to 1 as a cell with a bar; a dash for NaN."""
    return number(value) if math.isnan(value) else Share(value, text.format(value))


def columns_of(table: Table) -> list[tuple[Cell, ...]]:
    """The cells of each column; of a table without rows, none each."""
    return list(zip(*table.rows, strict=True)) if table.rows else [()] * len(table.headings)


def is_numeric(cells: Sequence[Cell]) -> bool:
    """Whether a column holds numbers and nothing else."""
    return bool(cells) and all(isinstance(cell, Number | Share) for cell in cells)


def shows_on_page_only(cells: Sequence[Cell]) -> bool:
    """Whether a column holds curves or players."""
    return any(isinstance(cell, Curve | Sound) for cell in cells)


def printable(text: str) -> str:
    """Text with what is no Unicode (names of files in other bytes) and what steers a terminal written as escapes."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", lambda found: ascii(found[0])[1:-1], text)
