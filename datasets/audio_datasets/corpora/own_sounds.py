"""The user's own sounds: a folder with one sub-folder per class, or a list of files as CSV or Parquet."""

from pathlib import Path

from audio_datasets.corpora.sources import Source, describe, read_folders, read_manifest_file
from audio_datasets.system.messages import listed
from audio_datasets.tasks.task import Listing, Settings, Task, TaskClip

SPLITS = {
    **dict.fromkeys(("train", "training", "dev"), "train"),
    **dict.fromkeys(("valid", "val", "validation"), "valid"),
    **dict.fromkeys(("test", "eval", "evaluation"), "test"),
}


def read_folder(folder: Path) -> Listing:
    """One sub-folder per class, named like it, with audio files at any depth."""
    return _listing(read_folders(folder), folder)


def read_manifest(file: Path) -> Listing:
    """A CSV or Parquet file with the columns clip_id, path, labels (separated by ";") and perhaps split, fold, group."""
    return _listing(read_manifest_file(file), file)


def _listing(source: Source, path: Path) -> Listing:
    if not source.clips:
        raise ValueError(f"{path} holds no audio files")
    if len(source.label_names) < 2:
        raise ValueError(f"{path} has {len(source.label_names)} classes ({listed(source.label_names)}); two are needed")
    clips = []
    for clip in source.clips:
        if clip.split is not None and clip.split.lower() not in SPLITS:
            raise ValueError(
                f"{path}: clip {clip.clip_id!r} is in split {clip.split!r}; the splits are train, valid and test (also: "
                f"{', '.join(sorted(SPLITS))})"
            )
        split = SPLITS[clip.split.lower()] if clip.split is not None else None
        clips.append(TaskClip(clip.clip_id, clip.path, clip.labels, split=split, fold=clip.fold, group=clip.group))
    several = next((clip for clip in clips if len(clip.labels) != 1), None)
    kind = "every clip has one label, so they exclude each other (single-label)"
    if several is not None:
        kind = f"multi-label, since clip {several.clip_id!r} has {len(several.labels)} labels"
    return Listing(source.label_names, tuple(clips), notes=(describe(source), kind))


_SETTINGS = {"mn": Settings(1e-4, 16), "dymn": Settings(1e-4, 16)}

FOLDER = Task(
    name="folder",
    title="own sounds, a folder per class",
    source="your own recordings",
    licence="yours",
    layout="a folder with one sub-folder per class, and audio files of any rate and length in each",
    read=read_folder,
    settings=_SETTINGS,
)

MANIFEST = Task(
    name="manifest",
    title="own sounds, listed",
    source="your own recordings",
    licence="yours",
    layout="a CSV or Parquet file with the columns clip_id, path, labels (separated by ';') and perhaps split, fold, group",
    read=read_manifest,
    settings=_SETTINGS,
)
