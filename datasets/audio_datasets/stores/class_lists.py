"""Lists of class names, and maps from one data set's labels to another's class names."""

import csv
import io
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import NoReturn

from audio_datasets.stores.names import is_writable, normal
from audio_datasets.system.files import parse_json, read_text
from audio_datasets.system.messages import brief, listed

BUILTIN_LABEL_MAPS = ("esc50_to_audioset",)
LINE_END = re.compile(r"\r\n|\r|\n")
"""We do not use ``splitlines``, which also splits at characters that no editor shows as the end of a line."""


def check_class_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """``class_names`` as a tuple; ValueError if there are none, or one is empty, not text, or repeated."""
    names = tuple(class_names)
    if not names:
        raise ValueError("the class list is empty")
    wrong = [name for name in names if not isinstance(name, str) or not name.strip() or not is_writable(name)]
    if wrong:
        raise ValueError(f"a class name must be text (in Unicode) and not empty; found {brief(wrong[0])}")
    seen: set[str] = set()
    repeated = [name for name in names if normal(name) in seen or seen.add(normal(name))]
    if repeated:
        raise ValueError(f"class names must be unique; found more than once: {listed(repeated)}")
    return names


def class_list_difference(
    first: Sequence[str], second: Sequence[str], first_name: str = "one", second_name: str = "the other"
) -> str | None:
    """The first difference between two class lists, as text for a message; None if they are the same in any Unicode form."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other and normal(one) != normal(other):
            return f"class {index} is {brief(one)} in {first_name} and {brief(other)} in {second_name}"
    if len(first) != len(second):
        return f"{len(first)} classes in {first_name} and {len(second)} in {second_name}"
    return None


def check_same_classes(first: Sequence[str], second: Sequence[str], first_name: str, second_name: str) -> None:
    """Raises ValueError with the first difference unless both class lists have the same names in the same order."""
    difference = class_list_difference(first, second, first_name, second_name)
    if difference:
        raise ValueError(f"class lists differ: {difference}")


def read_class_names(path: Path) -> tuple[str, ...]:
    """The class names of a file, in the order of their index and in Unicode's form C.

    Three kinds of files are supported: AudioSet's ``class_labels_indices.csv`` (columns ``index``, ``mid``,
    ``display_name``), which is recognised by its header whatever the file is called, JSON (a list of names, or an object of name
    -> index), and plain text with one name per line.

    Raises ValueError, with the path, for a missing file, a name that is there twice, indices that are not 0, 1, 2 …, or a line
    with more or fewer fields than the header.
    """
    path = Path(path)
    text = read_text(path)
    try:
        if path.suffix.lower() == ".json":
            names = check_class_names(_names_from_json(text))
        elif path.suffix.lower() == ".csv" or _is_audiosets(text):
            names = _names_from_csv(text)
        else:
            names = [line.strip() for line in LINE_END.split(text) if line.strip()]
        return tuple(map(normal, check_class_names(names)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _is_audiosets(text: str) -> bool:
    """Whether a text starts with the header of AudioSet's class list."""
    header = next(csv.reader([LINE_END.split(text, maxsplit=1)[0]]), [])
    return {"index", "display_name"} <= {name.strip() for name in header}


def _names_from_json(text: str) -> list[str]:
    content = parse_json(text)
    if isinstance(content, list):
        return content
    if isinstance(content, dict) and all(type(index) is int for index in content.values()):
        return _in_order_of_index(list(content.items()))
    raise ValueError("a JSON class list must be a list of names, or an object of name -> index")


def _names_from_csv(text: str) -> list[str]:
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    pairs = []
    try:
        missing = {"index", "display_name"} - set(rows.fieldnames or ())
        if missing:
            raise ValueError(
                f"no column {sorted(missing)}; found {rows.fieldnames} (expected: index, mid, display_name)"
            )
        for row in rows:
            if None in row or None in row.values():
                _refuse_ragged(row, rows)
            pairs.append((row["display_name"], _index(row["index"], rows.line_num)))
    except csv.Error as error:
        raise ValueError(f"line {rows.line_num}: {error}") from error
    return _in_order_of_index(pairs)


def _refuse_ragged(row: dict, rows: csv.DictReader) -> NoReturn:
    """Raises ValueError for a line with another number of fields than the header, such as an unquoted name with a comma."""
    extra = row.get(None, [])
    fields = [value for name, value in row.items() if name is not None and value is not None]
    found = f"line {rows.line_num} has {len(fields) + len(extra)} fields, the header has {len(rows.fieldnames)}"
    if extra:
        name = ",".join([fields[-1], *extra])
        raise ValueError(f'{found}: a name with a comma must be in quotes, as in "{brief(name)[1:-1]}"')
    raise ValueError(f"{found}: too few columns")


def _index(text: str, line: int) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"line {line}: an index must be a whole number; found {brief(text)}") from None


def _in_order_of_index(pairs: list[tuple[str, int]]) -> list[str]:
    pairs = sorted(pairs, key=lambda pair: pair[1])
    indices = [index for _, index in pairs]
    if indices != list(range(len(pairs))):
        raise ValueError(
            f"class indices must be 0 to {len(pairs) - 1}, each once; found {indices[:5]} … {indices[-1:]}"
        )
    return [name for name, _ in pairs]


def read_label_map(name_or_path: str | Path) -> dict[str, tuple[str, ...]]:
    """A map from source labels to class names; a label may have several.

    ``name_or_path`` is the name of a map that comes with the package (``esc50_to_audioset``) or a CSV file with two
    columns, label and class name, one row per pair; the first row is the header.

    Raises ValueError for an unknown name, a missing file, or a row without two entries.
    """
    if str(name_or_path) in BUILTIN_LABEL_MAPS:
        resource = resources.files("audio_datasets").joinpath("label_maps", f"{name_or_path}.csv")
        return _label_map(resource.read_text(encoding="utf-8"), str(name_or_path))
    path = Path(name_or_path)
    if not path.exists():
        raise ValueError(f"label map {path} is neither a file nor one of {list(BUILTIN_LABEL_MAPS)}")
    return _label_map(read_text(path), str(path))


def _label_map(text: str, origin: str) -> dict[str, tuple[str, ...]]:
    label_map: dict[str, tuple[str, ...]] = {}
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        next(rows, None)
        for row in rows:
            if not row:
                continue
            if len(row) != 2 or not row[0].strip() or not row[1].strip():
                raise ValueError(f"{origin}, line {rows.line_num}: expected a label and a class name; found {row}")
            label, class_name = normal(row[0].strip()), normal(row[1].strip())
            if class_name in label_map.get(label, ()):
                raise ValueError(f"{origin}, line {rows.line_num}: {label!r} -> {class_name!r} occurs twice")
            label_map[label] = (*label_map.get(label, ()), class_name)
    except csv.Error as error:
        raise ValueError(f"{origin}, line {rows.line_num}: {error}") from error
    if not label_map:
        raise ValueError(f"label map {origin} is empty")
    return label_map
