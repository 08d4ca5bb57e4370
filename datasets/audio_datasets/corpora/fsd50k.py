"""FSD50K: 51,197 Freesound clips of 0.3 to 30 s with any of 200 classes (Fonseca et al., 2022)."""

import csv
import io
from pathlib import Path

from audio_datasets.system.files import read_text
from audio_datasets.system.tables import read_csv_rows
from audio_datasets.tasks.audio_files import AudioFolder
from audio_datasets.tasks.listing import Clip, Listing
from audio_datasets.tasks.task import Task

SPLITS = {"train": "train", "val": "valid"}


def read(folder: Path) -> Listing:
    """``FSD50K.ground_truth/{vocabulary,dev,eval}.csv`` and the folders of audio beside it, split as published."""
    truth = folder / "FSD50K.ground_truth"
    for name in ("vocabulary.csv", "dev.csv", "eval.csv"):
        if not (truth / name).is_file():
            raise ValueError(f"there is no file {truth / name}")
    class_names = _vocabulary(truth / "vocabulary.csv")
    clips = []
    for part in ("dev", "eval"):
        audio = AudioFolder(folder / f"FSD50K.{part}_audio")
        required = ("fname", "labels", "split") if part == "dev" else ("fname", "labels")
        for line, row in read_csv_rows(truth / f"{part}.csv", required):
            split = row["split"] if part == "dev" else None
            if part == "dev" and split not in SPLITS:
                raise ValueError(f"{truth / 'dev.csv'}, line {line}: split is train or val; found {split!r}")
            labels = tuple(label.strip() for label in row["labels"].split(",") if label.strip())
            clips.append(Clip(row["fname"], audio.find(row["fname"]), labels, split=SPLITS[split] if split else "test"))
    return Listing(class_names, tuple(clips))


def _vocabulary(file: Path) -> tuple[str, ...]:
    """Class names in the order of their numbers. The file has no header: number, name, AudioSet's id."""
    try:
        rows = [row for row in csv.reader(io.StringIO(read_text(file), newline=""), strict=True) if row]
    except csv.Error as error:
        raise ValueError(f"{file} is not a CSV file: {error}") from error
    for line, row in enumerate(rows, start=1):
        if len(row) not in (2, 3) or row[0] != str(line - 1):
            raise ValueError(f"{file}, line {line}: expected {line - 1},NAME,ID; found {','.join(row)!r}")
    return tuple(row[1] for row in rows)


FSD50K = Task(
    name="fsd50k",
    title="FSD50K",
    source="https://zenodo.org/records/4060432",
    licence="CC BY 4.0 (each clip has a Creative Commons licence of its own)",
    layout="a folder with FSD50K.ground_truth/{dev,eval,vocabulary}.csv, FSD50K.dev_audio/ and FSD50K.eval_audio/",
    read=read,
    exclusive=False,
    clip_seconds=10.0,
    metric="mAP",
    recognises=lambda path: (path / "FSD50K.ground_truth").is_dir(),
)
