"""The user's own sounds in a folder with one sub-folder per class."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from audio_datasets.audio.codec import AUDIO_SUFFIXES
from audio_datasets.tasks.listing import Clip, Listing
from audio_datasets.tasks.own_sounds import NONE_OF_THEM, UNKNOWN_LABELS, for_training, note_on_unlabelled
from audio_datasets.tasks.task import Task

UNLABELLED_FOLDERS = ("unlabelled", "unlabeled", UNKNOWN_LABELS)
"""Sub-folders with clips whose labels are unknown."""


def read(folder: Path) -> Listing:
    """One sub-folder per class, named like it, with audio files at any depth. Clip ids are paths relative to ``folder``.

    A sub-folder called ``unlabelled`` holds clips whose labels are unknown, one called ``(none)`` clips that have none of the
    classes.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    clips, ignored = [], []
    for file in sorted(folder.rglob("*"), key=lambda file: file.relative_to(folder).parts):
        relative = file.relative_to(folder)
        if not file.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        if len(relative.parts) > 1 and file.suffix.lower() in AUDIO_SUFFIXES:
            name = relative.as_posix()
            clips.append(Clip(clip_id=name, path=file, source=name, **_labels(relative.parts[0])))
        else:
            ignored.append(relative.as_posix())
    class_names = tuple(sorted({label for clip in clips for label in clip.labels}))
    listing = Listing(class_names, tuple(clips), layout="folders", ignored=tuple(ignored))
    return replace(listing, notes=note_on_unlabelled(listing))


def _labels(folder_name: str) -> dict[str, Any]:
    """What the name of a sub-folder says of its clips' labels."""
    if folder_name in UNLABELLED_FOLDERS:
        return {"labels": (), "known": ()}
    return {"labels": () if folder_name == NONE_OF_THEM else (folder_name,)}


def _has_sub_folders(path: Path) -> bool:
    return path.is_dir() and any(not child.name.startswith(".") and child.is_dir() for child in path.iterdir())


FOLDER = Task(
    name="folder",
    title="own sounds, a folder per class",
    source="your own recordings",
    licence="yours",
    layout="a folder with one sub-folder per class, and audio files of any rate and length in each (a sub-folder called "
    "unlabelled: clips with unknown labels)",
    read=read,
    recognises=_has_sub_folders,
    is_fallback=True,
    for_training=for_training,
)
