"""ESC-50: 2,000 environmental recordings of 5 s in 50 classes, five official folds (Piczak, 2015)."""

from pathlib import Path

from audio_datasets.audio.codec import AUDIO_SUFFIXES
from audio_datasets.system.tables import read_csv_rows, whole_number
from audio_datasets.tasks.listing import Clip, Listing
from audio_datasets.tasks.task import Task


def read(folder: Path) -> Listing:
    """``meta/esc50.csv`` (filename, fold, target, category, src_file …) and ``audio/``.

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
        number = whole_number(row.get("target"), f"{table}, line {line}: target")
        order.setdefault(label, number if number is not None else len(order))
        clips.append(
            Clip(
                clip_id=named.stem,
                path=path,
                source=path.relative_to(folder).as_posix(),
                labels=(label,),
                fold=whole_number(row.get("fold"), f"{table}, line {line}: fold"),
                group=row.get("src_file") or None,
            )
        )
    return Listing(tuple(sorted(order, key=lambda label: (order[label], label))), tuple(clips))


def with_folds(listing: Listing, folder: Path) -> Listing:
    """The listing as it is; ValueError if a clip has no fold."""
    for clip in listing.clips:
        if clip.fold is None:
            raise ValueError(f"{folder / 'meta' / 'esc50.csv'} gives clip {clip.clip_id!r} no fold")
    return listing


ESC50 = Task(
    name="esc50",
    title="ESC-50",
    source="https://github.com/karolpiczak/ESC-50",
    licence="CC BY-NC 3.0 (its subset ESC-10: CC BY 3.0)",
    layout="a folder with meta/esc50.csv (filename, fold, target, category, src_file) and audio/*.wav (or another format)",
    read=read,
    exclusive=True,
    clip_seconds=5.0,
    metric="accuracy",
    recognises=lambda path: (path / "meta" / "esc50.csv").is_file(),
    for_training=with_folds,
)
