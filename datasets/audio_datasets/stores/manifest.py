"""The manifest of a clip store: what is known of each clip besides audio and targets, as Parquet beside the store."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from audio_datasets.system.files import written_aside

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
ADDED_LATER = ("device",)
"""Columns that manifests of earlier versions lack; read as empty there."""


@dataclass(frozen=True)
class ManifestRow:
    """What the manifest says about one clip. None where it is not known."""

    clip_id: str
    source: str | None = None
    """Where the clip came from, as its source names it."""
    labels: Sequence[str] = ()
    """Class names, as in the store's targets."""
    source_labels: Sequence[str] = ()
    """Labels as the source has them, before a label map."""
    split: str | None = None
    fold: int | None = None
    group: str | None = None
    """Clips of one group, for example of one recording, belong on the same side of a split."""
    device: str | None = None
    """What the clip was recorded with."""
    duration_seconds: float | None = None
    sample_rate_hz: int | None = None
    """Rate of the source, in Hz; the store may hold another."""
    channels: int | None = None
    """Channels of the source."""


def manifest_path(store_path: str | Path) -> Path:
    """``clips.h5`` -> ``clips.parquet``."""
    return Path(store_path).with_suffix(".parquet")


def write_manifest(path: Path, rows: Sequence[ManifestRow]) -> None:
    """Writes a manifest, one row per clip in the order of the store; aside, then renamed."""
    table = pyarrow.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA)
    with written_aside(path) as aside:
        pyarrow.parquet.write_table(table, aside)


def read_manifest(store_path: str | Path, columns: Sequence[str] | None = None) -> pyarrow.Table | None:
    """The manifest beside the store at ``store_path``, or None if there is none; only ``columns`` if they are given.

    Raises ValueError, with the path, for a file that is damaged or lacks a column.
    """
    path = manifest_path(store_path)
    if not path.exists():
        return None
    there = _column_names(path)
    missing = [name for name in SCHEMA.names if name not in there and name not in ADDED_LATER]
    if missing:
        raise ValueError(f"{path} is no manifest of a clip store: it lacks {missing}; found {there}")
    needed = SCHEMA if columns is None else pyarrow.schema([SCHEMA.field(name) for name in columns])
    table = read_parquet(path, None if columns is None else [name for name in columns if name in there])
    for name in ADDED_LATER:
        if name in needed.names and name not in there:
            table = table.append_column(needed.field(name), pyarrow.nulls(len(table), needed.field(name).type))
    try:
        # Only what our types can hold: a fold that is text would be compared with numbers, and never be equal.
        return table.select(needed.names).cast(needed)
    except (pyarrow.ArrowException, ValueError) as error:
        raise ValueError(f"{path} is no manifest of a clip store: a column has another type: {error}") from error


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pyarrow.Table:
    """A Parquet file, or those of the columns that it has, with every value checked.

    Raises ValueError, with the path, if it is damaged or holds no UTF-8.
    """
    with _plain_errors(path):
        table = pyarrow.parquet.read_table(path, partitioning=None, columns=None if columns is None else list(columns))
        table.validate(full=True)
        return table


def _column_names(path: Path) -> list[str]:
    with _plain_errors(path):
        return pyarrow.parquet.read_schema(path).names


@contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a Parquet file, or a damaged one: {error}") from error


class HasManifest(Protocol):
    """A clip store, or several read as one."""

    @property
    def path(self) -> Path | str: ...
    def __len__(self) -> int: ...
    def manifest(self, columns: Sequence[str] | None = None) -> pyarrow.Table | None: ...


def select_rows(store: HasManifest, split: str | None = None, folds: Sequence[int] | None = None) -> np.ndarray:
    """The rows of ``store`` in one split and in any of some folds, int64 ascending; None selects all.

    Raises ValueError that lists what there is, if the store has no manifest, or no clip of that split or of one of the
    folds.
    """
    if split is None and folds is None:
        return np.arange(len(store), dtype=np.int64)
    table = store.manifest(["split", "fold"])
    if table is None:
        raise ValueError(
            f"{store.path} has no manifest ({manifest_path(store.path).name} beside it), so no splits or folds to choose"
        )
    selected = np.ones(len(store), dtype=bool)
    for what, wanted in (("split", None if split is None else [split]), ("fold", folds)):
        if wanted is not None:
            selected &= _is_any_of(table.column(what), what, list(wanted), str(store.path))
    if not selected.any():
        raise ValueError(f"{store.path} has no clip that is in split {split!r} and in folds {list(folds or [])}")
    return np.flatnonzero(selected).astype(np.int64)


def _is_any_of(column: pyarrow.ChunkedArray, what: str, wanted: list, path: str) -> np.ndarray:
    """bool (n,): whether a clip's value is one of those wanted; ValueError if no clip has one of them."""
    there = sorted(value for value in column.unique().to_pylist() if value is not None)
    absent = [value for value in wanted if value not in there]
    if absent or not wanted:
        raise ValueError(f"{path} has no clip of {what} {absent}; its {what}s are {there}")
    found = pyarrow.compute.is_in(column, value_set=pyarrow.array(wanted, type=column.type))
    return found.to_numpy(zero_copy_only=False)
