"""HDF5 files of waveforms, a row for each clip, as PANNs packs AudioSet: ``audio_name``, ``waveform``, ``target``.

They come from the code of Kong et al., "PANNs: Large-scale pretrained audio neural networks for audio pattern recognition", 2020:
int16 (clips, samples), all of one length, the shorter ones filled up with zeros, and the rate as the attribute ``sample_rate``.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import soundfile

from audio_datasets.stores.hdf5_arrays import dataset_of, open_hdf5, plain_hdf5_errors
from audio_datasets.system.paths.sizes import require_room

DATASETS = ("audio_name", "waveform", "target")
SUFFIXES = (".h5", ".hdf5")
ROWS_AT_ONCE = 8_192
OBJECT_BYTES = 100
"""What Python needs for a small object: each clip's name and classes."""
KIND = "file of waveforms"


@dataclass(frozen=True)
class WaveformRows:
    """What such a file says of its clips, besides their audio."""

    names: list[str]
    """Names of the files that the clips were made from."""
    classes: list[np.ndarray]
    """The indices of each clip's classes."""
    num_classes: int


def is_waveform_file(path: Path) -> bool:
    """Whether a file is HDF5 with those datasets."""
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        return False
    try:
        with open_hdf5(path) as file:
            return all(name in file for name in DATASETS)
    except (ValueError, OSError):
        return False


def read_rows(path: Path) -> WaveformRows:
    """Names and classes of all rows. ValueError, with the path, for a file of another kind, or arrays that do not fit."""
    with plain_hdf5_errors(path, KIND), open_hdf5(path) as file:
        names, waveform, target = (dataset_of(file, name) for name in DATASETS)
        clips = len(names)
        _check_waveforms(path, file, waveform)
        if target.ndim != 2 or target.dtype.kind not in "biu" or len(target) != clips or len(waveform) != clips:
            raise ValueError(
                f"{path} has {clips} names, waveforms {waveform.shape} and targets {target.dtype} {target.shape}; expected a row "
                "of each for every clip, and truth values as targets"
            )
        require_room(
            path, clips * (len(DATASETS) * OBJECT_BYTES + names.dtype.itemsize), "the description of its clips"
        )
        found = [name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in names[:]]
        classes: list[np.ndarray] = []
        for start in range(0, clips, ROWS_AT_ONCE):
            classes += [np.flatnonzero(row) for row in target[start : start + ROWS_AT_ONCE]]
        return WaveformRows(found, classes, target.shape[1])


def wav_of_row(path: Path, row: int) -> bytes:
    """One row as a WAV file, sample for sample. ValueError, with the path, if it cannot be read."""
    with plain_hdf5_errors(path, KIND), open_hdf5(path) as file:
        waveform = dataset_of(file, "waveform")
        rate = _check_waveforms(path, file, waveform)
        require_room(
            path, 3 * waveform.shape[1] * waveform.dtype.itemsize, "each of its clips"
        )  # read, written, copied
        samples = waveform[row]
    subtype = "PCM_16" if samples.dtype == np.int16 else "FLOAT"
    content = io.BytesIO()
    soundfile.write(content, samples, rate, format="WAV", subtype=subtype)
    return content.getvalue()


def row_bytes(path: Path) -> int:
    """How many bytes the samples of one row take."""
    with plain_hdf5_errors(path, KIND), open_hdf5(path) as file:
        waveform = dataset_of(file, "waveform")
        return waveform.shape[1] * waveform.dtype.itemsize


def _check_waveforms(path: Path, file: h5py.File, waveform: h5py.Dataset) -> int:
    """The sample rate, in Hz. ValueError for waveforms of another kind, or without a rate."""
    if waveform.ndim != 2 or waveform.dtype not in (np.dtype(np.int16), np.dtype(np.float32)):
        raise ValueError(
            f"{path}: waveform is {waveform.dtype} {waveform.shape}; expected int16 or float32 (clips, samples)"
        )
    rate = file.attrs.get("sample_rate")
    if rate is None or np.size(rate) != 1 or not 0 < float(np.asarray(rate).reshape(())) < 2**31:
        raise ValueError(
            f"{path} does not say its sample rate: expected the attribute 'sample_rate' in Hz; found {rate!r}"
        )
    return int(np.asarray(rate).reshape(()))
