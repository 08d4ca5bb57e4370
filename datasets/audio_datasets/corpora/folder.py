"""The user's own sounds in a folder with one sub-folder per class."""

from pathlib import Path

from audio_datasets.audio.codec import AUDIO_SUFFIXES
from audio_datasets.tasks.listing import Clip, Listing
from audio_datasets.tasks.own_sounds import for_training
from audio_datasets.tasks.task import Task


def read(folder: Path) -> Listing:
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
            clips.append(Clip(clip_id=name, path=file, source=name, labels=(relative.parts[0],)))
        else:
            ignored.append(relative.as_posix())
    class_names = tuple(sorted({clip.labels[0] for clip in clips}))
    return Listing(class_names, tuple(clips), layout="folders", ignored=tuple(ignored))


def _has_sub_folders(path: Path) -> bool:
    return path.is_dir() and any(not child.name.startswith(".") and child.is_dir() for child in path.iterdir())


FOLDER = Task(
    name="folder",
    title="own sounds, a folder per class",
    source="your own recordings",
    licence="yours",
    layout="a folder with one sub-folder per class, and audio files of any rate and length in each",
    read=read,
    recognises=_has_sub_folders,
    is_fallback=True,
    for_training=for_training,
)
