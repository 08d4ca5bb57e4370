"""``kd import-logits``: imports published predictions, an array of logits with an index of its rows, into a logit store.

For example, the public predictions of the PaSST ensemble for AudioSet are an array ``(clips, 527)`` as ``.npy`` and a pickled
dict of file name -> row. docs/published_logits.md shows how to use them.

Shapes: R rows of the array, n imported clips, C classes.
"""

import csv
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np

from audio_datasets.audio.codec import AUDIO_SUFFIXES
from audio_datasets.stores.class_lists import read_class_names
from audio_datasets.stores.clip_ids import are_audiosets, audioset_id
from audio_datasets.stores.hdf5_arrays import encode_ids, find_ids, id_order
from audio_datasets.stores.joined import AnyClips, open_clips
from audio_datasets.stores.names import is_writable
from audio_datasets.system.command import parse, progress, run_command
from audio_datasets.system.files import errors_of, parse_json
from audio_datasets.system.messages import brief, listed
from audio_datasets.system.paths.inputs import read_regular, require_regular
from audio_datasets.system.paths.outputs import Output, check_outputs, is_hdf5
from audio_datasets.system.plain_pickle import read_plain_pickle
from teacher_logits.store import DIGEST_BYTES, LogitStore, to_float16, write_logit_store
from teacher_logits.stores.links import LinkKind, link_of_classes

ROWS_PER_BLOCK = 4096
IDS_AT_ONCE = 65_536
BYTES_AT_ONCE = 16 * 2**20
# Suffixes that are removed from file names. Anything else after a dot is part of the name.
FILE_SUFFIXES = AUDIO_SUFFIXES | {".m4a", ".mp4", ".webm"}
# Probabilities of 0 and 1 have no finite logit; these limits are about ±16.
SMALLEST_PROBABILITY = 1e-7


@dataclass(frozen=True)
class ImportConfig:
    """Import published predictions (an array and a list of file names) into a logit store."""

    logits: Path
    """The predictions: a .npy array with one row per clip and one column per class. It is read in blocks."""
    index: Path
    """Which row belongs to which file: file name -> row number, as a pickled dict (read without executing anything), JSON or CSV."""
    out: Path
    """Logit store to write."""
    class_names: Path | None = None
    """Class names of the columns: AudioSet's class_labels_indices.csv, JSON, or one name per line (default: those of --clips)."""
    clips: tuple[Path, ...] = ()
    """Clip stores that the logits are for. The logits get these stores' clip ids; rows of other clips are left out."""
    ids: Literal["stem", "name"] = "stem"
    """Names are compared without folder and suffix, and AudioSet's also without the Y in front, so that 00/Yxxxxxxxxxxx.mp3, Yxxxxxxxxxxx and
    xxxxxxxxxxx are one clip; or as they are."""
    probabilities: bool = False
    """The array holds probabilities, which are converted to logits."""
    teacher_link: LinkKind | None = None
    """The activation that the teacher was trained with: sigmoid (several labels for a clip) or softmax (one label). Default: sigmoid for
    AudioSet's classes and for probabilities, each of which counts by itself; otherwise not known, and training asks for it."""
    teacher_name: str | None = None
    """Name of the teacher (default: the array's file name)."""
    overwrite: bool = False
    """Replace a logit store that is already there."""

    def __post_init__(self) -> None:
        if self.class_names is None and not self.clips:
            raise ValueError("the class names of the columns are missing; give --class-names or --clips")


def import_logits(config: ImportConfig) -> LogitStore:
    """Writes the logit store and prints how many clips it covers.

    Raises ValueError for an array of another type or shape, an index that does not fit it, names that are not unique, values
    that are not logits, and an existing store.
    """
    check_outputs(config, [Output(config.out, is_hdf5, "a logit store")], config.overwrite)
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
        teacher=describe_teacher(config, class_names),
        clip_store_fingerprint=clips.fingerprint if clips is not None else "unknown",
    )
    print(f"{config.out} written: {len(ids)} clips × {len(class_names)} classes")
    return LogitStore.open(config.out)


def describe_teacher(config: ImportConfig, class_names: Sequence[str]) -> dict[str, Any]:
    """The stored description of a teacher known only by its predictions. Its fingerprint is a hash of their bytes."""
    state = blake2b(digest_size=16)
    with (
        errors_of(config.logits),
        open(config.logits, "rb") as file,
        progress(total=os.path.getsize(config.logits), desc="fingerprint", unit="B", unit_scale=True) as bar,
    ):
        while block := file.read(BYTES_AT_ONCE):
            state.update(block)
            bar.update(len(block))
    link = config.teacher_link or ("sigmoid" if config.probabilities else link_of_classes(class_names))
    if link is None:
        print("whether the teacher was trained with a sigmoid or a softmax is not known; --teacher-link stores it")
    return {
        **({} if link is None else {"link": link}),
        "name": config.teacher_name or config.logits.stem,
        "fingerprint": state.hexdigest(),
        "imported_from": config.logits.name,
        "values": "probabilities" if config.probabilities else "logits",
    }


def open_array(path: Path, num_classes: int) -> np.ndarray:
    """The array (R, C) in an ``.npy`` file, memory-mapped. ValueError for another format, type or number of columns."""
    if not path.exists():
        raise ValueError(f"no such file: {path}")
    require_regular(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # for a damaged header, NumPy passes on errors of Python's tokenizer and parser
        raise ValueError(f"{path} is not an .npy file with an array of numbers: {error}") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f":
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive (.npz)"
        raise ValueError(f"{path} must contain floating-point numbers (clips, classes); found {found}")
    if array.shape[1] != num_classes:
        raise ValueError(f"{path} has {array.shape[1]} columns; the class list has {num_classes} names")
    return array


def read_index(path: Path, num_rows: int) -> tuple[list[str], np.ndarray]:
    """File names and their rows int64 (k,), in the order of the index.

    The index is a JSON object (.json), a CSV file of name and row with or without a header (.csv), or a pickled dict (any other
    suffix). Raises ValueError, with the path, for other contents, a name or row that occurs twice, and a row that the array
    does not have.
    """
    if not path.exists():
        raise ValueError(f"no such file: {path}")
    suffix = path.suffix.lower()
    if suffix in (".json", ".csv"):
        try:
            text = read_regular(path).decode("utf-8-sig")
            pairs = _json_pairs(text) if suffix == ".json" else _csv_pairs(text)
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path}: {error}") from error
    else:
        content = read_plain_pickle(path)
        if not isinstance(content, dict):
            raise ValueError(f"{path} must contain a dict of file name -> row; found a {type(content).__name__}")
        pairs = list(content.items())
    if not pairs:
        raise ValueError(f"{path} names no rows")
    names = [name.decode("utf-8", errors="replace") if isinstance(name, bytes) else name for name, _ in pairs]
    for name, (_, row) in zip(names, pairs, strict=True):
        if not isinstance(name, str) or type(row) is not int:
            raise ValueError(f"{path} must map file names to row numbers; found {brief(name)}: {brief(row)}")
        if "\0" in name or not _stem(name) or not is_writable(name):
            raise ValueError(f"{path}: {brief(name)} is not a valid file name")
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
    # As pairs, because a dict would hide a repeated name.
    content = parse_json(text, object_pairs_hook=list)
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
            raise ValueError(f"line {number}: {row[1]!r} is not a row number")
    return pairs


def _refuse_repeated(names: Sequence[str], path: Path, what: str) -> None:
    seen: set[str] = set()
    repeated = [name for name in names if name in seen or seen.add(name)]
    if repeated:
        raise ValueError(f"{path} has {what} more than once: {listed(repeated)}")


def _stem(name: str) -> str:
    """``00/Yxxxxxxxxxxx.mp3`` -> ``Yxxxxxxxxxxx``: the name without folder and without the suffix of an audio file."""
    base = name.replace("\\", "/").rpartition("/")[2]
    stem, suffix = os.path.splitext(base)
    return stem if suffix.lower() in FILE_SUFFIXES else base


def match_clips(clips: AnyClips, names: Sequence[str], rows: np.ndarray, by_stem: bool) -> tuple[list[str], np.ndarray]:
    """Ids of the clips found among the names, and their rows int64 (n,). Prints how many were found.

    Ids are first compared as they are. With ``by_stem``, the remaining ones are compared without folder and suffix, and at last by
    their YouTube id, if the names are AudioSet's.

    Raises ValueError if two names, or two clips, cannot be told apart, and if no clip is found.
    """
    exact = _NameTable(names)
    stems = youtube = None
    has_youtube_ids = by_stem and are_audiosets([_stem(name) for name in names])
    num_respelled, respelled = 0, None
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
        if has_youtube_ids and (places < 0).any():
            youtube = youtube or _youtube_ids(names)
            by_youtube_id = youtube.find([audioset_id(_stem(clip_id)) or "" for clip_id in block])
            (new,) = np.nonzero((places < 0) & (by_youtube_id >= 0))
            places[new] = by_youtube_id[new]
            num_respelled += len(new)
            if len(new) and respelled is None:
                respelled = f"{block[new[0]]!r} under {names[places[new[0]]]!r}"
        ids += [clip_id for clip_id, place in zip(block, places, strict=True) if place >= 0]
        found.append(places[places >= 0])
        num_missing += int((places < 0).sum())
        missing += [block[index] for index in np.flatnonzero(places < 0)[: 10 - len(missing)]]
    places = np.concatenate(found) if found else np.empty(0, dtype=np.int64)
    covered = f"{len(ids)} of {len(clips)} clips of {clips.path} have logits ({len(ids) / max(1, len(clips)):.1%})"
    if not len(ids):
        example = f"; its ids look like {missing[0]!r}, the names like {names[0]!r}" if missing else ""
        raise ValueError(f"{covered}{example}")
    unique, counts = np.unique(places, return_counts=True)
    if (counts > 1).any():
        name = names[unique[counts > 1][0]]
        same = [clip_id for clip_id, place in zip(ids, places, strict=True) if names[place] == name]
        raise ValueError(f"the clips {listed(same)} of {clips.path} would all get the logits of {name!r}")
    print(covered + (f"; none for {missing[0]!r} and {num_missing - 1} more" if num_missing else ""))
    if num_respelled:
        print(f"{num_respelled} of them are found by their YouTube id, as {respelled}")
    print(f"{len(names) - len(ids)} names match no clip and are left out")
    return ids, rows[places]


def _youtube_ids(names: Sequence[str]) -> "_NameTable":
    """AudioSet's names by YouTube id. Two names of one clip stay as they are, so that neither is found."""
    keys = [audioset_id(_stem(name)) for name in names]
    counts = Counter(keys)
    return _NameTable([key if key and counts[key] == 1 else f"/{name}" for key, name in zip(keys, names, strict=True)])


class _NameTable:
    """Finds names by binary search. For millions of names this needs a fraction of a dict's memory."""

    def __init__(self, names: Sequence[str]) -> None:
        try:
            self._encoded = encode_ids(names)
        except ValueError as error:
            raise ValueError(f"names in the index cannot be told apart without folder and suffix: {error}") from error
        self._order = id_order(self._encoded)

    def find(self, names: Sequence[str]) -> np.ndarray:
        """Indices int64 (k,) in the list of names; -1 for a name that is not there."""
        return find_ids(self._encoded, self._order, names)


def _blocks(rows: np.ndarray, ids: Sequence[str], config: ImportConfig) -> Iterator[np.ndarray]:
    """float16 (k, C): the rows in this order, a block at a time."""
    with progress(total=len(rows), desc="importing", unit="clip") as bar:
        for start in range(0, len(rows), ROWS_PER_BLOCK):
            part = slice(start, start + ROWS_PER_BLOCK)
            # Mapped again for each block, because pages that were read stay in memory as long as the map exists.
            values = np.load(config.logits, mmap_mode="r")[rows[part]].astype(np.float32)
            part_ids = ids[part]
            probable = ((values >= 0) & (values <= 1)).all(axis=1)
            if config.probabilities:
                if not probable.all():
                    first = part_ids[int(np.flatnonzero(~probable)[0])]
                    raise ValueError(
                        f"{config.logits} has values outside 0 to 1 for {first!r}, so they are not probabilities; "
                        "leave out --probabilities"
                    )
                values = (
                    np.log(np.maximum(values, SMALLEST_PROBABILITY))
                    if config.teacher_link == "softmax"
                    else logit(values)
                )
            elif start == 0 and probable.all():
                raise ValueError(
                    f"all values for the first {len(values)} clips are between 0 and 1, so they seem to be probabilities, "
                    "not logits; give --probabilities"
                )
            try:
                yield to_float16(values, part_ids)
            except ValueError as error:
                raise ValueError(f"{config.logits}: {error}") from error
            bar.update(len(values))


def logit(probabilities: np.ndarray) -> np.ndarray:
    """log(p / (1 − p)) in float32, with p clipped to the range from 1e-7 to 1 − 1e-7."""
    p = np.clip(probabilities.astype(np.float64), SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    return np.log(p / (1 - p)).astype(np.float32)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> None:
    import_logits(parse(ImportConfig, arguments, "kd import-logits"))


if __name__ == "__main__":
    raise SystemExit(main())
