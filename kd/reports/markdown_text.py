"""A document as GitHub-flavoured Markdown."""

import re

from audio_datasets.system.text_tables import markdown_table
from kd.reports.document import (
    Block,
    Cell,
    Chart,
    Code,
    Document,
    Facts,
    Table,
    Text,
    columns_of,
    is_numeric,
    printable,
    shows_on_page_only,
)


def to_markdown(document: Document) -> str:
    """The document as GitHub-flavoured Markdown; charts, curves and players are left out."""
    lines = [f"# {_markdown_text(document.title)}", "", _markdown_text(document.subtitle), ""]
    for name, value, note in document.headline:
        lines += [f"**{_markdown_text(name)}: {_markdown_text(value)}** {_markdown_text(note)}".rstrip(), ""]
    for section in document.sections:
        lines += [f"## {_markdown_text(section.title)}", ""]
        for block in section.blocks:
            text = _markdown_block(block)
            if text:
                lines += [text, ""]
    return printable("\n".join(lines))


def _markdown_block(block: Block) -> str:
    match block:
        case Text(text):
            return _markdown_text(text)
        case Code(text):
            longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
            fence = "`" * max(3, longest + 1)
            return f"{fence}\n{text}\n{fence}"
        case Facts(items):
            return _markdown_table(Table(("", ""), items))
        case Chart(_, caption, description):
            return f"*{_markdown_text(caption)}.* {_markdown_text(description)}" if description else ""
        case Table():
            caption = f"*{_markdown_text(block.caption)}*\n\n" if block.caption else ""
            return caption + _markdown_table(block)


def _markdown_table(table: Table) -> str:
    """The table as Markdown. Empty if all its columns can only be shown on an HTML page."""
    columns = [
        (heading, cells)
        for heading, cells in zip(table.headings, columns_of(table), strict=True)
        if not shows_on_page_only(cells)
    ]
    if not columns:
        return ""
    texts = [[_markdown_text(heading), *map(_markdown_cell, cells)] for heading, cells in columns]
    align = "".join(">" if is_numeric(cells) else "<" for _, cells in columns)
    return markdown_table(list(zip(*texts, strict=True)), align)


def _markdown_cell(cell: Cell) -> str:
    return _markdown_text(cell if isinstance(cell, str) else cell.text)


def _markdown_text(text: str) -> str:
    """The text on one line, with Markdown's special characters escaped."""
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"([\\`*\[\]|]|(?<!\w)_|_(?!\w))", r"\\\1", text)
    return text.replace("<", "&lt;")
