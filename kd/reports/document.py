"""A document of headings, text, tables and charts, written once and rendered as Markdown or as a page of HTML.

Everything in it is plain text; escaping is the renderers' business. The page needs nothing besides itself and is forbidden to
load anything: its content security policy allows inline styles, data URIs, and the one script whose digest it names.
"""

import base64
import hashlib
import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from audio_datasets.system.files import written_aside

# --- What a document is made of ----------------------------------------------------------------------------------------


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


# --- Markdown ----------------------------------------------------------------------------------------------------------


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
    return _printable("\n".join(lines))


def _printable(text: str) -> str:
    """Text with what is no Unicode (names of files in other bytes) and what steers a terminal written as escapes."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", lambda found: ascii(found[0])[1:-1], text)


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
    columns = [
        (heading, cells)
        for heading, cells in zip(table.headings, _columns(table), strict=True)
        if not any(isinstance(cell, Curve | Sound) for cell in cells)
    ]
    texts = [[_markdown_text(heading), *map(_markdown_cell, cells)] for heading, cells in columns]
    right = [_is_numeric(cells) for _, cells in columns]
    widths = [max(2, *map(len, column)) for column in texts]
    lines = []
    for row in zip(*texts, strict=True):
        cells = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ]
        lines.append(f"| {' | '.join(cells)} |")
    rule = ["-" * (width - 1) + (":" if to_right else "-") for width, to_right in zip(widths, right, strict=True)]
    return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[1:]])


def _markdown_cell(cell: Cell) -> str:
    return _markdown_text(cell if isinstance(cell, str) else cell.text)


def _markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"([\\`*\[\]|]|(?<!\w)_|_(?!\w))", r"\\\1", text)
    return text.replace("<", "&lt;")


def _columns(table: Table) -> list[tuple[Cell, ...]]:
    return list(zip(*table.rows, strict=True)) if table.rows else [()] * len(table.headings)


def _is_numeric(cells: Iterable[Cell]) -> bool:
    cells = list(cells)
    return bool(cells) and all(isinstance(cell, Number | Share) for cell in cells)


# --- HTML --------------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5d6670; --paper: #ffffff; --panel: #f5f7f9; --line: #dde2e7;
  --accent: #2f74c0; --bar: #2f74c033; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --soft: #9aa4ae; --paper: #15181c; --panel: #1e2328;
  --line: #343b43; --accent: #6fa8e8; --bar: #6fa8e840; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 62rem; color: var(--ink); background: var(--paper);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .75rem; padding-top: .6rem; border-top: 1px solid var(--line); }
p { margin: .6rem 0; max-width: 48rem; overflow-wrap: anywhere; }
a { color: var(--accent); }
.subtitle, figcaption, .note { color: var(--soft); }
.headline { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.5rem 0 1rem; }
.headline div { flex: 1 1 12rem; background: var(--panel); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem; }
.headline b { display: block; font-size: 1.55rem; line-height: 1.35; white-space: nowrap; font-weight: 650; font-variant-numeric: tabular-nums; }
.headline .name { font-weight: 600; }
.headline .note { font-size: .85rem; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; font-size: .92rem; }
figure { margin: 1rem 0 1.5rem; }
figure { overflow-x: auto; }
figure > svg { display: block; width: 100%; min-width: 30rem; height: auto; }
figure svg text { font-family: inherit !important; }
figcaption { font-size: .88rem; text-align: left; padding: .3rem 0; max-width: 48rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .28rem .7rem; border-bottom: 1px solid var(--line); vertical-align: middle;
  max-width: 26rem; overflow-wrap: break-word; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; overflow-wrap: normal; }
th.n, td.n { text-align: right; white-space: nowrap; }
th.sortable { cursor: pointer; } th.sortable:hover { color: var(--ink); }
th[aria-sort=ascending]::after { content: " ▲"; } th[aria-sort=descending]::after { content: " ▼"; }
td.share { background: linear-gradient(var(--bar), var(--bar)) no-repeat left center / var(--v) 72%; min-width: 6.5rem; }
td svg { display: block; width: 4.4rem; height: 1.5rem; } td svg path { fill: none; stroke: var(--accent); stroke-width: 1.2; }
td audio { display: block; width: 15rem; height: 2rem; }
.facts td:first-child { color: var(--soft); white-space: nowrap; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .9rem; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
details { margin: 1rem 0; } summary { cursor: pointer; color: var(--accent); }
@media print { nav { display: none; } body { max-width: none; } }
"""

# A click on a heading sorts its table. Without scripts the page lacks nothing else.
SCRIPT = """
for (const table of document.querySelectorAll("table.data")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const key = (row, at) => { const v = row.cells[at].dataset.v; return v === undefined ? row.cells[at].textContent : v === "" ? NaN : +v; };
  heads.forEach((head, at) => {
    if (head.dataset.fixed !== undefined || body.rows.length < 2) return;
    const sort = () => {
      const falling = head.getAttribute("aria-sort") === "descending" || (!head.hasAttribute("aria-sort") && !head.classList.contains("n"));
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", falling ? "ascending" : "descending");
      [...body.rows].sort((a, b) => {
        const x = key(a, at), y = key(b, at);
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
        return (falling ? 1 : -1) * (typeof x === "number" ? x - y : x.localeCompare(y));
      }).forEach(row => body.append(row));
    };
    head.classList.add("sortable");
    head.tabIndex = 0;
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
}
"""

_SCRIPT_DIGEST = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()

PAGE = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:; script-src 'sha256-{_SCRIPT_DIGEST}'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@title@</title>
<style>{STYLE}</style>
</head>
<body>
@body@
<script>{SCRIPT}</script>
</body>
</html>
"""


def to_html(document: Document) -> str:
    """The document as a page that stands by itself."""
    parts = [
        "<header>",
        f"<h1>{_escaped(document.title)}</h1>",
        f'<p class="subtitle">{_escaped(document.subtitle)}</p>',
        '<div class="headline">',
    ]
    for name, value, note in document.headline:
        parts.append(
            f'<div><span class="name">{_escaped(name)}</span><b>{_escaped(value)}</b>'
            f'<span class="note">{_escaped(note)}</span></div>'
        )
    parts += ["</div>", "</header>", "<nav>"]
    parts += [
        f'<a href="#section-{place}">{_escaped(section.title)}</a>' for place, section in enumerate(document.sections)
    ]
    parts += ["</nav>", "<main>"]
    for place, section in enumerate(document.sections):
        parts += [f'<section id="section-{place}">', f"<h2>{_escaped(section.title)}</h2>"]
        parts += [_html_block(block) for block in section.blocks]
        parts.append("</section>")
    parts.append("</main>")
    # Not str.replace one after the other: the title may hold the mark of the body.
    filled = {"@title@": _escaped(document.title), "@body@": "\n".join(parts)}
    return _printable(re.sub("@title@|@body@", lambda mark: filled[mark[0]], PAGE))


def _html_block(block: Block) -> str:
    match block:
        case Text(text):
            return f"<p>{_escaped(text)}</p>"
        case Code(text):
            return f"<pre><code>{_escaped(text)}</code></pre>"
        case Facts(items):
            rows = "".join(f"<tr><td>{_escaped(name)}</td><td>{_escaped(value)}</td></tr>" for name, value in items)
            return f'<figure class="wide"><table class="facts"><tbody>{rows}</tbody></table></figure>'
        case Chart(svg, caption, description):
            described = f" {_escaped(description)}" if description else ""
            return f"<figure>{svg}<figcaption>{_escaped(caption)}.{described}</figcaption></figure>"
        case Table():
            return _html_table(block)


def _html_table(table: Table) -> str:
    columns = _columns(table)
    heads = []
    for heading, cells in zip(table.headings, columns, strict=True):
        kind: Literal["", ' class="n"', " data-fixed"] = ' class="n"' if _is_numeric(cells) else ""
        if any(isinstance(cell, Curve | Sound) for cell in cells):
            kind = " data-fixed"
        heads.append(f'<th scope="col"{kind}>{_escaped(heading)}</th>')
    rows = [f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in table.rows]
    text = (
        f'<div class="wide"><table class="data"><thead><tr>{"".join(heads)}</tr></thead>\n'
        f"<tbody>{chr(10).join(rows)}</tbody></table></div>"
    )
    if table.folded:
        return f"<details><summary>{_escaped(table.caption)}</summary>{text}</details>"
    caption = f"<figcaption>{_escaped(table.caption)}</figcaption>" if table.caption else ""
    return f"<figure>{caption}{text}</figure>"


def _html_cell(cell: Cell) -> str:
    match cell:
        case str():
            return f"<td>{_escaped(cell).replace(' ± ', '&nbsp;±&nbsp;')}</td>"
        case Number(value, text):
            return f'<td class="n" data-v="{"" if math.isnan(value) else f"{value:.10g}"}">{_escaped(text)}</td>'
        case Share(value, text):
            length = 100 * min(max(value, 0.0), 1.0)
            return f'<td class="n share" style="--v:{length:.1f}%" data-v="{value:.10g}">{_escaped(text)}</td>'
        case Curve(values):
            return f"<td>{_small_curve(values)}</td>"
        case Sound(None):
            return "<td></td>"
        case Sound(mp3):
            data = base64.b64encode(mp3).decode()
            return f'<td><audio controls preload="metadata" src="data:audio/mpeg;base64,{data}"></audio></td>'


def _small_curve(values: Sequence[float]) -> str:
    """An SVG of 60 × 20 with the curve in it; empty where there is nothing to draw."""
    if not values or any(map(math.isnan, values)):
        return ""
    step = 60 / max(len(values) - 1, 1)
    points = " ".join(f"{place * step:.0f} {1 + 18 * (1 - value):.0f}" for place, value in enumerate(values))
    return f'<svg viewBox="0 0 60 20" aria-hidden="true"><path d="M{points}"/></svg>'


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file aside and renames it into place."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
