"""What a fine-tuning task is, and its clips as they lie in the user's folder.

A task is one file with a ``Task`` and a function that reads its layout, and one line in ``catalog.py`` (docs/add_a_task.md).

Shapes: n clips, C classes, k rows asked for.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from audio_datasets.audio import codec as audio_codec
from audio_datasets.audio.bad_clips import BadClipError, OnBadClip
from audio_datasets.corpora.sources import AUDIO_SUFFIXES
from audio_datasets.stores.class_lists import check_class_names
from audio_datasets.system.files import digest_of
from audio_datasets.system.messages import listed
from audio_datasets.tasks.label_space import LabelSpace

Split = Literal["train", "valid", "test"]
Labels = Literal["one", "several"]
MissingAudio = Literal["refuse", "leave-out"]


@dataclass(frozen=True)
class TaskClip:
    """One clip of a task."""

    clip_id: str
    """The id that `kd pack` gives the same file, by which teacher logits are found."""
    path: Path
    labels: tuple[str, ...]
    """Its classes."""
    known: tuple[str, ...] | None = None
    """The classes of which it is known whether they are there; None for all."""
    split: Split | None = None
    fold: int | None = None
    group: str | None = None
    """Clips of one group, for example of one recording, belong on the same side of a split."""
    device: str | None = None
    """What it was recorded with."""


@dataclass(frozen=True)
class Listing:
    """What a task's reader finds: every clip of the lists, in their order, whether or not its audio is there."""

    class_names: tuple[str, ...]
    clips: tuple[TaskClip, ...]
    notes: tuple[str, ...] = ()
    """What was decided from the data, to be said aloud."""


class Settings(NamedTuple):
    """What differs between tasks in the one recipe that they share."""

    learning_rate: float
    batch_size: int


@dataclass(frozen=True)
class Task:
    """A data set to fine-tune on: where it comes from, how it lies on disk, how it is trained and judged."""

    name: str
    title: str
    source: str
    """Where to get it."""
    licence: str
    layout: str
    """What the folder (or file) given by the user holds; shown when it does not."""
    read: Callable[[Path], Listing]
    """Reads that layout. Raises ValueError, saying what was expected where."""
    settings: Mapping[str, Settings]
    """Learning rate and batch size for pre-trained students of the families "mn" (also for all others) and "dymn"."""
    labels: Labels | None = None
    """Whether a clip has exactly one class; None: decided from the data."""
    clip_seconds: float | None = None
    """Length that training clips are cropped or padded to; None: decided from the data."""
    metric: str | None = None
    """The headline metric; None: accuracy for one label, mAP for several."""

    def settings_for(self, student: str) -> Settings:
        """Published learning rate and batch size for a student of the catalog."""
        return self.settings["dymn" if student.startswith("dymn") else "mn"]


class TaskClips:
    """The clips of a task by row number: waveforms read from the user's own files, targets, and what is known of them.

    Has what training and evaluation use of a ``ClipStore``, so that either can stand behind them. It can be pickled.

    Raises:
        ValueError: no clips, ids that repeat, labels that are no class.
    """

    def __init__(self, path: Path, class_names: Sequence[str], clips: Sequence[TaskClip]) -> None:
        self.path = path
        self.clips = tuple(clips)
        if not self.clips:
            raise ValueError(f"{path} lists no clips")
        try:
            self.class_names = check_class_names(class_names)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        wrong = next((clip.clip_id for clip in self.clips if not clip.clip_id or not clip.clip_id.isprintable()), None)
        if wrong is not None:
            raise ValueError(f"{path}: clip ids must be printable text and not empty; found {wrong!r}")
        self._row_of = {clip.clip_id: row for row, clip in enumerate(self.clips)}
        if len(self._row_of) < len(self.clips):
            repeated = [clip.clip_id for row, clip in enumerate(self.clips) if self._row_of[clip.clip_id] != row]
            raise ValueError(f"{path}: clip ids must be unique; found more than once: {listed(repeated)}")
        self._targets = self._matrix([clip.labels for clip in self.clips])
        self._mask = None
        if any(clip.known is not None for clip in self.clips):
            everything = self.class_names
            self._mask = self._matrix([everything if clip.known is None else clip.known for clip in self.clips])
        self._durations: dict[int, float] = {}

    def _matrix(self, names_of_clips: Iterable[Sequence[str]]) -> np.ndarray:
        """bool (n, C): true where a clip names the class."""
        index_of = {name: index for index, name in enumerate(self.class_names)}
        matrix = np.zeros((len(self.clips), len(self.class_names)), dtype=bool)
        for row, names in enumerate(names_of_clips):
            unknown = [name for name in names if name not in index_of]
            if unknown:
                raise ValueError(
                    f"{self.path}: clip {self.clips[row].clip_id!r} has labels outside the class list: {listed(unknown)}; "
                    f"the classes are {listed(self.class_names)}"
                )
            matrix[row, [index_of[name] for name in names]] = True
        return matrix

    def __len__(self) -> int:
        return len(self.clips)

    def clip_id(self, row: int) -> str:
        return self.clips[row].clip_id

    @property
    def clip_ids(self) -> list[str]:
        return [clip.clip_id for clip in self.clips]

    def rows(self, clip_ids: Sequence[str]) -> np.ndarray:
        """The rows of these clips, int64 (k,); ValueError that names the ids that are not there."""
        missing = [clip_id for clip_id in clip_ids if clip_id not in self._row_of]
        if missing:
            raise ValueError(f"{len(missing)} of {len(clip_ids)} clip ids are not in {self.path}: {listed(missing)}")
        return np.array([self._row_of[clip_id] for clip_id in clip_ids], dtype=np.int64)

    def targets(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 (k, C): 1.0 where the clip has the class; of no meaning where ``mask`` is false."""
        return self._targets[np.asarray(rows, dtype=np.int64)].astype(np.float32)

    def mask(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """bool (k, C): true where it is known whether the clip has the class."""
        rows = np.asarray(rows, dtype=np.int64)
        return np.ones((len(rows), len(self.class_names)), dtype=bool) if self._mask is None else self._mask[rows]

    @property
    def is_masked(self) -> bool:
        """Whether any label is unknown."""
        return self._mask is not None and not self._mask.all()

    def audio_digests(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 (k, 16), zeros, which stand for not known: the teacher may have heard another encoding of these files."""
        return np.zeros((len(rows), 16), dtype=np.uint8)

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits over class names, ids, targets and masks."""
        known = b"" if self._mask is None else np.packbits(self._mask).tobytes()
        return digest_of(
            "\0".join(self.class_names), "\0".join(self.clip_ids), np.packbits(self._targets).tobytes(), known
        )

    def duration_seconds(self, row: int) -> float:
        """One clip's length by its file's header. BadClipError, a ValueError with its id, if that cannot be read."""
        if row not in self._durations:
            clip = self.clips[row]
            try:
                self._durations[row] = audio_codec.audio_info(clip.path).duration_seconds
            except (ValueError, OSError) as error:
                raise BadClipError(f"clip {clip.clip_id!r} ({clip.path}): {error}", str(error)) from error
        return self._durations[row]

    def waveform(
        self, row: int, sample_rate_hz: int, start_seconds: float = 0.0, seconds: float | None = None
    ) -> np.ndarray:
        """One clip as a mono waveform at ``sample_rate_hz``, float32 (samples,); only the part asked for is read.

        The part is shorter where the clip ends earlier. BadClipError, a ValueError with its id, for audio that cannot be used.
        """
        clip = self.clips[row]
        try:
            return audio_codec.decode(clip.path, sample_rate_hz, start_seconds, seconds)
        except (ValueError, OSError) as error:
            raise BadClipError(f"clip {clip.clip_id!r} ({clip.path}): {error}", str(error)) from error


def read_task(
    task: Task, path: str | Path, missing_audio: MissingAudio = "refuse", *, allow_outside: bool = False
) -> tuple[TaskClips, tuple[str, ...]]:
    """The clips of ``task`` at ``path``, and what should be said aloud of them.

    ``missing_audio``: what to do if files that the lists name are not there. A list may come from a stranger: what it names
    must lie in its own folder, unless ``allow_outside``; symbolic links in the folder are followed.

    Raises:
        ValueError: no such folder, another layout, labels outside the class list, missing audio files, files outside.
    """
    path = Path(path)
    if missing_audio not in get_args(MissingAudio):
        raise ValueError(f"missing_audio must be one of {get_args(MissingAudio)}; found {missing_audio!r}")
    if not path.exists():
        raise ValueError(f"no such folder or file: {path}. Task {task.name} needs {task.layout} (from {task.source})")
    try:
        listing = task.read(path)
    except ValueError as error:
        raise ValueError(f"{error}. Task {task.name} needs {task.layout} (from {task.source})") from error
    if not allow_outside:
        _refuse_outside(path, listing.clips)
    notes = list(listing.notes)
    absent = [clip for clip in listing.clips if not clip.path.is_file()]
    if absent:
        found = (
            f"{len(absent)} of {len(listing.clips)} audio files are missing, as {absent[0].path} "
            f"(clip {absent[0].clip_id!r})"
        )
        if missing_audio == "refuse" or len(absent) == len(listing.clips):
            raise ValueError(f"{found}; to train without them: --missing-audio leave-out")
        notes.append(f"{found}; they are left out")
        gone = {clip.clip_id for clip in absent}
        listing = Listing(listing.class_names, tuple(clip for clip in listing.clips if clip.clip_id not in gone))
    clips = TaskClips(path, listing.class_names, listing.clips)
    if task.labels == "one":
        wrong = [clip for clip in clips.clips if len(clip.labels) != 1]
        if wrong:
            raise ValueError(
                f"{path}: each clip of {task.name} has exactly one label; clip {wrong[0].clip_id!r} has {list(wrong[0].labels)}"
            )
    exclusive = one_label_each(clips) if task.labels is None else task.labels == "one"
    clips.label_space = LabelSpace.single(clips.class_names, exclusive)
    return clips, tuple(notes)


def _refuse_outside(path: Path, clips: Sequence[TaskClip]) -> None:
    """ValueError for a clip whose path leads out of the folder that the lists describe."""
    root = Path(os.path.abspath(path if path.is_dir() else path.parent))
    outside = [str(clip.path) for clip in clips if root not in Path(os.path.abspath(clip.path)).parents]
    if outside:
        raise ValueError(
            f"{path} names {len(outside)} files outside of its own folder: {listed(outside, limit=3)}; paths are relative to "
            "it and stay below it. If you trust the list, take them with --allow-outside"
        )


def one_label_each(clips: TaskClips) -> bool:
    """Whether every clip has exactly one class and all labels are known."""
    return not clips.is_masked and all(len(clip.labels) == 1 for clip in clips.clips)


def usable_durations(
    clips: TaskClips, on_bad_clip: OnBadClip = "refuse", before_clip: Callable[[], None] = lambda: None
) -> list[float]:
    """The lengths of all clips by their headers, in seconds; of those that can be read, if bad ones are to be skipped.

    ``before_clip`` is called before each; it may raise.

    Raises:
        BadClipError: a header that cannot be read, with ``on_bad_clip="refuse"``.
    """
    found = []
    for row in range(len(clips)):
        before_clip()
        try:
            found.append(clips.duration_seconds(row))
        except BadClipError:
            if on_bad_clip == "refuse":
                raise
    return found


# -- What readers of layouts share -------------------------------------------------------------------------------------


@dataclass
class AudioFolder:
    """The audio files of a folder by name without suffix: a copy in another format stands for the original."""

    folder: Path
    _by_stem: dict[str, Path] = field(init=False)

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise ValueError(f"there is no folder {self.folder}")
        files = sorted(self.folder.iterdir(), reverse=True)
        self._by_stem = {file.stem: file for file in files if file.suffix.lower() in AUDIO_SUFFIXES}

    def find(self, name: str) -> Path:
        """The file of this name or, with another suffix, of this stem; the path where it should be if there is none.

        ValueError for what is no name of a file in a folder.
        """
        if not name or "\0" in name or name in (".", "..") or "/" in name:
            raise ValueError(f"{self.folder} can hold no file that is called {name!r}")
        named = self.folder / name
        if named.suffix.lower() in AUDIO_SUFFIXES:
            return named if named.exists() else self._by_stem.get(named.stem, named)
        return self._by_stem.get(name, named.with_name(f"{name}.wav"))
