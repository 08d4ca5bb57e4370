"""``kd import-logits``: published predictions – an array of logits, and which row is which file – into a logit store.

The public predictions of the PaSST ensemble for AudioSet are such a pair: an array ``(clips, 527)`` as ``.npy`` and a pickled
dict of file name -> row. docs/published_logits.md shows how they are used.

Shapes: R rows of the array, n clips that are imported, C classes.
"""

import csv
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np

from audio_datasets.audio.codec import AUDIO_SUFFIXES
from audio_datasets.stores.class_lists import is_writable, read_class_names
from audio_datasets.stores.hdf5_arrays import encode_ids, find_ids, id_order
from audio_datasets.stores.joined import AnyClips, open_clips
from audio_datasets.system.command import parse, progress, run_command
from audio_datasets.system.messages import brief, listed
from audio_datasets.system.plain_pickle import read_plain_pickle
from teacher_logits.store import DIGEST_BYTES, LogitStore, to_float16, write_logit_store

ROWS_PER_BLOCK = 4096
IDS_AT_ONCE = 65_536
BYTES_AT_ONCE = 16 * 2**20
# Suffixes of files that predictions are made for; a dot in a name may also be part of it.
FILE_SUFFIXES = AUDIO_SUFFIXES | {".m4a", ".mp4", ".webm"}
# Probabilities of 0 and 1 have no finite logit; these limits are about ±16.
SMALLEST_PROBABILITY = 1e-7


@dataclass(frozen=True)
class ImportConfig:
    """Put published predictions (an array, and a list of file names) into a logit store."""

    logits: Path
    """The array: .npy with one row per clip and one column per class. Read in blocks, never as a whole."""
    index: Path
    """Which row is which file: file name -> row number, as a pickled dict (read without executing anything), JSON or CSV."""
    out: Path
    """The logit store to write."""
    class_names: Path | None = None
    """What the columns mean: AudioSet's class_labels_indices.csv, JSON, or one name a line; else as in --clips."""
    clips: tuple[Path, ...] = ()
    """Clip stores that the logits are for. Their ids are taken over, and clips that they do not have are left out."""
    ids: Literal["stem", "name"] = "stem"
    """Names are compared without folder and suffix, as 00/Yxxxxxxxxxxx.mp3 and Yxxxxxxxxxxx; or as they are."""
    probabilities: bool = False
    """The array holds probabilities; their logits are stored."""
    teacher_name: str | None = None
    """Name of the teacher; the array's file name if left out."""
    overwrite: bool = False
    """Replace a logit store that is already there."""

    def __post_init__(self) -> None:
        if self.class_names is None and not self.clips:
            raise ValueError("say what the columns mean: give --class-names or --clips")


def import_logits(config: ImportConfig) -> LogitStore:
    """Writes the logit store and prints what it covers.

    Raises ValueError for an array of another kind or shape, an index that does not fit it, names that are not unique, values
    that are no logits, and an existing store.
    """
    if config.out.exists() and not config.overwrite:
        raise ValueError(f"{config.out} exists; replace it with --overwrite, or choose another --out")
    class_names = read_class_names(config.class_names) if config.class_names else None
    clips = open_clips(config.clips, class_names) if config.clips else None
    class_names = class_names or clips.class_names
    array = open_array(config.logits, len(class_names))
    names, rows = read_index(config.index, len(array))
    print(f"{config.logits}: {array.shape[0]} rows × {array.shape[1]} classes, {len(names)} of them named")
    if clips is None:
        ids = [_stem(name) for name in names] if config.ids == "stem" else names
    else:
        ids, rows = match_clips(clips, names, rows, by_stem=config.ids == "stem")
    by_row = np.argsort(rows, kind="stable")  # so that the array is read from its beginning to its end
    ids, rows = [ids[index] for index in by_row], rows[by_row]
    write_logit_store(
        config.out,
        clip_ids=ids,
        audio_digests=np.zeros((len(ids), DIGEST_BYTES), dtype=np.uint8),
        logit_blocks=_blocks(rows, ids, config),
        class_names=class_names,
        teacher=describe_teacher(config),
        clip_store_fingerprint=clips.fingerprint if clips is not None else "unknown",
    )
    print(f"{config.out} written: {len(ids)} clips × {len(class_names)} classes")
    return LogitStore.open(config.out)


def describe_teacher(config: ImportConfig) -> dict[str, Any]:
    """What the store keeps of a teacher of whom only the predictions are known; their bytes are its fingerprint."""
    state = blake2b(digest_size=16)
    with (
        open(config.logits, "rb") as file,
        progress(total=os.path.getsize(config.logits), desc="fingerprint", unit="B", unit_scale=True) as bar,
    ):
        while block := file.read(BYTES_AT_ONCE):
            state.update(block)
            bar.update(len(block))
    return {
        "name": config.teacher_name or config.logits.stem,
        "fingerprint": state.hexdigest(),
        "imported_from": config.logits.name,
        "values": "probabilities" if config.probabilities else "logits",
    }


def open_array(path: Path, num_classes: int) -> np.ndarray:
    """The array (R, C) in an ``.npy`` file, memory-mapped. ValueError for another kind, type or number of columns."""
    if not path.exists():
        raise ValueError(f"no such file: {path}")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # of a damaged header, whatever Python's tokenizer and parser raise
        raise ValueError(f"{path} is not an .npy file with an array of numbers: {error}") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f":
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive (.npz)"
        raise ValueError(f"{path} must hold floating-point numbers (clips, classes); found {found}")
    if array.shape[1] != num_classes:
        raise ValueError(f"{path} has {array.shape[1]} columns; the class list has {num_classes} names")
    return array


def read_index(path: Path, num_rows: int) -> tuple[list[str], np.ndarray]:
    """File names and their rows int64 (k,), as the index gives them.

    A pickled dict (any suffix but those two), a JSON object, or a CSV file of name and row, with or without a header.
    Raises ValueError, with the path, for another content, a name or a row that is there twice, and a row that the array
    does not have.
    """
    if not path.exists():
        raise ValueError(f"no such file: {path}")
    suffix = path.suffix.lower()
    if suffix in (".json", ".csv"):
        try:
            text = path.read_text(encoding="utf-8-sig")
            pairs = _json_pairs(text) if suffix == ".json" else _csv_pairs(text)
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path}: {error}") from error
    else:
        content = read_plain_pickle(path)
        if not isinstance(content, dict):
            raise ValueError(f"{path} must hold a dict of file name -> row; found a {type(content).__name__}")
        pairs = list(content.items())
    if not pairs:
        raise ValueError(f"{path} names no rows")
    names = [name.decode("utf-8", errors="replace") if isinstance(name, bytes) else name for name, _ in pairs]
    for name, (_, row) in zip(names, pairs, strict=True):
        if not isinstance(name, str) or type(row) is not int:
            raise ValueError(f"{path} must map file names to row numbers; found {brief(name)}: {brief(row)}")
        if "\0" in name or not _stem(name) or not is_writable(name):
            raise ValueError(f"{path} names a row {brief(name)}, which is no name of a file")
        if not 0 <= row < num_rows:
            raise ValueError(f"{path} gives {brief(name)} the row {brief(row)}; the array has rows 0 to {num_rows - 1}")
    rows = np.fromiter((row for _, row in pairs), dtype=np.int64, count=len(pairs))
    _refuse_repeated(names, path, "a name")
    order = np.argsort(rows, kind="stable")
    twice = np.flatnonzero(np.diff(rows[order]) == 0)
    if len(twice):
        first, second = (names[order[twice[0] + offset]] for offset in (0, 1))
        raise ValueError(f"{path} gives {first!r} and {second!r} the same row, {rows[order[twice[0]]]}")
    return names, rows


def _json_pairs(text: str) -> list[tuple[str, Any]]:
    # As pairs, since a name that is there twice would overwrite itself in a dict.
    content = json.loads(text, object_pairs_hook=list)
    if not isinstance(content, list) or not all(isinstance(pair, tuple) for pair in content):
        raise ValueError("expected a JSON object of file name -> row")
    return content


def _csv_pairs(text: str) -> list[tuple[str, int]]:
    pairs = []
    for number, row in enumerate(csv.reader(text.splitlines(), strict=True), 1):
        if not row:
            continue
        if len(row) != 2:
            raise ValueError(f"line {number}: expected a file name and a row number; found {row}")
        if row[1].strip().isdecimal():
            pairs.append((row[0].strip(), int(row[1])))
        elif number > 1:  # the first line may be a header
            raise ValueError(f"line {number}: {row[1]!r} is no row number")
    return pairs


def _refuse_repeated(names: Sequence[str], path: Path, what: str) -> None:
    seen: set[str] = set()
    repeated = [name for name in names if name in seen or seen.add(name)]
    if repeated:
        raise ValueError(f"{path} has {what} more than once: {listed(repeated)}")


def _stem(name: str) -> str:
    """``00/Yxxxxxxxxxxx.mp3`` -> ``Yxxxxxxxxxxx``: without folder, and without a suffix that is one of audio files."""
    base = name.replace("\\", "/").rpartition("/")[2]
    stem, suffix = os.path.splitext(base)
    return stem if suffix.lower() in FILE_SUFFIXES else base


def match_clips(clips: AnyClips, names: Sequence[str], rows: np.ndarray, by_stem: bool) -> tuple[list[str], np.ndarray]:
    """Ids of the clips that have a name, and their rows int64 (n,); prints how many there are.

    A clip's id is looked for as it is; where no name is the same, and ``by_stem``, without folder and suffix.

    Raises ValueError if two names, or two clips, cannot be told apart, and if no clip has a name.
    """
    exact = _NameTable(names)
    stems = None
    ids: list[str] = []
    found: list[np.ndarray] = []
    missing: list[str] = []
    num_missing = 0
    for start in range(0, len(clips), IDS_AT_ONCE):
        block = [clips.clip_id(row) for row in range(start, min(start + IDS_AT_ONCE, len(clips)))]
        places = exact.find(block)
        if by_stem and (places < 0).any():
            stems = stems or _NameTable([_stem(name) for name in names])
            places = np.where(places < 0, stems.find([_stem(clip_id) for clip_id in block]), places)
        ids += [clip_id for clip_id, place in zip(block, places, strict=True) if place >= 0]
        found.append(places[places >= 0])
        num_missing += int((places < 0).sum())
        missing += [block[index] for index in np.flatnonzero(places < 0)[: 10 - len(missing)]]
    places = np.concatenate(found) if found else np.empty(0, dtype=np.int64)
    covered = f"{len(ids)} of {len(clips)} clips of {clips.path} have logits ({len(ids) / max(1, len(clips)):.1%})"
    if not len(ids):
        example = f"; its ids are as {missing[0]!r}, the names as {names[0]!r}" if missing else ""
        raise ValueError(f"{covered}{example}")
    unique, counts = np.unique(places, return_counts=True)
    if (counts > 1).any():
        name = names[unique[counts > 1][0]]
        same = [clip_id for clip_id, place in zip(ids, places, strict=True) if names[place] == name]
        raise ValueError(f"the clips {listed(same)} of {clips.path} would all have the logits of {name!r}")
    print(covered + (f"; none for {missing[0]!r} and {num_missing - 1} more" if num_missing else ""))
    print(f"{len(names) - len(ids)} names are of no clip and left out")
    return ids, rows[places]


class _NameTable:
    """Finds names by binary search: for millions of them, a fraction of a dict's memory."""

    def __init__(self, names: Sequence[str]) -> None:
        try:
            self._encoded = encode_ids(names)
        except ValueError as error:
            raise ValueError(f"names in the index cannot be told apart without folder and suffix: {error}") from error
        self._order = id_order(self._encoded)

    def find(self, names: Sequence[str]) -> np.ndarray:
        """Places int64 (k,) in the list of names; -1 for a name that is not there."""
        return find_ids(self._encoded, self._order, names)


def _blocks(rows: np.ndarray, ids: Sequence[str], config: ImportConfig) -> Iterator[np.ndarray]:
    """float16 (k, C): the rows in this order, a block at a time."""
    with progress(total=len(rows), desc="importing", unit="clip") as bar:
        for start in range(0, len(rows), ROWS_PER_BLOCK):
            part = slice(start, start + ROWS_PER_BLOCK)
            # Mapped anew for each block: what has been read stays in the memory of whoever keeps the map.
            values = np.load(config.logits, mmap_mode="r")[rows[part]].astype(np.float32)
            part_ids = ids[part]
            probable = ((values >= 0) & (values <= 1)).all(axis=1)
            if config.probabilities:
                if not probable.all():
                    first = part_ids[int(np.flatnonzero(~probable)[0])]
                    raise ValueError(
                        f"{config.logits} has values beyond 0 to 1 for {first!r}: no probabilities; leave out --probabilities"
                    )
                values = logit(values)
            elif start == 0 and probable.all():
                raise ValueError(
                    f"all values for the first {len(values)} clips lie between 0 and 1, as probabilities do and logits do not; "
                    "give --probabilities"
                )
            try:
                yield to_float16(values, part_ids)
            except ValueError as error:
                raise ValueError(f"{config.logits}: {error}") from error
            bar.update(len(values))


def logit(probabilities: np.ndarray) -> np.ndarray:
    """log(p / (1 − p)) in float32, p kept from 1e-7 to 1 − 1e-7."""
    p = np.clip(probabilities.astype(np.float64), SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    return np.log(p / (1 - p)).astype(np.float32)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> None:
    import_logits(parse(ImportConfig, arguments, "kd import-logits"))


if __name__ == "__main__":
    raise SystemExit(main())
