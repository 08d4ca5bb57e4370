"""The interface of the HEAR challenge (Holistic Evaluation of Audio Representations, Turian et al. 2022), for any tagger.

Its evaluation kit imports a module by name and calls three functions of it: ``load_model``, ``get_scene_embeddings`` and
``get_timestamp_embeddings``. This is that module: ``kd.deploy.hear``, with a run folder, an export folder or NAME@WEIGHTS as the model.

Shapes: n sounds, N samples, T timestamps, E embedding size.
"""

import numpy as np
import torch
from torch import Tensor, nn

from kd.deploy.tagging.model import with_window
from kd.deploy.tagging.tagger import Tagger

TIMESTAMP_HOP_SECONDS = 0.05
"""The largest distance that the challenge recommends."""
TIMESTAMP_WINDOW_SECONDS = 0.16
BATCH_WINDOWS = 64


class HearModel(nn.Module):
    """What ``load_model`` gives, with the attributes that the challenge asks for."""

    def __init__(self, tagger: Tagger, window_seconds: float, hop_seconds: float) -> None:
        super().__init__()
        self.tagger = tagger
        model = tagger.model
        self.sample_rate = tagger.window.sample_rate_hz
        self.scene_embedding_size = self.timestamp_embedding_size = model.embedding_dim
        self.timestamp_model = model if model.fixed_length else with_window(model, window_seconds)
        if not 1 / self.sample_rate <= hop_seconds <= 3600:
            raise ValueError(f"timestamps lie one sample to 3600 s apart; found {hop_seconds:g} s")
        self.hop_seconds = hop_seconds

    def forward(self, audio: Tensor) -> Tensor:
        """(n, N) -> (n, E): scene embeddings"""
        return get_scene_embeddings(audio, self)


def load_model(
    model_file_path: str = "",
    timestamp_window_seconds: float = TIMESTAMP_WINDOW_SECONDS,
    timestamp_hop_seconds: float = TIMESTAMP_HOP_SECONDS,
) -> HearModel:
    """
    Args:
        model_file_path: a run folder, an export folder, or NAME@WEIGHTS.
        timestamp_window_seconds: how much of the audio around a timestamp its embedding hears. A model that takes windows of one
            length only hears that.

    Raises:
        ValueError: no such model, or a window or hop that cannot be.
    """
    if not model_file_path:
        raise ValueError("give a run folder, an export folder, or NAME@WEIGHTS as the model's path")
    return HearModel(Tagger.load(model_file_path), timestamp_window_seconds, timestamp_hop_seconds)


def get_scene_embeddings(audio: Tensor, model: HearModel) -> Tensor:
    """(n, N) at ``model.sample_rate``, in [-1, 1] -> (n, E) float32, on the audio's device; as in evaluation."""
    _check(audio)
    tags = model.tagger(audio, model.sample_rate)
    return torch.from_numpy(np.stack([found.embedding for found in tags])).to(audio.device)


def get_timestamp_embeddings(audio: Tensor, model: HearModel) -> tuple[Tensor, Tensor]:
    """(n, N) -> embeddings (n, T, E), and timestamps (n, T) in milliseconds, both float32 on the audio's device.

    A window is centred at each timestamp, from the start of the audio to its end; what it lacks there is silence.
    """
    _check(audio)
    waveforms = audio.detach().float().cpu().numpy()
    rate, size = model.sample_rate, model.timestamp_model.window.samples
    seconds = np.arange(int(waveforms.shape[1] / rate / model.hop_seconds + 1e-9) + 1) * model.hop_seconds
    padded = np.pad(waveforms, ((0, 0), (size // 2, size)))
    starts = np.round(seconds * rate).astype(np.int64)
    embeddings = np.stack([_embeddings(waveform, starts, model) for waveform in padded])
    timestamps = torch.from_numpy(1000 * seconds).float().repeat(len(waveforms), 1)
    return torch.from_numpy(embeddings).to(audio.device), timestamps.to(audio.device)


def _embeddings(waveform: np.ndarray, starts: np.ndarray, model: HearModel) -> np.ndarray:
    """(any,), starts (T,) -> (T, E)"""
    size, found = model.timestamp_model.window.samples, []
    for first in range(0, len(starts), BATCH_WINDOWS):
        windows = np.stack([waveform[start : start + size] for start in starts[first : first + BATCH_WINDOWS]])
        found.append(model.timestamp_model.run(windows)[1])
    return np.concatenate(found)


def _check(audio: Tensor) -> None:
    if audio.ndim != 2 or audio.numel() == 0:
        raise ValueError(f"audio must have shape (sounds, samples), with samples; found {tuple(audio.shape)}")
