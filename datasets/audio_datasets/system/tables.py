"""Strict reading of tables in text files: a missing column or a ragged line is an error that names the file."""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from audio_datasets.system.paths.inputs import open_regular


def read_csv_rows(file: Path, required: Sequence[str], delimiter: str = ",") -> Iterator[tuple[int, dict[str, str]]]:
    """Yields (line number, row) for each row of a CSV file with a header.

    Raises:
        ValueError: a file that is not UTF-8, lacks a required column, or has a line of another length.
    """
    try:
        with open_regular(file) as content, io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text, strict=True, delimiter=delimiter)
            require_columns(file, required, list(reader.fieldnames or ()))
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"{file}, line {reader.line_num}: expected {len(reader.fieldnames)} columns")
                yield reader.line_num, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a CSV file in UTF-8: {error}") from error


def require_columns(file: Path, required: Sequence[str], found: list[str]) -> None:
    """Raises ValueError, with the columns found, unless a table has all required columns."""
    missing = [name for name in required if name not in found]
    if missing:
        raise ValueError(f"{file} lacks the columns {missing}; found {found}")


def no_formulas(row: Sequence[Any]) -> list[Any]:
    """A row for a CSV file: a text that spreadsheets would run as a formula, such as ``=1+1`` or ``@name``, gets a quote in front."""
    return [f"'{cell}" if isinstance(cell, str) and _is_formula(cell) else cell for cell in row]


def _is_formula(cell: str) -> bool:
    if not cell.startswith(("=", "+", "-", "@", "\t", "\r")):
        return False
    try:
        float(cell)
        return False
    except ValueError:
        return True


def whole_number(value: Any, where: str) -> int | None:
    """A cell as a whole number; None if it is empty. Tables often store whole numbers as floats, with NaN for empty cells."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    try:
        number = float(value)
        if number != int(number):
            raise ValueError
        return int(number)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{where} must be a whole number; found {value!r}") from None
