"""The manifest of a clip store: everything about each clip except audio and targets, in a Parquet file beside the store."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from audio_datasets.audio.heard import Heard
from audio_datasets.system.files import written_aside
from audio_datasets.system.paths.inputs import require_regular
from audio_datasets.system.paths.sizes import require_room

SCHEMA = pyarrow.schema(
    [
        pyarrow.field("clip_id", pyarrow.string(), nullable=False),
        pyarrow.field("source", pyarrow.string()),
        pyarrow.field("labels", pyarrow.list_(pyarrow.string())),
        pyarrow.field("source_labels", pyarrow.list_(pyarrow.string())),
        pyarrow.field("split", pyarrow.string()),
        pyarrow.field("fold", pyarrow.int32()),
        pyarrow.field("group", pyarrow.string()),
        pyarrow.field("device", pyarrow.string()),
        pyarrow.field("duration_seconds", pyarrow.float64()),
        pyarrow.field("sample_rate_hz", pyarrow.int32()),
        pyarrow.field("channels", pyarrow.int32()),
    ]
)
ROWS_AT_ONCE = 8_192
BYTES_OF_VALUE = 8
"""The least that a value takes in memory; text and lists take more."""
ADDED_LATER = ("device",)
"""Columns that older manifests do not have; they are read as empty."""


@dataclass(frozen=True)
class ManifestRow:
    """A clip's row in the manifest. None for unknown values."""

    clip_id: str
    source: str | None = None
    """The path of the clip in its source."""
    labels: Sequence[str] = ()
    """Class names, as in the store's targets."""
    source_labels: Sequence[str] = ()
    """Labels in the source, before a label map."""
    split: str | None = None
    fold: int | None = None
    group: str | None = None
    """Clips of one group, for example of one recording, belong on the same side of a split."""
    device: str | None = None
    """The recording device."""
    duration_seconds: float | None = None
    sample_rate_hz: int | None = None
    """Sample rate of the source, in Hz; that of the store may differ."""
    channels: int | None = None
    """Channels of the source."""


def manifest_path(store_path: str | Path) -> Path:
    """``clips.h5`` -> ``clips.parquet``."""
    return Path(store_path).with_suffix(".parquet")


def write_manifest(path: Path, rows: Sequence[ManifestRow]) -> None:
    """Writes a manifest, one row per clip in the order of the store, under a temporary name that is then renamed."""
    table = pyarrow.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA)
    with written_aside(path) as aside:
        pyarrow.parquet.write_table(table, aside)


def read_manifest(store_path: str | Path, columns: Sequence[str] | None = None) -> pyarrow.Table | None:
    """The manifest beside the store at ``store_path``, or None if there is none. Reads only ``columns`` if they are given.

    Raises ValueError, with the path, for a file that is damaged or lacks a column.
    """
    path = manifest_path(store_path)
    if not path.exists():
        return None
    there = _column_names(path)
    missing = [name for name in SCHEMA.names if name not in there and name not in ADDED_LATER]
    if missing:
        raise ValueError(f"{path} is not the manifest of a clip store: columns {missing} are missing; found {there}")
    needed = SCHEMA if columns is None else pyarrow.schema([SCHEMA.field(name) for name in columns])
    table = read_parquet(path, None if columns is None else [name for name in columns if name in there])
    for name in ADDED_LATER:
        if name in needed.names and name not in there:
            table = table.append_column(needed.field(name), pyarrow.nulls(len(table), needed.field(name).type))
    try:
        # Cast to our types: a fold stored as text would never equal a number.
        return table.select(needed.names).cast(needed)
    except (pyarrow.ArrowException, ValueError) as error:
        raise ValueError(f"{path} is not the manifest of a clip store: a column has the wrong type: {error}") from error


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pyarrow.Table:
    """A Parquet file, optionally only some columns, with every value checked.

    Raises ValueError, with the path, if it is damaged, contains text that is not UTF-8, or would take far more memory than it
    takes on the disk: a value that is repeated 10^9 times takes a few bytes.
    """
    with _plain_errors(path):
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
        texts = [field.name for field in schema if pyarrow.types.is_string(field.type)]
        # Text as it is stored, each different one once, so that its size is known before it is written out.
        with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
            _require_few_values(path, file)
            found, rows, size = [], 0, 0
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=None if columns is None else list(columns)):
                rows, size = rows + len(batch), size + sum(map(_bytes_of, batch.columns))
                require_room(path, size, f"its first {rows:,} rows")
                found.append([column.cast(_plain_type(column.type)) for column in batch.columns])
                names = batch.schema.names
        names = names if found else [name for name in schema.names if columns is None or name in columns]
        plain = pyarrow.schema([schema.field(name).with_type(_plain_type(schema.field(name).type)) for name in names])
        table = pyarrow.Table.from_batches([pyarrow.record_batch(arrays, schema=plain) for arrays in found], plain)
        table.validate(full=True)
        return table


def _require_few_values(path: Path, file: pyarrow.parquet.ParquetFile) -> None:
    groups = (file.metadata.row_group(index) for index in range(file.metadata.num_row_groups))
    values = sum(group.column(index).num_values for group in groups for index in range(group.num_columns))
    require_room(path, values * BYTES_OF_VALUE, f"its {values:,} values")


def _plain_type(kind: pyarrow.DataType) -> pyarrow.DataType:
    return kind.value_type if pyarrow.types.is_dictionary(kind) else kind


def _bytes_of(column: pyarrow.Array) -> int:
    """Bytes of a column, with the texts of a dictionary counted as often as they occur."""
    if not pyarrow.types.is_dictionary(column.type):
        return column.nbytes
    lengths = pyarrow.compute.binary_length(column.dictionary)
    return (pyarrow.compute.sum(lengths.take(column.indices)).as_py() or 0) + 4 * len(column)


def _column_names(path: Path) -> list[str]:
    with _plain_errors(path):
        return pyarrow.parquet.read_schema(path).names


@contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    require_regular(path)
    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, ValueError) and str(error).startswith(f"{path}: "):
            raise  # one of our own
        raise ValueError(f"{path} is damaged or not a Parquet file: {error}") from error


class HasManifest(Protocol):
    """A clip store, or several joined."""

    @property
    def path(self) -> Path | str: ...
    def __len__(self) -> int: ...
    def manifest(self, columns: Sequence[str] | None = None) -> pyarrow.Table | None: ...


def heard_of(paths: Sequence[str | Path], seconds: float, rows: np.ndarray | None = None) -> Heard:
    """How much is heard of clip stores, one after the other, if it is the first ``seconds`` of each clip.

    Args:
        rows: only these clips, int64; None: all.

    Returns:
        What the manifests tell; without one beside each store the lengths are not known, and no clip is counted.
    """
    durations = []
    for path in paths:
        table = read_manifest(path, ["duration_seconds"])
        if table is None:
            return Heard()
        durations.append(table.column("duration_seconds").to_numpy(zero_copy_only=False).astype(float))
    known = np.concatenate(durations)
    known = known if rows is None else known[rows]
    return Heard.of_beginnings(known[np.isfinite(known)], seconds)


def select_rows(store: HasManifest, split: str | None = None, folds: Sequence[int] | None = None) -> np.ndarray:
    """The rows of ``store`` in the given split and folds, int64 ascending; None selects all.

    Raises ValueError if the store has no manifest, or no clip in the split or in one of the folds; the message lists the
    existing ones.
    """
    if split is None and folds is None:
        return np.arange(len(store), dtype=np.int64)
    table = store.manifest(["split", "fold"])
    if table is None:
        raise ValueError(
            f"{store.path} has no manifest ({manifest_path(store.path).name} beside it), so splits and folds cannot be selected"
        )
    selected = np.ones(len(store), dtype=bool)
    for what, wanted in (("split", None if split is None else [split]), ("fold", folds)):
        if wanted is not None:
            selected &= _is_any_of(table.column(what), what, list(wanted), str(store.path))
    if not selected.any():
        raise ValueError(f"{store.path} has no clip that is both in split {split!r} and in folds {list(folds or [])}")
    return np.flatnonzero(selected).astype(np.int64)


def _is_any_of(column: pyarrow.ChunkedArray, what: str, wanted: list, path: str) -> np.ndarray:
    """bool (n,): whether a clip has one of the wanted values; ValueError for values that no clip has."""
    there = sorted(value for value in column.unique().to_pylist() if value is not None)
    absent = [value for value in wanted if value not in there]
    if absent or not wanted:
        raise ValueError(f"{path} has no clip in {what} {absent}; its {what}s are {there}")
    found = pyarrow.compute.is_in(column, value_set=pyarrow.array(wanted, type=column.type))
    return found.to_numpy(zero_copy_only=False)
