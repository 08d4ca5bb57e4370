"""Audio resampled piece by piece equals audio resampled whole."""

import numpy as np
import pytest

from audio_datasets.audio.resampling import StreamResampler, resample


@pytest.mark.parametrize(
    ("from_hz", "to_hz"), [(44100, 32000), (8000, 16000), (48000, 32000), (16000, 16000), (11127, 16000)]
)
@pytest.mark.parametrize("samples", [0, 1, 700, 30011])
def test_pieces_give_the_samples_of_the_whole(from_hz: int, to_hz: int, samples: int) -> None:
    waveform = np.random.default_rng(0).standard_normal(samples).astype(np.float32)
    wanted = resample(waveform, from_hz, to_hz)
    results = []
    for size in (997, 40000):
        stream = StreamResampler(from_hz, to_hz)
        parts = [stream.feed(waveform[start : start + size]) for start in range(0, samples, size)]
        results.append(np.concatenate([np.empty(0, np.float32), *parts, stream.finish()]))
        assert len(results[-1]) == len(wanted)
        assert np.abs(results[-1] - wanted).max(initial=0) < 1e-5
    assert np.array_equal(*results)
