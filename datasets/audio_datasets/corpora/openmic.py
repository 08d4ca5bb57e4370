"""OpenMIC-2018: 20,000 music clips of 10 s; of most of the 20 instruments it is not known whether they play
(Humphrey et al., 2018)."""

from pathlib import Path

import numpy as np

from audio_datasets.audio.codec import AUDIO_SUFFIXES
from audio_datasets.system.files import read_arrays, read_json, read_text
from audio_datasets.system.plain_pickle import plain_pickle
from audio_datasets.tasks.listing import Clip, Listing
from audio_datasets.tasks.task import Task

PRESENT = 0.5
"""A label above this likelihood counts as present."""


def read(folder: Path) -> Listing:
    """``openmic-2018.npz``, ``class-map.json``, ``partitions/split01_{train,test}.csv`` and ``audio/XXX/KEY.ogg``."""
    archive, class_map = folder / "openmic-2018.npz", folder / "class-map.json"
    partitions = {split: folder / "partitions" / f"split01_{split}.csv" for split in ("train", "test")}
    for file in (archive, class_map, *partitions.values()):
        if not file.is_file():
            raise ValueError(f"there is no file {file}")
    class_names = _class_names(class_map)
    keys, likelihood, known = _labels(archive)
    if likelihood.shape != (len(keys), len(class_names)) or known.shape != likelihood.shape:
        raise ValueError(
            f"{archive}: Y_true {likelihood.shape} and Y_mask {known.shape} do not fit {len(keys)} sample keys and "
            f"{len(class_names)} classes"
        )
    split_of = {}
    for split, file in partitions.items():
        for key in read_text(file).split():
            if split_of.setdefault(key, split) != split:
                raise ValueError(f"sample {key!r} is in both {partitions['train']} and {partitions['test']}")
    if unknown := sorted(set(split_of) - set(keys)):
        raise ValueError(f"{folder / 'partitions'} names samples that are not in {archive.name}, as {unknown[0]!r}")

    names = np.array(class_names)
    clips = tuple(
        Clip(
            key,
            _audio_file(folder / "audio", key),
            labels=tuple(names[mask & (values > PRESENT)].tolist()),
            known=tuple(names[mask].tolist()),
            split=split_of[key],
        )
        for key, values, mask in zip(keys, likelihood, known, strict=True)
        if key in split_of
    )
    return Listing(class_names, clips)


def _audio_file(folder: Path, key: str) -> Path:
    """Files lie in folders named like the first three characters of their keys. ValueError for what is no name of a file."""
    if "/" in key or "\0" in key or key[:3] in (".", ".."):
        raise ValueError(f"{folder} can hold no file for the sample {key!r}")
    official = folder / key[:3] / f"{key}.ogg"
    if official.is_file():
        return official
    others = (official.with_suffix(suffix) for suffix in sorted(AUDIO_SUFFIXES))
    return next((other for other in others if other.is_file()), official)


def _class_names(file: Path) -> tuple[str, ...]:
    numbers = read_json(file)
    if (
        not isinstance(numbers, dict)
        or not all(type(number) is int for number in numbers.values())
        or sorted(numbers.values()) != list(range(len(numbers)))
    ):
        raise ValueError(f"{file} must map each class name to its number, counted from 0")
    return tuple(sorted(numbers, key=numbers.get))


def _labels(archive: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Sample keys, likelihood (n, C) of each instrument, and bool (n, C): whether anyone listened for it."""
    arrays = read_arrays(archive, plain_pickle)  # the official file holds the keys as Python objects
    missing = [name for name in ("Y_true", "Y_mask", "sample_key") if name not in arrays]
    if missing:
        raise ValueError(f"{archive} has no arrays {missing}; found {sorted(arrays)}")
    likelihood, known, found = arrays["Y_true"], arrays["Y_mask"], arrays["sample_key"]
    if likelihood.dtype.kind != "f" or not np.isfinite(likelihood).all() or known.dtype.kind not in "biu":
        raise ValueError(
            f"{archive}: Y_true must hold finite numbers and Y_mask truth values; found {likelihood.dtype}, {known.dtype}"
        )
    keys = (
        [key.decode("latin1") if isinstance(key, bytes) else key for key in found.tolist()] if found.ndim == 1 else []
    )
    if not keys or not all(isinstance(key, str) for key in keys):
        raise ValueError(f"{archive}: sample_key must hold text; found {found.dtype} {found.shape}")
    return keys, likelihood, known.astype(bool)


OPENMIC = Task(
    name="openmic",
    title="OpenMIC-2018",
    source="https://zenodo.org/records/1432913",
    licence="CC BY 4.0 (each clip has a Creative Commons licence of its own)",
    layout="a folder with openmic-2018.npz, class-map.json, partitions/split01_{train,test}.csv and audio/000/*.ogg …",
    read=read,
    exclusive=False,
    clip_seconds=10.0,
    metric="mAP",
    recognises=lambda path: (path / "openmic-2018.npz").is_file(),
)
