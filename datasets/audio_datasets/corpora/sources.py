"""Where clips come from: AudioSet, a folder in ESC-50's layout, one with a sub-folder per class, or a manifest file.

One function per layout; ``read_source`` finds out which it is.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audio_datasets.corpora.audioset import index_audio, is_segment_list, read_class_ids, read_segments, segment_lists
from audio_datasets.stores.manifest import read_parquet
from audio_datasets.system.messages import listed
from audio_datasets.system.tables import read_csv_rows, require_columns

LABEL_SEPARATOR = ";"
# File names that libsndfile can be expected to read. A manifest may name files with any suffix.
_WITH_SUFFIX = "wav wave w64 rf64 flac ogg oga opus mp3 aif aiff aifc au snd caf voc sph nist sf paf"
AUDIO_SUFFIXES = frozenset(f".{name}" for name in _WITH_SUFFIX.split())


@dataclass(frozen=True, slots=True)
class SourceClip:
    """One clip before packing."""

    clip_id: str
    path: Path
    source: str
    """The path as the source names it: relative to its folder, with forward slashes."""
    labels: tuple[str, ...]
    split: str | None = None
    fold: int | None = None
    group: str | None = None
    seconds: float | None = None
    """Length that the source says the clip has; a file that is much longer was not cut to it."""


@dataclass(frozen=True)
class Source:
    """All clips of a source, in a fixed order."""

    clips: tuple[SourceClip, ...]
    label_names: tuple[str, ...]
    """The labels that occur, in the order in which they should be numbered."""
    layout: str
    ignored: tuple[str, ...] = ()
    """Files that were passed over because their suffix is not one of audio."""
    missing: tuple[str, ...] = ()
    """Ids of clips that a list names without saying in which file, and for which no file was found."""

    @property
    def missing_share(self) -> float:
        """Share of all clips of the source that are missing, from 0 to 1."""
        return len(self.missing) / max(1, len(self.missing) + len(self.clips))


def read_source(
    path: str | Path,
    layout: str = "auto",
    *,
    audio_root: Path | None = None,
    segments: Sequence[str] = (),
    allow_outside: bool = False,
) -> Source:
    """The clips at ``path``; ``layout`` is ``auto`` or one of ``LAYOUTS``.

    A list of files may come from a stranger: what it names must lie in its own folder, unless ``allow_outside``.
    ``audio_root`` and ``segments`` are for AudioSet alone, see ``read_audioset``. Files that a list names and that are not
    there are kept: packing reports them with the broken ones. Raises ValueError if the path is missing, in no known
    layout, holds no clips, or a clip id is there twice.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"no such file or folder: {path}")
    if layout == "auto":
        layout = _detect_layout(path)
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be auto or one of {sorted(LAYOUTS)}; found {layout!r}")
    if layout == "audioset":
        source = read_audioset(path, audio_root, segments)
    elif audio_root is not None or segments:
        raise ValueError(f"an audio root and segments are for the layout audioset; {path} has the layout {layout}")
    else:
        source = LAYOUTS[layout](path)
    if not source.clips and source.missing:
        raise ValueError(
            f"no audio in {audio_root or path} for any of the {len(source.missing)} clips that {path} lists, the first: "
            f"{listed(source.missing, limit=3)}"
        )
    if not source.clips:
        raise ValueError(f"{path} (layout {layout}) has no audio files")
    if not allow_outside:
        _refuse_outside(path, source.clips)
    seen: dict[str, str] = {}
    for clip in source.clips:
        if not clip.clip_id or "\0" in clip.clip_id or not clip.clip_id.isprintable():
            raise ValueError(f"{path}: clip ids must be printable text and not empty; found {clip.clip_id!r}")
        if clip.clip_id in seen:
            raise ValueError(
                f"{path}: clip ids must be unique; {clip.clip_id!r} is both {seen[clip.clip_id]!r} and {clip.source!r}"
            )
        seen[clip.clip_id] = clip.source
    return source


def _refuse_outside(path: Path, clips: Sequence[SourceClip]) -> None:
    """ValueError for a clip whose path, as its source writes it, leads out of the source's folder.

    Symbolic links inside the folder are followed: they are the doing of whoever owns the disk, not of the list.
    """
    outside = [
        clip.source
        for clip in clips
        if os.path.isabs(clip.source) or ".." in os.path.normpath(clip.source).split(os.sep)
    ]
    if outside:
        raise ValueError(
            f"{path} names {len(outside)} files outside of its own folder: {listed(outside, limit=3)}; paths are relative to "
            "the list and stay below it. If you trust the list, take them with --allow-outside"
        )


def _detect_layout(path: Path) -> str:
    if is_segment_list(path) or (path.is_dir() and any(map(is_segment_list, path.iterdir()))):
        return "audioset"
    if path.is_file():
        return "manifest"
    if (path / "meta" / "esc50.csv").is_file():
        return "esc50"
    if any(not child.name.startswith(".") and child.is_dir() for child in path.iterdir()):
        return "folders"
    raise ValueError(
        f"{path} is in none of the known layouts: a folder with meta/esc50.csv and audio/, a folder with one sub-folder "
        "per class, a folder with AudioSet's lists of segments, or a CSV or Parquet file with the columns clip_id, path, labels"
    )


def read_esc50(folder: Path) -> Source:
    """ESC-50's layout: ``meta/esc50.csv`` (filename, fold, target, category, src_file …) and ``audio/``.

    Clip ids are file names without suffix, and so are the same for the original WAV files and for copies in another
    format, which are found as well. Clips cut from one recording (``src_file``) form a group.
    """
    table = folder / "meta" / "esc50.csv"
    if not table.is_file():
        raise ValueError(f"{folder} is not in ESC-50's layout: it has no meta/esc50.csv")
    by_stem = {
        file.stem: file for file in sorted((folder / "audio").glob("*")) if file.suffix.lower() in AUDIO_SUFFIXES
    }
    clips, order = [], {}
    for line, row in read_csv_rows(table, required=("filename", "category")):
        named = folder / "audio" / row["filename"]
        path = named if named.exists() else by_stem.get(named.stem, named)
        label = row["category"]
        number = _whole_number(row.get("target"), f"{table}, line {line}: target")
        order.setdefault(label, number if number is not None else len(order))
        clips.append(
            SourceClip(
                clip_id=named.stem,
                path=path,
                source=path.relative_to(folder).as_posix(),
                labels=(label,),
                fold=_whole_number(row.get("fold"), f"{table}, line {line}: fold"),
                group=row.get("src_file") or None,
            )
        )
    return Source(tuple(clips), tuple(sorted(order, key=lambda label: (order[label], label))), "esc50")


def read_folders(folder: Path) -> Source:
    """One sub-folder per class, named like it, with audio files at any depth. Clip ids are paths relative to ``folder``."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    clips, ignored = [], []
    for file in sorted(folder.rglob("*"), key=lambda file: file.relative_to(folder).parts):
        relative = file.relative_to(folder)
        if not file.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        if len(relative.parts) > 1 and file.suffix.lower() in AUDIO_SUFFIXES:
            name = relative.as_posix()
            clips.append(SourceClip(clip_id=name, path=file, source=name, labels=(relative.parts[0],)))
        else:
            ignored.append(relative.as_posix())
    labels = tuple(sorted({clip.labels[0] for clip in clips}))
    return Source(tuple(clips), labels, "folders", tuple(ignored))


def read_manifest_file(file: Path) -> Source:
    """A CSV or Parquet file with the columns ``clip_id``, ``path``, ``labels`` and perhaps ``split``, ``fold``, ``group``.

    Paths are relative to the manifest. Labels are separated by ``;`` (in Parquet also a list); a clip may
    have none.
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
        clips.append(
            SourceClip(
                clip_id=clip_id,
                path=file.parent / path,
                source=path,
                labels=_labels(row["labels"], where),
                split=_text(row.get("split"), f"{where}: split"),
                fold=_whole_number(row.get("fold"), f"{where}: fold"),
                group=_text(row.get("group"), f"{where}: group"),
            )
        )
    return Source(tuple(clips), tuple(sorted({label for clip in clips for label in clip.labels})), "manifest")


def read_audioset(path: Path, audio_root: Path | None = None, segments: Sequence[str] = ()) -> Source:
    """AudioSet's lists of segments and whatever share of the audio is there.

    Args:
        path: the folder with the lists and ``class_labels_indices.csv``, or one list that lies beside it.
        audio_root: folder with the audio files at any depth, named by YouTube id; the lists' folder if left out.
        segments: names of the lists to take (``balanced_train`` …); all that are there if left out.

    Clip ids are ``Y`` and the YouTube id, whatever the files are called; labels are display names; a clip's split is the
    name of its list. Raises ValueError for a file in another format, and a class that is not in the class list.
    """
    lists = segment_lists(path, segments)
    folder = path if path.is_dir() else path.parent
    name_of = read_class_ids(folder)
    index = index_audio(audio_root or folder, AUDIO_SUFFIXES)
    clips, missing = [], []
    for split, file in lists.items():
        for segment in read_segments(file):
            unknown = [class_id for class_id in segment.class_ids if class_id not in name_of]
            if unknown:
                raise ValueError(
                    f"{file}: segment {segment.youtube_id} has classes of no class list: {listed(unknown)}"
                )
            name = index.find(segment)
            if name is None:
                missing.append(segment.clip_id)
                continue
            clips.append(
                SourceClip(
                    clip_id=segment.clip_id,
                    path=index.root / name,
                    source=name,
                    labels=tuple(name_of[class_id] for class_id in segment.class_ids),
                    split=split,
                    seconds=segment.end_seconds - segment.start_seconds,
                )
            )
    return Source(tuple(clips), tuple(name_of.values()), "audioset", index.ignored, tuple(missing))


LAYOUTS: dict[str, Callable[[Path], Source]] = {
    "audioset": read_audioset,
    "esc50": read_esc50,
    "folders": read_folders,
    "manifest": read_manifest_file,
}


def _parquet_rows(file: Path, required: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, row) of a Parquet file."""
    table = read_parquet(file)
    require_columns(file, required, table.column_names)
    number = 0
    for batch in table.to_batches():
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _labels(value: Any, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        value = value.split(LABEL_SEPARATOR)
    if not isinstance(value, list) or not all(isinstance(label, str) for label in value):
        raise ValueError(f"{where}: labels must be text, separated by {LABEL_SEPARATOR!r}, or a list; found {value!r}")
    stripped = (label.strip() for label in value)
    return tuple(dict.fromkeys(label for label in stripped if label))


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


def _whole_number(value: Any, where: str) -> int | None:
    """A fold or class number; None where there is none. Tables often hold whole numbers as floats, with NaN for none."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    try:
        number = float(value)
        if number != int(number):
            raise ValueError
        return int(number)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{where} must be a whole number; found {value!r}") from None


def describe(source: Source) -> str:
    """One line on what was found, for the start of a run."""
    text = f"{len(source.clips)} clips with {len(source.label_names)} labels (layout: {source.layout})"
    if source.ignored:
        text += f"; passed over, as not audio or not in its place: {listed(source.ignored, limit=3)}"
    if source.missing:
        text += (
            f"; no audio for {len(source.missing)} more ({100 * source.missing_share:.1f} % of those listed): "
            f"{listed(source.missing, limit=3)}"
        )
    return text
