"""ESC-50: 2,000 environmental recordings of 5 s in 50 classes, five official folds (Piczak, 2015)."""

from pathlib import Path

from audio_datasets.corpora.sources import read_esc50
from audio_datasets.tasks.task import Listing, Settings, Task, TaskClip


def read(folder: Path) -> Listing:
    """``meta/esc50.csv`` and ``audio/``; clips cut from one recording (``src_file``) are a group."""
    source = read_esc50(folder)
    for clip in source.clips:
        if clip.fold is None:
            raise ValueError(f"{folder / 'meta' / 'esc50.csv'} gives clip {clip.clip_id!r} no fold")
    clips = tuple(
        TaskClip(clip.clip_id, clip.path, clip.labels, fold=clip.fold, group=clip.group) for clip in source.clips
    )
    return Listing(source.label_names, clips)


ESC50 = Task(
    name="esc50",
    title="ESC-50",
    source="https://github.com/karolpiczak/ESC-50",
    licence="CC BY-NC 3.0 (its subset ESC-10: CC BY 3.0)",
    layout="a folder with meta/esc50.csv (filename, fold, target, category, src_file) and audio/*.wav (or another format)",
    read=read,
    settings={"mn": Settings(6e-5, 128), "dymn": Settings(4e-5, 64)},
    labels="one",
    clip_seconds=5.0,
    metric="accuracy",
)
