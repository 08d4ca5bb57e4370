"""The parts of a report: sections with text, tables and charts. A document can be rendered as Markdown or as an HTML page.

All text here is plain text. The renderers, ``markdown_text.py`` and ``page.py``, escape it.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Number:
    """A number and how it is shown. Tables sort their columns by the number."""

    value: float
    text: str


@dataclass(frozen=True)
class Share:
    """A number from 0 to 1 and how it is shown. An HTML page draws a bar of this length behind it."""

    value: float
    text: str


@dataclass(frozen=True)
class Curve:
    """A small curve through values from 0 to 1 at equal steps. Shown on HTML pages only."""

    values: tuple[float, ...]


@dataclass(frozen=True)
class Sound:
    """A player for an MP3 file; an empty cell if there is no file. Shown on HTML pages only."""

    mp3: bytes | None


Cell = str | Number | Share | Curve | Sound


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Code:
    """Text in a fixed-width font, such as a command."""

    text: str


@dataclass(frozen=True)
class Facts:
    """A list of names with their values."""

    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Table:
    """Rows of cells under headings. A column is right-aligned if all its cells are numbers."""

    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    folded: bool = False
    """Whether an HTML page shows the table only after a click."""


@dataclass(frozen=True)
class Chart:
    """A chart. Markdown shows its description instead."""

    svg: str
    caption: str
    description: str = ""
    """What the chart shows, in words and numbers, for readers who cannot see it."""


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
    """The most important numbers, each as (name, value, note)."""
    sections: tuple[Section, ...]


def number(value: float | None, text: str = "{:.3f}") -> Number:
    """A cell with a number, formatted with the format string ``text``. None and NaN are shown as a dash."""
    if value is None or math.isnan(value):
        return Number(math.nan, "–")
    return Number(value, text.format(value))


def share(value: float, text: str = "{:.3f}") -> Cell:
    """A cell with a number from 0 to 1 and a bar. NaN is shown as a dash."""
    return number(value) if math.isnan(value) else Share(value, text.format(value))


def columns_of(table: Table) -> list[tuple[Cell, ...]]:
    """The cells of each column; empty tuples if the table has no rows."""
    return list(zip(*table.rows, strict=True)) if table.rows else [()] * len(table.headings)


def is_numeric(cells: Sequence[Cell]) -> bool:
    """Whether all cells of a column are numbers. False for a column without cells."""
    return bool(cells) and all(isinstance(cell, Number | Share) for cell in cells)


def shows_on_page_only(cells: Sequence[Cell]) -> bool:
    """Whether a column has curves or players, which Markdown cannot show."""
    return any(isinstance(cell, Curve | Sound) for cell in cells)


def printable(text: str) -> str:
    """The text with control characters and invalid Unicode (from file names in another encoding) replaced by escapes."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", lambda found: ascii(found[0])[1:-1], text)
