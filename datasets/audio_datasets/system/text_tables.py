"""Tables as text: aligned columns for a terminal, or a table of Markdown. The first row is the heading."""

from collections.abc import Sequence

Rows = Sequence[Sequence[str]]


def text_table(rows: Rows, align: str = "<>") -> str:
    """The rows with columns as wide as their longest cell, separated by two spaces.

    ``align`` has a ``<`` (left) or ``>`` (right) for each column; the last one also applies to all further columns.
    """
    return "\n".join("  ".join(cells).rstrip() for cells in _padded(rows, align))


def markdown_table(rows: Rows, align: str = "<>") -> str:
    """The rows as a GitHub-flavoured Markdown table, also aligned in the source. Cells must already be escaped."""
    heading, *others = _padded(rows, align, narrowest=2)
    right = _per_column(align, len(heading))
    rule = ["-" * (len(cell) - 1) + (":" if sign == ">" else "-") for cell, sign in zip(heading, right, strict=True)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heading, rule, *others))


def _padded(rows: Rows, align: str, narrowest: int = 0) -> list[list[str]]:
    widths = [max(narrowest, *map(len, column)) for column in zip(*rows, strict=True)]
    signs = _per_column(align, len(widths))
    return [
        [f"{cell:{sign}{width}}" for cell, sign, width in zip(row, signs, widths, strict=True)]  # width 0: no padding
        for row in rows
    ]


def _per_column(align: str, columns: int) -> str:
    return align[:columns].ljust(columns, align[-1])
