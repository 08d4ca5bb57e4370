"""Impulse responses of recording devices: convolved with one, a clip sounds as if that device had recorded it."""

from pathlib import Path

import numpy as np

from audio_datasets.audio import codec as audio_codec
from audio_datasets.tasks.audio_files import FolderWalk, is_audio


def load_impulse_responses(folder: Path, sample_rate_hz: int) -> list[np.ndarray]:
    """Every audio file in ``folder`` (at any depth, in order of its path) as float32 (samples,) of energy 1.

    Raises:
        ValueError: no such folder, none in it, or a file that is silent or cannot be decoded.
    """
    files = sorted(folder / name for name in FolderWalk(folder).files() if is_audio(name))
    if not files:
        raise ValueError(f"{folder} holds no impulse responses (audio files such as WAV)")
    responses = []
    for file in files:
        try:
            response = audio_codec.decode(file, sample_rate_hz)
        except ValueError as error:
            raise ValueError(f"impulse response {file}: {error}") from error
        energy = float(np.sqrt(np.sum(response.astype(np.float64) ** 2)))
        if energy == 0:
            raise ValueError(f"impulse response {file} is silent")
        responses.append((response / energy).astype(np.float32))
    return responses


def convolve(waveform: np.ndarray, response: np.ndarray) -> np.ndarray:
    """The first (samples,) of the convolution: as long as ``waveform`` and not delayed. float32."""
    samples = len(waveform) + len(response) - 1
    size = 1 << (samples - 1).bit_length()
    spectrum = np.fft.rfft(waveform, size) * np.fft.rfft(response, size)
    return np.fft.irfft(spectrum, size)[: len(waveform)].astype(np.float32)
