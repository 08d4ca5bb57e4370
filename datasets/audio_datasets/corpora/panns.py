"""AudioSet, or other clips of one length, as PANNs packs them: ``waveforms.h5`` with names, waveforms and targets."""

import os
from dataclasses import replace
from pathlib import Path

from audio_datasets.audio.codec import AUDIO_SUFFIXES
from audio_datasets.corpora.audioset import CLASS_LIST, SPLITS
from audio_datasets.stores.class_lists import read_class_names
from audio_datasets.stores.waveform_rows import DATASETS, is_waveform_file, read_rows
from audio_datasets.tasks.listing import Clip, Listing
from audio_datasets.tasks.task import Task


def read(path: Path, class_list: Path | None = None) -> Listing:
    """The rows of such a file. Clip ids are the names in it without suffix: of AudioSet, ``Y`` and the YouTube id.

    The file does not hold its classes: they are those of ``class_list``, or of the ``class_labels_indices.csv`` beside it. A clip's
    split is told by the file's name, if that begins like one of AudioSet's lists.

    Raises:
        ValueError: no class list, one of another length, or a file of another kind.
    """
    beside = path.parent / CLASS_LIST
    if class_list is None and not beside.is_file():
        raise ValueError(
            f"{path} does not hold its class names: give --class-names, or put AudioSet's {CLASS_LIST} beside it"
        )
    class_names = read_class_names(class_list or beside)
    rows = read_rows(path)
    if rows.num_classes != len(class_names):
        raise ValueError(
            f"{path} has targets for {rows.num_classes} classes; {class_list or beside} has {len(class_names)}"
        )
    split = next((name for name in SPLITS if path.stem.startswith(name)), None)
    clips = tuple(
        Clip(
            clip_id=_stem(name),
            path=path,
            source=f"{path.name}[{row}]",
            labels=tuple(class_names[index] for index in classes),
            split=split,
            row=row,
        )
        for row, (name, classes) in enumerate(zip(rows.names, rows.classes, strict=True))
    )
    return Listing(class_names, clips)


def _stem(name: str) -> str:
    stem, suffix = os.path.splitext(os.path.basename(name))
    return stem if suffix.lower() in AUDIO_SUFFIXES else name


def _without_splits(listing: Listing, path: Path) -> Listing:
    """One file is one of AudioSet's lists: for fine-tuning on it alone, some of its own clips are held out for testing."""
    return replace(listing, clips=tuple(replace(clip, split=None) for clip in listing.clips))


PANNS = Task(
    name="panns",
    title="waveforms packed by PANNs",
    source="https://github.com/qiuqiangkong/audioset_tagging_cnn",
    licence="that of the clips",
    layout=f"an HDF5 file with the datasets {', '.join(DATASETS)} and the attribute sample_rate, and {CLASS_LIST} beside it",
    read=read,
    exclusive=False,
    metric="mAP",
    recognises=is_waveform_file,
    for_training=_without_splits,
    read_with_classes=read,
)
