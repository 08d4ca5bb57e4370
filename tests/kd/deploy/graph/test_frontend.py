"""The front end as convolutions against the one with a Fourier transform."""

import pytest
import torch

from kd.deploy.graph.frontend import ConvolutionalLogMel
from students.families.mergenet import mergenet_frontend
from students.frontend import LogMel, LogMelConfig

CONFIGS = {
    "default": LogMelConfig(),
    "mergenet": mergenet_frontend(),
    "not a power of two": LogMelConfig(n_fft=500, window_samples=400, hop_samples=125, fmax_hz=14000.0),
    "hop without a common divisor": LogMelConfig(n_fft=256, window_samples=256, hop_samples=111, n_mels=20),
    "window as long as the transform": LogMelConfig(window_samples=1024, hop_samples=512, fmin_hz=50.0),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("samples", [1, 513, 514, 15041, 15042, 64000])
def test_it_gives_the_numbers_of_log_mel(name: str, samples: int) -> None:
    config = CONFIGS[name]
    waveform = 0.1 * torch.randn(2, samples, generator=torch.Generator().manual_seed(samples))
    wanted, found = LogMel(config)(waveform), ConvolutionalLogMel(config)(waveform)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["default", "mergenet"])
@pytest.mark.parametrize("level", [0.0, 1e-40])
def test_silence_and_denormal_numbers_stay_finite(name: str, level: float) -> None:
    waveform = torch.full((1, 32000), level)
    found = ConvolutionalLogMel(CONFIGS[name])(waveform)
    assert found.isfinite().all()
    torch.testing.assert_close(found, LogMel(CONFIGS[name])(waveform))


def test_a_transform_of_1024_samples_is_factored() -> None:
    frontend = ConvolutionalLogMel(LogMelConfig())
    assert frontend.p * frontend.q == 1024
    assert frontend.q >= 16
