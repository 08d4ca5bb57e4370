"""The manifest of a clip store: what is known of each clip besides audio and targets, as Parquet beside the store."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from audio_datasets.system.files import written_aside

if TYPE_CHECKING:
    from audio_datasets.stores.clip_store import ClipStore

SCHEMA = pyarrow.schema(
    [
        pyarrow.field("clip_id", pyarrow.string(), nullable=False),
        pyarrow.field("source", pyarrow.string()),
        pyarrow.field("labels", pyarrow.list_(pyarrow.string())),
        pyarrow.field("source_labels", pyarrow.list_(pyarrow.string())),
        pyarrow.field("split", pyarrow.string()),
        pyarrow.field("fold", pyarrow.int32()),
        pyarrow.field("group", pyarrow.string()),
        pyarrow.field("duration_seconds", pyarrow.float64()),
        pyarrow.field("sample_rate_hz", pyarrow.int32()),
        pyarrow.field("channels", pyarrow.int32()),
    ]
)


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
    table = read_parquet(path, columns)
    needed = SCHEMA if columns is None else pyarrow.schema([SCHEMA.field(name) for name in columns])
    there = pyarrow.parquet.read_schema(path).names
    missing = [name for name in SCHEMA.names if name not in there]
    if missing:
        raise ValueError(f"{path} is no manifest of a clip store: it lacks {missing}; found {there}")
    try:
        # Only what our types can hold: a fold that is text would be compared with numbers, and never be equal.
        return table.select(needed.names).cast(needed)
    except (pyarrow.ArrowException, ValueError) as error:
        raise ValueError(f"{path} is no manifest of a clip store: a column has another type: {error}") from error


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pyarrow.Table:
    """A Parquet file, or those of the columns that it has, with every value checked.

    Raises ValueError, with the path, if it is damaged or holds no UTF-8.
    """
    try:
        table = pyarrow.parquet.read_table(path, partitioning=None, columns=None if columns is None else list(columns))
        table.validate(full=True)
        return table
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a Parquet file, or a damaged one: {error}") from error


def select_rows(store: "ClipStore", split: str | None = None, folds: Sequence[int] | None = None) -> np.ndarray:
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
            selected &= _is_any_of(table.column(what), what, list(wanted), store.path)
    if not selected.any():
        raise ValueError(f"{store.path} has no clip that is in split {split!r} and in folds {list(folds or [])}")
    return np.flatnonzero(selected).astype(np.int64)


def _is_any_of(column: pyarrow.ChunkedArray, what: str, wanted: list, path: Path) -> np.ndarray:
    """bool (n,): whether a clip's value is one of those wanted; ValueError if no clip has one of them."""
    there = sorted(value for value in column.unique().to_pylist() if value is not None)
    absent = [value for value in wanted if value not in there]
    if absent or not wanted:
        raise ValueError(f"{path} has no clip of {what} {absent}; its {what}s are {there}")
    found = pyarrow.compute.is_in(column, value_set=pyarrow.array(wanted, type=column.type))
    return found.to_numpy(zero_copy_only=False)
