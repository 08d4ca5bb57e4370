"""DCASE20: TAU Urban Acoustic Scenes 2020 Mobile, development set; ten scenes, recorded with nine devices, three of
which are only in the test split (Heittola, Mesaros and Virtanen, 2020)."""

from pathlib import Path, PurePosixPath

from audio_datasets.system.tables import read_csv_rows
from audio_datasets.tasks.audio_files import AudioFolder
from audio_datasets.tasks.listing import Clip, Listing
from audio_datasets.tasks.task import Task


def read(folder: Path) -> Listing:
    """``meta.csv``, ``evaluation_setup/fold1_{train,evaluate}.csv`` (tab-separated) and ``audio/``.

    Clips that neither list names, as the official split leaves some out, take no part. Each place of recording is a group, since
    all devices recorded there at once.
    """
    meta = folder / "meta.csv"
    lists = {split: folder / "evaluation_setup" / f"fold1_{name}.csv" for split, name in _LISTS.items()}
    for file in (meta, *lists.values()):
        if not file.is_file():
            raise ValueError(f"there is no file {file}")
    about = {
        row["filename"]: row
        for _, row in read_csv_rows(meta, ("filename", "scene_label", "identifier", "source_label"), delimiter="\t")
    }
    audio = AudioFolder(folder / "audio")
    clips = []
    for split, file in lists.items():
        for line, row in read_csv_rows(file, ("filename", "scene_label"), delimiter="\t"):
            name = row["filename"]
            if name not in about:
                raise ValueError(f"{file}, line {line}: {name} is not in {meta}")
            if row["scene_label"] != about[name]["scene_label"]:
                raise ValueError(
                    f"{file}, line {line}: {name} is {row['scene_label']!r}, and {about[name]['scene_label']!r} in {meta}"
                )
            clips.append(
                Clip(
                    PurePosixPath(name).stem,
                    audio.find(PurePosixPath(name).name),
                    (row["scene_label"],),
                    split=split,
                    group=about[name]["identifier"],
                    device=about[name]["source_label"],
                )
            )
    return Listing(tuple(sorted({row["scene_label"] for row in about.values()})), tuple(clips))


# fold1_test.csv is fold1_evaluate.csv without the labels.
_LISTS = {"train": "train", "test": "evaluate"}

DCASE20 = Task(
    name="dcase20",
    title="TAU Urban Acoustic Scenes 2020 Mobile",
    source="https://zenodo.org/records/3819968",
    licence="Tampere University's own: free for scientific, non-commercial use",
    layout="a folder with meta.csv, evaluation_setup/fold1_{train,evaluate}.csv (separated by tabs) and audio/*.wav",
    read=read,
    exclusive=True,
    clip_seconds=10.0,
    metric="macro_accuracy",
    recognises=lambda path: (path / "meta.csv").is_file() and (path / "evaluation_setup").is_dir(),
)
