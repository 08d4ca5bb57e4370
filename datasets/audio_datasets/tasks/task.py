"""The interface of a task, that is of a corpus for `kd pack` and `kd finetune`, and its clips in the user's folder.

A task is one file in ``audio_datasets.corpora``, or a module of your own, with a ``Task`` and a function that reads its layout
(docs/add_a_task.md).

Shapes: n clips, C classes, k requested rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np

from audio_datasets.audio import codec as audio_codec
from audio_datasets.audio.bad_clips import BadClipError, OnBadClip, refuse_system_fault
from audio_datasets.stores.class_lists import check_class_names
from audio_datasets.system.command import progress
from audio_datasets.system.files import digest_of
from audio_datasets.system.messages import listed
from audio_datasets.system.paths.contents import FileContents
from audio_datasets.tasks.label_space import LabelSpace
from audio_datasets.tasks.listing import (
    Clip,
    Listing,
    check_ids,
    check_labels,
    checked,
    describe,
    known_matrix,
    label_matrix,
    one_label_each,
    refuse_unusable,
)

MissingAudio = Literal["refuse", "leave-out"]


class ReadPart(Protocol):
    """A reader for a corpus whose audio may be in another folder, and that can read only some of its lists."""

    def __call__(self, path: Path, audio_root: Path | None, segments: Sequence[str]) -> Listing: ...


def _as_listed(listing: Listing, path: Path) -> Listing:
    return listing


@dataclass(frozen=True)
class Task:
    """A corpus: its source, its layout on disk, and how students are fine-tuned and evaluated on it."""

    name: str
    title: str
    source: str
    """Where to get it."""
    licence: str
    layout: str
    """The expected contents of the user's folder (or file), for messages."""
    read: Callable[[Path], Listing]
    """Reads this layout. Raises ValueError that says what was expected and where."""
    exclusive: bool | None = None
    """Whether the classes exclude each other, so that each clip has exactly one; None: decided from the data. Of no meaning where
    the reader gives groups of classes (``Listing.label_space``)."""
    clip_seconds: float | None = None
    """Length to which training clips are cropped or padded; None: decided from the data."""
    metric: str | None = None
    """The headline metric; None: accuracy for exclusive classes, otherwise mAP."""
    recognises: Callable[[Path], bool] | None = None
    """Whether a path has this layout, judging by the names of a few files (`kd pack --layout auto`); None: never detected."""
    is_fallback: bool = False
    """Whether the layout is so general that it is used only if no other matches, such as a folder for each class."""
    for_training: Callable[[Listing, Path], Listing] = _as_listed
    """Additional checks for fine-tuning. Returns the listing with splits called train, valid and test, or raises ValueError."""
    read_part: ReadPart | None = None
    """Reads audio from another folder, and only some of the lists; None if the layout does not support this."""
    read_with_classes: Callable[[Path, Path | None], Listing] | None = None
    """Reads a layout without class names; takes the path and the user's class list. None if the layout has class names."""

    def read_checked(
        self,
        path: Path,
        *,
        allow_outside: bool = False,
        audio_root: Path | None = None,
        segments: Sequence[str] = (),
        class_list: Path | None = None,
    ) -> Listing:
        """The clips at ``path`` as listed in the corpus, with its own splits.

        Raises:
            ValueError: another layout, ids that repeat, files outside of the corpus's own folder unless ``allow_outside``, or an
                ``audio_root`` or ``segments`` for a layout without.
        """
        if audio_root is not None or segments:
            if self.read_part is None:
                raise ValueError(
                    f"--audio-root and --segments are for the layout audioset; {path} has the layout {self.name}"
                )
            listing = self.read_part(path, audio_root, segments)
        elif self.read_with_classes is not None:
            listing = self.read_with_classes(path, class_list)
        else:
            listing = self.read(path)
        return checked(listing, path, self.name, allow_outside=allow_outside)

    def read_for_training(
        self,
        path: Path,
        *,
        allow_outside: bool = False,
        audio_root: Path | None = None,
        segments: Sequence[str] = (),
        class_list: Path | None = None,
    ) -> Listing:
        """The clips at ``path`` for fine-tuning; arguments and errors as for ``read_checked``.

        Raises:
            ValueError: also for data that fine-tuning cannot use, such as splits other than train, valid and test.
        """
        if not path.exists():
            raise ValueError(
                f"no such folder or file: {path}. Task {self.name} needs {self.layout} (from {self.source})"
            )
        try:
            listing = self.read_checked(
                path, allow_outside=allow_outside, audio_root=audio_root, segments=segments, class_list=class_list
            )
            return self.for_training(listing, path)
        except ValueError as error:
            raise ValueError(f"{error}. Task {self.name} needs {self.layout} (from {self.source})") from error

    def label_space(self, listing: Listing) -> LabelSpace:
        """The label space of a listing: given by its reader or by the task, otherwise inferred from the labels."""
        if listing.label_space is not None:
            return listing.label_space
        exclusive = self.exclusive
        if exclusive is None:
            exclusive = one_label_each(listing.clips, listing.class_names)
        return LabelSpace.single(listing.class_names, exclusive)


class TaskClips:
    """The clips of a task by row number: waveforms from the user's own files, targets, and which targets are known.

    Has the methods of ``ClipStore`` that training and evaluation use, so both can be used there. It can be pickled.

    Raises:
        ValueError: no clips, repeated ids, labels that are not classes, or not exactly one label of an exclusive group.
    """

    def __init__(
        self, path: Path, class_names: Sequence[str], clips: Sequence[Clip], label_space: LabelSpace | None = None
    ) -> None:
        """``label_space`` None: one group, exclusive if every clip has exactly one label."""
        self.path = path
        self.clips = tuple(clips)
        if not self.clips:
            raise ValueError(f"{path} lists no clips")
        try:
            self.class_names = check_class_names(class_names)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        check_ids(path, self.clips)
        self._row_of = {clip.clip_id: row for row, clip in enumerate(self.clips)}
        self._targets = label_matrix(path, self.clips, self.class_names)
        self._mask = known_matrix(path, self.clips, self.class_names)
        self.label_space = label_space
        if label_space is None:
            self.label_space = LabelSpace.single(self.class_names, one_label_each(self.clips, self.class_names))
        check_labels(path, self.clips, self.label_space)
        self._durations: dict[int, float] = {}
        self._open_clip = audio_codec.OpenClip()
        self.suspicious: dict[str, str] = {}
        """What is odd about clips whose length was asked for: by clip id."""
        self.contents: FileContents | None = None
        """What the files held when ``take_down_contents`` was called; from then on, a file that has changed is an error."""

    def __len__(self) -> int:
        return len(self.clips)

    def clip_id(self, row: int) -> str:
        return self.clips[row].clip_id

    @property
    def clip_ids(self) -> list[str]:
        return [clip.clip_id for clip in self.clips]

    def find(self, clip_ids: Sequence[str]) -> np.ndarray:
        """The rows of these clips, int64 (k,); -1 for an id that is not there."""
        return np.array([self._row_of.get(clip_id, -1) for clip_id in clip_ids], dtype=np.int64)

    def rows(self, clip_ids: Sequence[str]) -> np.ndarray:
        """The rows of these clips, int64 (k,); ValueError that names the ids that are not there."""
        missing = [clip_id for clip_id in clip_ids if clip_id not in self._row_of]
        if missing:
            raise ValueError(f"{len(missing)} of {len(clip_ids)} clip ids are not in {self.path}: {listed(missing)}")
        return np.array([self._row_of[clip_id] for clip_id in clip_ids], dtype=np.int64)

    def targets(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 (k, C): 1.0 where the clip has the class; meaningless where ``mask`` is false."""
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
        """uint8 (k, 16): zeros, which mean unknown, because the teacher may have heard another encoding of these files."""
        return np.zeros((len(rows), 16), dtype=np.uint8)

    @property
    def fingerprint(self) -> str:
        """Digest of class names, ids, targets and masks, 32 hexadecimal digits."""
        known = b"" if self._mask is None else np.packbits(self._mask).tobytes()
        return digest_of(
            "\0".join(self.class_names), "\0".join(self.clip_ids), np.packbits(self._targets).tobytes(), known
        )

    def take_down_contents(self, before: FileContents | None = None) -> FileContents:
        """Reads every file, and remembers what it holds. What ``before`` begins with and has not changed since is not read again.

        From then on ``waveform`` and ``duration_seconds`` raise ValueError for a file that has changed. A file counts once, also if
        several clips are rows of it.

        Raises:
            ValueError: a file that is being written.
        """
        files = list(self._file_numbers())
        found = FileContents.empty(len(files))
        before = before if before is not None and len(before) >= len(files) else None
        for index, path in enumerate(progress(files, desc="contents of files", unit="file", leave=False, delay=2)):
            found.take(index, path, before)
        self.know_contents(found)
        return found

    def know_contents(self, contents: FileContents) -> None:
        """Takes over what another process has read with ``take_down_contents``."""
        numbers = self._file_numbers()
        self.contents = contents
        self._file_of = np.array([numbers[clip.path] for clip in self.clips], dtype=np.int64)

    def _file_numbers(self) -> dict[Path, int]:
        """The files in the order in which their contents are listed."""
        return {path: index for index, path in enumerate(dict.fromkeys(clip.path for clip in self.clips))}

    def _check_content(self, row: int) -> None:
        """Called after something was read from a clip's file. ValueError if that has changed."""
        if self.contents is not None:
            clip = self.clips[row]
            self.contents.check(int(self._file_of[row]), clip.path, f"the audio of clip {clip.clip_id!r}")

    def content_digest(self, row: int) -> bytes | None:
        """The digest (BLAKE2b-128) of what a clip's own file held; None if it is not known, or holds other clips as well."""
        if self.contents is None or self.clips[row].row is not None:
            return None
        digest = self.contents.digests[self._file_of[row]]
        return digest.tobytes() if digest.any() else None

    @property
    def content_fingerprint(self) -> str:
        """Digest of what all files hold, which is read if it is not known."""
        return (self.contents or self.take_down_contents()).digest

    def duration_seconds(self, row: int) -> float:
        """The seconds of one clip that decode, measured once. BadClipError, a ValueError with its id, if it cannot be read."""
        if row not in self._durations:
            clip = self.clips[row]
            try:
                info = audio_codec.audio_info(clip.audio)
            except (ValueError, OSError) as error:
                refuse_system_fault(error, clip.path)
                self._check_content(row)
                raise BadClipError(f"clip {clip.clip_id!r} ({clip.path}): {error}", str(error)) from error
            self._check_content(row)
            self._durations[row] = info.duration_seconds
            if info.oddities:
                self.suspicious[clip.clip_id] = ", ".join(info.oddities)
        return self._durations[row]

    def waveform(
        self, row: int, sample_rate_hz: int, start_seconds: float = 0.0, seconds: float | None = None
    ) -> np.ndarray:
        """One clip as a mono waveform at ``sample_rate_hz``, float32 (samples,); reads only the requested part.

        The part is shorter if the clip ends earlier. BadClipError, a ValueError with its id, for audio that cannot be used; ValueError
        for a file that has changed (see ``take_down_contents``).
        """
        clip = self.clips[row]
        try:
            if seconds is None:
                waveform = audio_codec.decode(clip.audio, sample_rate_hz, start_seconds)
            else:
                waveform = self._open_clip.part(row, lambda: clip.audio, sample_rate_hz, start_seconds, seconds)
        except (ValueError, OSError) as error:
            refuse_system_fault(error, clip.path)
            self._check_content(row)  # not a bad clip, if it was a good one before
            raise BadClipError(f"clip {clip.clip_id!r} ({clip.path}): {error}", str(error)) from error
        self._check_content(row)
        return waveform


def read_task(
    task: Task,
    path: str | Path,
    missing_audio: MissingAudio = "refuse",
    *,
    allow_outside: bool = False,
    on_bad_clip: OnBadClip = "refuse",
) -> tuple[TaskClips, tuple[str, ...]]:
    """The clips of ``task`` at ``path`` for fine-tuning, and notes on them to print.

    ``missing_audio``: what to do if files that the lists name are not there. A list may come from a stranger: what it names
    must lie in its own folder, unless ``allow_outside``; symbolic links in the folder are followed. ``on_bad_clip``: what to do about
    links that lead nowhere, and names that cannot be used.

    Raises:
        ValueError: no such folder, another layout, labels outside the class list, missing audio files, files outside.
    """
    path = Path(path)
    if missing_audio not in get_args(MissingAudio):
        raise ValueError(f"missing_audio must be one of {get_args(MissingAudio)}; found {missing_audio!r}")
    listing = task.read_for_training(path, allow_outside=allow_outside)
    if on_bad_clip == "refuse":
        refuse_unusable(listing, path)
    notes = [describe(listing), *listing.notes]
    absent = {clip.clip_id: clip.path for clip in listing.clips if not clip.path.is_file()}
    if absent or listing.missing:
        total = len(listing.clips) + len(listing.missing)
        first, where = next(iter(absent.items())) if absent else (listing.missing[0], path)
        found = f"{len(absent) + len(listing.missing)} of {total} audio files are missing, as {where} (clip {first!r})"
        if missing_audio == "refuse" or len(absent) == len(listing.clips):
            raise ValueError(f"{found}; to train without them: --missing-audio leave-out")
        notes.append(f"{found}; they are left out")
        there = tuple(clip for clip in listing.clips if clip.clip_id not in absent)
        listing = replace(listing, clips=there)
    return TaskClips(path, listing.class_names, listing.clips, task.label_space(listing)), tuple(notes)


def usable_durations(
    clips: TaskClips,
    on_bad_clip: OnBadClip = "refuse",
    before_clip: Callable[[], None] = lambda: None,
    rows: np.ndarray | None = None,
) -> list[float]:
    """The lengths of clips in seconds; of those that can be read, if bad ones are to be skipped.

    ``before_clip`` is called before each; it may raise. ``rows`` None: all clips.

    Raises:
        BadClipError: a clip that cannot be read, with ``on_bad_clip="refuse"``.
    """
    found = []
    chosen = range(len(clips)) if rows is None else rows.tolist()
    for row in progress(chosen, desc="lengths of clips", unit="clip", leave=False, delay=2):
        before_clip()
        try:
            found.append(clips.duration_seconds(row))
        except BadClipError:
            if on_bad_clip == "refuse":
                raise
    return found
