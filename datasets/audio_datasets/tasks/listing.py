"""The listing of a corpus: its classes and its clips, each with file, labels and split.

The reader of every corpus (``audio_datasets.corpora``) returns a ``Listing``; ``kd pack`` and ``kd finetune`` both work from it.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from audio_datasets.stores.names import as_on_disk, normal, problem_of
from audio_datasets.stores.waveform_rows import wav_of_row
from audio_datasets.system.messages import listed
from audio_datasets.tasks.audio_files import (
    AudioFolder as AudioFolder,
)  # where tasks outside of the package look for it
from audio_datasets.tasks.audio_files import passed_over_by_kind
from audio_datasets.tasks.label_space import LabelGroup, LabelSpace

Split = Literal["train", "valid", "test"]

CLIPS_AT_ONCE = 8_192


@dataclass(frozen=True, slots=True)
class Clip:
    """One clip of a corpus. What is not known of it is None."""

    clip_id: str
    """The same in `kd pack` and `kd finetune`; teacher logits are found by it."""
    path: Path
    labels: tuple[str, ...]
    """Its classes."""
    _: KW_ONLY
    source: str = ""
    """The file as the corpus names it: relative to its folder, with forward slashes (filled in from ``path`` if empty)."""
    known: tuple[str, ...] | None = None
    """The classes for which it is known whether the clip has them; None for all, () for a clip without labels."""
    split: str | None = None
    """As the corpus names it; "train", "valid" or "test" in fine-tuning (``Split``)."""
    fold: int | None = None
    group: str | None = None
    """Clips of one group, for example of one recording, belong on the same side of a split."""
    device: str | None = None
    """What it was recorded with."""
    row: int | None = None
    """Its row in ``path``, where that is an HDF5 file of waveforms (``stores.waveform_rows``); None for a file of its own."""
    seconds: float | None = None
    """Length that the corpus gives for the clip; a file that is much longer was not cut to it."""

    @property
    def audio(self) -> Path | bytes:
        """What decodes to it: its file, or the bytes of a WAV file made from its row. ValueError for a row that cannot be read."""
        return self.path if self.row is None else wav_of_row(self.path, self.row)

    @property
    def place(self) -> str:
        """Where its audio is, for people: its file, or "FILE[ROW]"."""
        return str(self.path) if self.row is None else f"{self.path}[{self.row}]"

    @property
    def is_labelled(self) -> bool:
        """Whether anything is known of its classes, if only that it has none of them."""
        return self.known is None or len(self.known) > 0


@dataclass(frozen=True)
class Listing:
    """All clips of a corpus in a fixed order, whether or not their audio is there."""

    class_names: tuple[str, ...]
    """The classes in the order of their numbers."""
    clips: tuple[Clip, ...]
    layout: str = ""
    """Name of the layout in which the corpus was found (filled in with the task's name if empty)."""
    notes: tuple[str, ...] = ()
    """Decisions made from the data; printed."""
    ignored: tuple[str, ...] = ()
    """Files that were ignored: not audio, or not in a place for clips."""
    unusable: tuple[tuple[str, str], ...] = ()
    """(file or folder, reason) of what may hold clips and cannot be used: links that lead nowhere, names that cannot be written.
    What is done about them is up to ``--on-bad-clip``."""
    missing: tuple[str, ...] = ()
    """Ids of clips that a list names without a file name, and for which no file was found."""
    label_space: LabelSpace | None = None
    """The groups of the classes, where there are several; None: one group, and ``Task.exclusive`` says of which kind."""

    def __post_init__(self) -> None:
        if self.label_space is not None and self.label_space.class_names != self.class_names:
            raise ValueError("the label groups and the class list have different classes")

    @property
    def missing_share(self) -> float:
        """The share of the corpus's clips that are missing, from 0 to 1."""
        return len(self.missing) / max(1, len(self.missing) + len(self.clips))


def checked(listing: Listing, path: Path, layout: str, *, allow_outside: bool) -> Listing:
    """The listing with sources and layout filled in, all names in one Unicode form, and unusable names moved to ``unusable``.

    Raises:
        ValueError: no clips; an id that is repeated; a file outside of the corpus's own folder, unless ``allow_outside``.
    """
    folder = path if path.is_dir() else path.parent
    listing = _with_usable_names(replace(listing, layout=listing.layout or layout), folder)
    if not listing.clips:
        found = f"; {describe_unusable(listing)}" if listing.unusable else ""
        raise ValueError(f"{path} (layout {listing.layout}) has no audio files{found}")
    if not allow_outside:
        _refuse_outside(path, folder, listing.clips)
    check_ids(path, listing.clips)
    return listing


def check_ids(path: Path | str, clips: Sequence[Clip]) -> None:
    """Raises ValueError unless every clip has a unique id that can be printed and written."""
    seen: dict[str, Clip] = {}
    for clip in clips:
        if problem := problem_of(clip.clip_id):
            raise ValueError(
                f"{path}: clip ids must be printable text and not empty; found {clip.clip_id!r}: {problem}"
            )
        if clip.clip_id in seen:
            files = f"{seen[clip.clip_id].source or seen[clip.clip_id].path} and {clip.source or clip.path}"
            raise ValueError(f"{path}: clip ids must be unique; found more than once: {clip.clip_id!r} ({files})")
        seen[clip.clip_id] = clip


def _with_usable_names(listing: Listing, folder: Path) -> Listing:
    """The listing in Unicode's form C, which files are found in whichever form they have, without names that cannot be used."""
    clips: list[Clip] = []
    unusable = list(listing.unusable)
    written: dict[str, str] = {}  # the ids that are not plain ASCII, as they were before
    for clip in listing.clips:
        clip = clip if clip.source else replace(clip, source=_relative(clip.path, folder))
        if problem := problem_of(clip.clip_id):
            unusable.append((clip.source, problem))
            continue
        if all(map(str.isascii, (clip.clip_id, clip.source, *_names_of(clip)))):
            clips.append(clip)
            continue
        found = _normal_clip(clip, folder)
        if written.setdefault(found.clip_id, clip.clip_id) != clip.clip_id:
            unusable.append((clip.source, f"the same name as {written[found.clip_id]!r}, in another Unicode form"))
        else:
            clips.append(found)
    return replace(_normal_classes(listing, clips), clips=tuple(clips), unusable=tuple(unusable))


def _names_of(clip: Clip) -> Iterable[str]:
    return (*clip.labels, *(clip.known or ()), *filter(None, (clip.split, clip.group, clip.device)))


def _normal_clip(clip: Clip, folder: Path) -> Clip:
    """The clip with every name but its source's in form C, and the path that the file has on disk."""
    labels = tuple(dict.fromkeys(map(normal, clip.labels)))
    known = None if clip.known is None else tuple(dict.fromkeys(map(normal, clip.known)))
    split, group, device = (name and normal(name) for name in (clip.split, clip.group, clip.device))
    path = clip.path if os.path.lexists(clip.path) else as_on_disk(folder, clip.source)
    return replace(
        clip,
        clip_id=normal(clip.clip_id),
        path=path,
        labels=labels,
        known=known,
        split=split,
        group=group,
        device=device,
    )


def _normal_classes(listing: Listing, clips: Sequence[Clip]) -> Listing:
    """The listing with its classes in form C; a name that cannot be used goes with its clips."""
    lost: set[str] = set()
    if len(clips) < len(listing.clips):
        used = {label for clip in clips for label in clip.labels}
        lost = {label for clip in listing.clips for label in clip.labels if label not in used and problem_of(label)}
    class_names = tuple(dict.fromkeys(normal(name) for name in listing.class_names if name not in lost))
    space = listing.label_space
    if space is not None and class_names != listing.class_names:
        groups = (LabelGroup(g.name, tuple(map(normal, g.class_names)), g.exclusive) for g in space.groups)
        space = LabelSpace(tuple(groups))
    return replace(listing, class_names=class_names, label_space=space)


def refuse_unusable(listing: Listing, path: Path) -> None:
    """ValueError, naming them, if there are files or folders that cannot be used."""
    if listing.unusable:
        raise ValueError(f"{path}: {describe_unusable(listing)}; leave them out with --on-bad-clip skip")


def describe_unusable(listing: Listing) -> str:
    """How many files and folders cannot be used, and the first of them with the reason."""
    count = len(listing.unusable)
    shown = ", ".join(f"{name!r} ({reason})" for name, reason in listing.unusable[:5])
    what = "1 file or folder" if count == 1 else f"{count:,} files or folders"
    return f"{what} cannot be used: {shown}{' …' if count > 5 else ''}"


def label_matrix(path: Path | str, clips: Sequence[Clip], class_names: Sequence[str]) -> np.ndarray:
    """bool (n, C): true where a clip has the class. ValueError for a label that is not in the class list."""
    return _matrix(path, clips, [clip.labels for clip in clips], class_names)


def known_matrix(path: Path | str, clips: Sequence[Clip], class_names: Sequence[str]) -> np.ndarray | None:
    """bool (n, C): true where it is known whether a clip has the class; None if no clip says."""
    if all(clip.known is None for clip in clips):
        return None
    return _matrix(path, clips, [class_names if clip.known is None else clip.known for clip in clips], class_names)


def _matrix(
    path: Path | str, clips: Sequence[Clip], names_of_clips: Sequence[Sequence[str]], class_names: Sequence[str]
) -> np.ndarray:
    index_of = {name: index for index, name in enumerate(class_names)}
    matrix = np.zeros((len(clips), len(class_names)), dtype=bool)
    for row, names in enumerate(names_of_clips):
        unknown = [name for name in names if name not in index_of]
        if unknown:
            raise ValueError(
                f"{path}: clip {clips[row].clip_id!r} has labels outside the class list: {listed(unknown)}; the classes are "
                f"{listed(class_names)}"
            )
        matrix[row, [index_of[name] for name in names]] = True
    return matrix


def check_labels(path: Path | str, clips: Sequence[Clip], label_space: LabelSpace) -> None:
    """Raises ValueError, naming a clip, unless each clip with known labels has exactly one class of each exclusive group."""
    if not any(group.exclusive for group in label_space.groups):
        return
    for start in range(0, len(clips), CLIPS_AT_ONCE):  # the whole matrix of a large corpus takes gigabytes
        part = clips[start : start + CLIPS_AT_ONCE]
        targets, known = (matrix(path, part, label_space.class_names) for matrix in (label_matrix, known_matrix))
        known = np.ones_like(targets) if known is None else known
        label_space.check_targets(targets, known, [clip.clip_id for clip in part], path)


def in_our_splits(listing: Listing, path: Path, names: Mapping[str, Split]) -> Listing:
    """The listing with its splits renamed: lower-case name in the corpus -> ours. ValueError for a split that has no entry."""
    wrong = next((clip for clip in listing.clips if clip.split is not None and clip.split.lower() not in names), None)
    if wrong is not None:
        raise ValueError(
            f"{path}: clip {wrong.clip_id!r} is in split {wrong.split!r}; the splits are train, valid and test (also: "
            f"{', '.join(sorted(names))})"
        )
    clips = (clip if clip.split is None else replace(clip, split=names[clip.split.lower()]) for clip in listing.clips)
    return replace(listing, clips=tuple(clips))


def describe(listing: Listing) -> str:
    """One line on what was found, for the start of a run."""
    text = f"{len(listing.clips)} clips with {len(listing.class_names)} labels (layout: {listing.layout})"
    if listing.ignored:
        count = len(listing.ignored)
        files = "1 file" if count == 1 else f"{count:,} files"
        text += f"; skipped {files}: {passed_over_by_kind(listing.ignored)}, as {listed(listing.ignored, limit=3)}"
    if listing.unusable:
        text += f"; {describe_unusable(listing)}"
    if listing.missing:
        text += (
            f"; no audio for {len(listing.missing)} more ({100 * listing.missing_share:.1f} % of those listed): "
            f"{listed(listing.missing, limit=3)}"
        )
    return text


def one_label_each(clips: Iterable[Clip], class_names: Sequence[str]) -> bool:
    """Whether every clip has exactly one class, and all labels are known; clips of which nothing is known do not count."""
    every = set(class_names)
    labelled = [clip for clip in clips if clip.is_labelled]
    return bool(labelled) and all(
        len(clip.labels) == 1 and (clip.known is None or every <= set(clip.known)) for clip in labelled
    )


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _refuse_outside(path: Path, folder: Path, clips: Sequence[Clip]) -> None:
    """Raises ValueError for a clip whose path, as written in the corpus, leads out of the corpus's folder.

    Symbolic links inside the folder are followed, because the owner of the disk made them, not the author of the list.
    """
    root = os.path.abspath(folder)
    outside = [clip.source for clip in clips if _leads_out(clip.source, root)]
    if outside:
        raise ValueError(
            f"{path} names {len(outside)} files outside of its own folder: {listed(outside, limit=3)}; paths are relative to "
            "the list and stay below it. If you trust the list, take them with --allow-outside"
        )


def _leads_out(source: str, root: str) -> bool:
    if os.path.isabs(source):
        return not os.path.normpath(source).startswith(os.path.join(root, ""))
    return ".." in os.path.normpath(source).split(os.sep) or os.path.normpath(source) == os.curdir
