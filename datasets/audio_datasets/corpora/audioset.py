"""AudioSet as it is published: lists of segments, the class list, and audio files named by YouTube id.

The lists (``balanced_train_segments.csv``, ``unbalanced_train_segments.csv``, ``eval_segments.csv``) say which seconds of
which video belong to the set; everybody fetches the audio for themselves, gets a part of it, and names it in one of a
few ways. https://research.google.com/audioset/download.html describes the files.
"""

import csv
import io
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from audio_datasets.audio.codec import AUDIO_SUFFIXES
from audio_datasets.stores.class_lists import read_class_names
from audio_datasets.system.messages import listed
from audio_datasets.system.paths.inputs import open_regular
from audio_datasets.tasks.audio_files import FolderWalk
from audio_datasets.tasks.listing import Clip, Listing, in_our_splits
from audio_datasets.tasks.task import Task

CLASS_LIST = "class_labels_indices.csv"
LIST_SUFFIX = "_segments.csv"
SPLITS = {"balanced_train": "train", "unbalanced_train": "train", "eval": "test"}
"""The official lists, and what they are in fine-tuning."""

# An id has 11 characters, of which any may be "-" or "_". The leading Y of some files (for which a name may not begin with
# "-") and the segment's start and end, in seconds or milliseconds, leave the id unambiguous: after the id comes "_" and a digit.
_FILE_STEM = re.compile(r"Y?(?P<id>[A-Za-z0-9_-]{11})(?:_(?P<start>\d+(?:\.\d+)?)(?:_\d+(?:\.\d+)?)?)?")


class Segment(NamedTuple):
    """One line of a list: a stretch of a video and its classes."""

    youtube_id: str
    start_seconds: float
    end_seconds: float
    class_ids: tuple[str, ...]
    """Such as ``/m/09x0r``."""

    @property
    def clip_id(self) -> str:
        """``Y`` and the YouTube id: the name under which teachers' predictions for AudioSet are published."""
        return f"Y{self.youtube_id}"


def is_segment_list(path: Path) -> bool:
    """Whether a file is called like a list of segments."""
    return path.name.endswith(LIST_SUFFIX) and path.is_file()


def segment_lists(source: Path, names: Sequence[str] = ()) -> dict[str, Path]:
    """The lists of a folder by name (``balanced_train`` …), or the one that ``source`` is.

    ``names`` chooses some of them, in that order. Raises ValueError, listing what is there, if one is absent.
    """
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    lists = {file.name.removesuffix(LIST_SUFFIX): file for file in files if is_segment_list(file)}
    if not lists:
        raise ValueError(f"{source} has no lists of segments; expected files such as balanced_train{LIST_SUFFIX}")
    absent = [name for name in names if name not in lists]
    if absent:
        raise ValueError(f"{source} has no list {listed(absent)}; it has {listed(list(lists))}")
    return {name: lists[name] for name in names or lists}


def read_segments(path: Path) -> Iterator[Segment]:
    """The segments of a list, in its order.

    Lines are ``YTID, start_seconds, end_seconds, "/m/…,/m/…"``; those that begin with ``#`` are comments. Raises ValueError,
    with path and line, for any other.
    """
    try:
        with open_regular(path) as content, io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as text:
            # Comments become empty lines, so that the reader's count stays that of the file.
            lines = ("\n" if line.startswith("#") else line for line in text)
            reader = csv.reader(lines, skipinitialspace=True, strict=True)
            for row in reader:
                if row:
                    yield _segment(row, f"{path}, line {reader.line_num}")
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a list of segments in UTF-8: {error}") from error


def _segment(row: list[str], where: str) -> Segment:
    try:
        youtube_id, start, end, class_ids = row
        segment = Segment(youtube_id, float(start), float(end), tuple(filter(None, class_ids.split(","))))
        valid = re.fullmatch(r"[A-Za-z0-9_-]{11}", youtube_id) and 0 <= segment.start_seconds < segment.end_seconds
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f'{where}: expected a YouTube id, start, end and "classes"; found {row}')
    return segment


def read_class_ids(folder: Path) -> dict[str, str]:
    """Class id (``/m/09x0r``) -> display name, in the official order, from the folder's ``class_labels_indices.csv``."""
    path = folder / CLASS_LIST
    if not path.exists():
        raise ValueError(
            f"{folder} has no {CLASS_LIST}, AudioSet's list of classes; put it beside the lists of segments"
        )
    names = read_class_names(path)
    with open_regular(path) as content, io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as text:
        rows = csv.DictReader(text)
        if "mid" not in rows.fieldnames:
            raise ValueError(f"{path} has no column 'mid'; found {rows.fieldnames}")
        index_of = {row["mid"]: int(row["index"]) for row in rows}
    return {class_id: names[index] for class_id, index in sorted(index_of.items(), key=lambda pair: pair[1])}


@dataclass(frozen=True)
class AudioIndex:
    """The audio files below a folder by YouTube id; made by ``index_audio``, which looks into each folder once."""

    root: Path
    files: dict[str, list[str]]
    """YouTube id -> paths relative to ``root``."""
    ignored: tuple[str, ...]
    """Files that are not audio, or not named by a YouTube id."""
    unusable: tuple[tuple[str, str], ...] = ()
    """Links that lead nowhere and folders that cannot be opened, with the reason."""
    notes: tuple[str, ...] = ()
    """What was passed over."""

    def find(self, segment: Segment) -> str | None:
        """The segment's file, relative to ``root``: the first by path, if there are several; None if there is none.

        A file whose name says where it starts must start where the segment does.
        """
        fitting = [name for name in self.files.get(segment.youtube_id, ()) if _starts_at(name, segment.start_seconds)]
        return min(fitting, default=None)


def index_audio(root: Path, suffixes: Collection[str]) -> AudioIndex:
    """All files below ``root`` with one of the ``suffixes`` (lower case, with the dot) by YouTube id.

    Names are ``ID``, ``YID``, and either with the start or start and end of the segment: ``ID_30.000``, ``ID_30000_40000``.
    """
    if not root.is_dir():
        raise ValueError(f"there is no folder with audio at {root}")
    files: dict[str, list[str]] = {}
    ignored: list[str] = []
    walk = FolderWalk(root)
    for name in walk.files():
        stem, suffix = os.path.splitext(os.path.basename(name))
        match = _FILE_STEM.fullmatch(stem)
        if match and suffix.lower() in suffixes:
            files.setdefault(match["id"], []).append(name)
        elif not name.endswith(".csv"):
            ignored.append(name)
    return AudioIndex(root, files, tuple(sorted(ignored)), tuple(sorted(walk.unusable.items())), tuple(walk.notes()))


def _starts_at(name: str, start_seconds: float) -> bool:
    found = _FILE_STEM.fullmatch(os.path.splitext(os.path.basename(name))[0])["start"]
    return found is None or any(abs(float(found) - start) < 1 for start in (start_seconds, 1000 * start_seconds))


def read(path: Path, audio_root: Path | None = None, segments: Sequence[str] = ()) -> Listing:
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
                Clip(
                    clip_id=segment.clip_id,
                    path=index.root / name,
                    source=name,
                    labels=tuple(name_of[class_id] for class_id in segment.class_ids),
                    split=split,
                    seconds=segment.end_seconds - segment.start_seconds,
                )
            )
    if missing and not clips:
        raise ValueError(
            f"no audio in {index.root} for any of the {len(missing)} clips that {path} lists, the first: {listed(missing, limit=3)}"
        )
    return Listing(
        tuple(name_of.values()),
        tuple(clips),
        notes=index.notes,
        ignored=index.ignored,
        unusable=index.unusable,
        missing=tuple(missing),
    )


def _has_segment_lists(path: Path) -> bool:
    return is_segment_list(path) or (path.is_dir() and any(map(is_segment_list, path.iterdir())))


AUDIOSET = Task(
    name="audioset",
    title="AudioSet",
    source="https://research.google.com/audioset/download.html",
    licence="CC BY 4.0 for the lists; each video has a licence of its own",
    layout=f"a folder with lists of segments (eval{LIST_SUFFIX} …), {CLASS_LIST}, and audio files named by YouTube id at any depth",
    read=read,
    exclusive=False,
    clip_seconds=10.0,
    metric="mAP",
    recognises=_has_segment_lists,
    for_training=lambda listing, path: in_our_splits(listing, path, SPLITS),
    read_part=read,
)
