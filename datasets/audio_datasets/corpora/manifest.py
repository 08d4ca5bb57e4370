"""The user's own sounds in a list of files: CSV or Parquet."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from audio_datasets.stores.manifest import read_parquet
from audio_datasets.system.files import written_aside
from audio_datasets.system.tables import read_csv_rows, require_columns, whole_number
from audio_datasets.tasks.listing import Clip, Listing
from audio_datasets.tasks.own_sounds import NONE_OF_THEM, UNKNOWN_LABELS, for_training, note_on_unlabelled
from audio_datasets.tasks.task import Task

LABEL_SEPARATOR = ";"


def read(file: Path) -> Listing:
    """A CSV or Parquet file with the columns ``clip_id``, ``path``, ``labels`` and perhaps ``split``, ``fold``, ``group``, ``device``.

    Paths are relative to the manifest. Labels are separated by ``;`` (in Parquet also a list). An empty cell, or the word
    ``(unknown)``, says that the labels are unknown; ``(none)`` says that the clip has none of the classes.
    """
    suffix = file.suffix.lower()
    if not file.is_file() or suffix not in (".csv", ".parquet"):
        raise ValueError(f"a manifest is a .csv or .parquet file; found {file}")
    required = ("clip_id", "path", "labels")
    rows = read_csv_rows(file, required) if suffix == ".csv" else _parquet_rows(file, required)
    clips = []
    for line, row in rows:
        where = f"{file}, row {line}"
        clip_id, path = (_required_text(row[name], f"{where}: {name}") for name in ("clip_id", "path"))
        labels = _labels(row["labels"], where)
        clips.append(
            Clip(
                clip_id=clip_id,
                path=file.parent / path,
                source=path,
                labels=() if labels is None else labels,
                known=() if labels is None else None,
                split=_text(row.get("split"), f"{where}: split"),
                fold=whole_number(row.get("fold"), f"{where}: fold"),
                group=_text(row.get("group"), f"{where}: group"),
                device=_text(row.get("device"), f"{where}: device"),
            )
        )
    listing = Listing(tuple(sorted({label for clip in clips for label in clip.labels})), tuple(clips))
    return replace(listing, notes=note_on_unlabelled(listing))


def write_manifest(file: Path, clips: Sequence[Clip]) -> None:
    """Writes clips as a Parquet manifest with absolute paths, which ``read`` reads; the file appears by a rename.

    Raises:
        ValueError: a clip whose labels are known only in part, or that has no file of its own: a manifest cannot say that.
    """
    columns: dict[str, list[Any]] = {
        name: [] for name in ("clip_id", "path", "labels", "split", "fold", "group", "device")
    }
    for clip in clips:
        if clip.row is not None:
            raise ValueError(f"clip {clip.clip_id!r} has no audio file of its own but is a row of {clip.path}")
        if clip.known:
            raise ValueError(f"clip {clip.clip_id!r}: a manifest cannot say that only some of its labels are known")
        labels = list(clip.labels) or [NONE_OF_THEM]
        values = (clip.clip_id, str(clip.path.absolute()), labels if clip.is_labelled else [UNKNOWN_LABELS])
        for name, value in zip(columns, (*values, clip.split, clip.fold, clip.group, clip.device), strict=True):
            columns[name].append(value)
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(file) as aside:
        pq.write_table(
            pa.table({name: values for name, values in columns.items() if any(v is not None for v in values)}), aside
        )


def _parquet_rows(file: Path, required: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, row) of a Parquet file."""
    table = read_parquet(file)
    require_columns(file, required, table.column_names)
    number = 0
    for batch in table.to_batches():
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _labels(value: Any, where: str) -> tuple[str, ...] | None:
    """The labels in a cell, () for "none of the classes", None if they are unknown."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str):
        value = value.split(LABEL_SEPARATOR)
    if not isinstance(value, list) or not all(isinstance(label, str) for label in value):
        raise ValueError(f"{where}: labels must be text, separated by {LABEL_SEPARATOR!r}, or a list; found {value!r}")
    stripped = (label.strip() for label in value)
    labels = tuple(dict.fromkeys(label for label in stripped if label))
    for word in (UNKNOWN_LABELS, NONE_OF_THEM):
        if word in labels and len(labels) > 1:
            raise ValueError(f"{where}: {word} stands in place of labels, not beside them; found {', '.join(labels)}")
    if labels == (NONE_OF_THEM,):
        return ()
    return None if labels in ((), (UNKNOWN_LABELS,)) else labels


def _required_text(value: Any, where: str) -> str:
    """A clip id or a path. ValueError for anything but text: bytes or a float would become a name that nobody meant."""
    text = str(value) if type(value) is int else value
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError(f"{where} must be text and not empty; found {value!r}")
    return text


def _text(value: Any, where: str) -> str | None:
    """A split or group, which may be a number; None where there is none."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str | int | float):
        raise ValueError(f"{where} must be text or a number; found {value!r}")
    return str(value)


MANIFEST = Task(
    name="manifest",
    title="own sounds, listed",
    source="your own recordings",
    licence="yours",
    layout="a CSV or Parquet file with the columns clip_id, path, labels (separated by ';'; empty: unknown; (none): none of the "
    "classes) and perhaps split, fold, group, device",
    read=read,
    recognises=Path.is_file,
    is_fallback=True,
    for_training=for_training,
)
