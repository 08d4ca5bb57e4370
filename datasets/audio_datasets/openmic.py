"""OpenMIC-2018: 20,000 music clips of 10 s; of most of the 20 instruments it is not known whether they play
(Humphrey et al., 2018)."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from audio_datasets.files import read_json
from audio_datasets.sources import AUDIO_SUFFIXES
from audio_datasets.task import Listing, Settings, Task, TaskClip

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
        for key in file.read_text(encoding="utf-8").split():
            if split_of.setdefault(key, split) != split:
                raise ValueError(f"sample {key!r} is in both {partitions['train']} and {partitions['test']}")
    if unknown := sorted(set(split_of) - set(keys)):
        raise ValueError(f"{folder / 'partitions'} names samples that are not in {archive.name}, as {unknown[0]!r}")

    names = np.array(class_names)
    clips = tuple(
        TaskClip(
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
    """Files lie in folders named like the first three characters of their keys."""
    official = folder / key[:3] / f"{key}.ogg"
    if official.is_file():
        return official
    others = (official.with_suffix(suffix) for suffix in sorted(AUDIO_SUFFIXES))
    return next((other for other in others if other.is_file()), official)


def _class_names(file: Path) -> tuple[str, ...]:
    numbers = read_json(file)
    if not isinstance(numbers, dict) or sorted(numbers.values()) != list(range(len(numbers))):
        raise ValueError(f"{file} must map each class name to its number, counted from 0")
    return tuple(sorted(numbers, key=numbers.get))


def _labels(archive: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Sample keys, likelihood (n, C) of each instrument, and bool (n, C): whether anyone listened for it."""
    try:
        with np.load(archive, allow_pickle=False) as arrays:
            missing = [name for name in ("Y_true", "Y_mask", "sample_key") if name not in arrays.files]
            if missing:
                raise ValueError(f"it has no arrays {missing}; found {arrays.files}")
            likelihood, known = arrays["Y_true"], arrays["Y_mask"].astype(bool)
        keys = _text_array(archive, "sample_key")
    except (ValueError, OSError, zipfile.BadZipFile, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{archive} cannot be read: {error}") from error
    return keys, likelihood, known


def _text_array(archive: Path, name: str) -> list[str]:
    """An array of text out of an .npz file, also where it was saved as Python objects, which NumPy writes as a pickle."""
    with zipfile.ZipFile(archive) as members, members.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
        dtype = read_header(file)[2]
        if dtype.hasobject:
            values = _TextUnpickler(file).load()
        else:
            with np.load(archive, allow_pickle=False) as arrays:
                values = arrays[name]
    texts = [value.decode() if isinstance(value, bytes) else value for value in np.asarray(values).tolist()]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} must hold text")
    return texts


class _TextUnpickler(pickle.Unpickler):
    """Rebuilds an array of objects of the built-in kinds, and refuses every name but those that this takes."""

    ALLOWED = ("_reconstruct", "ndarray", "dtype")

    def find_class(self, module: str, name: str) -> Any:
        if name in self.ALLOWED and module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray"):
            return getattr(np, name, None) or np._core.multiarray._reconstruct
        if (module, name) == ("_codecs", "encode"):  # how Python 2 and old protocols write bytes
            return lambda text, encoding: text.encode("latin1") if encoding == "latin1" else None
        raise pickle.UnpicklingError(f"a pickle inside names {module}.{name}; only arrays of text are read")


OPENMIC = Task(
    name="openmic",
    title="OpenMIC-2018",
    source="https://zenodo.org/records/1432913",
    licence="CC BY 4.0 (each clip has a Creative Commons licence of its own)",
    layout="a folder with openmic-2018.npz, class-map.json, partitions/split01_{train,test}.csv and audio/000/*.ogg …",
    read=read,
    settings={"mn": Settings(1e-5, 64), "dymn": Settings(2e-5, 32)},
    labels="several",
    clip_seconds=10.0,
    metric="mAP",
)
