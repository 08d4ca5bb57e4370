"""Makes the views of a clip that a network hears, for both ``kd teach`` and ``kd pretrain --views stored``.

docs/consistent_teaching.md explains what views are for.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from audio_datasets.audio.views import ViewConfig, view_generator, view_stripes, view_waveform
from students.frontend import LogMelConfig, draw_band_edges


class Clips(Protocol):
    """The source of the views: a clip store, or several joined."""

    def clip_id(self, row: int) -> str: ...

    def waveform(self, row: int, sample_rate_hz: int) -> np.ndarray: ...


def heard_views(
    clips: Clips,
    row: int,
    views: range | list[int],
    config: ViewConfig,
    *,
    seconds: float,
    sample_rate_hz: int,
    frontend: LogMelConfig | None,
) -> dict[str, Tensor]:
    """The given views of one clip. The clip is decoded once.

    Args:
        seconds: length of a view.
        frontend: front end of the network; None if it is not ours, in which case bands cannot be jittered and stripes not
            masked.

    Returns:
        ``waveform`` (V, samples); with mel jitter also ``band_edges`` (V, 2) in Hz; with masks also ``stripes`` (V, 4), as
        fractions of the axes.
    """
    clip_id = clips.clip_id(row)
    waveform = clips.waveform(row, sample_rate_hz)
    samples = round(seconds * sample_rate_hz)
    heard = [view_waveform(waveform, samples, sample_rate_hz, config, clip_id, view) for view in views]
    result = {"waveform": torch.from_numpy(np.stack(heard))}
    if frontend is None:
        return result
    if config.view_mel_jitter:
        edges = [draw_band_edges(frontend, view_generator(config, "mel jitter", clip_id, view)) for view in views]
        result["band_edges"] = torch.tensor(edges, dtype=torch.float32)
    if config.masks:
        result["stripes"] = torch.from_numpy(np.stack([view_stripes(config, clip_id, view) for view in views]))
    return result
