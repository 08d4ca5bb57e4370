"""The log-mel front end against the reference, torchaudio's mel bands and a plain implementation."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st

from students.families.mergenet import mergenet_frontend
from students.frontend import LogMel, LogMelConfig, draw_band_edges, mel_banks

CONFIGS = {
    "default": LogMelConfig(),
    "16 kHz": LogMelConfig(sample_rate_hz=16000, n_fft=512, window_samples=400, hop_samples=160, fmax_hz=7000.0),
    "40 bands, long hop": LogMelConfig(n_mels=40, hop_samples=1000),
    "256 bands, full window": LogMelConfig(n_mels=256, n_fft=2048, window_samples=2048),
    "odd window, no pre-emphasis": LogMelConfig(window_samples=777, preemphasis=0.0, fmin_hz=50.0, fmax_hz=16000.0),
    "other scale": LogMelConfig(log_offset=1e-3, shift=0.0, scale=2.0, n_mels=17),
    "dB": LogMelConfig(logarithm="db", shift=40.0, scale=20.0),
    "without mean, standardised": LogMelConfig(remove_mean=True, preemphasis=0.0, standardize=True),
    "tiled": LogMelConfig(tile_seconds=0.9, standardize=True),
    "MergeNet": mergenet_frontend(),
}


def plain_log_mel(waveform: torch.Tensor, config: LogMelConfig, fmin_hz: float, fmax_hz: float) -> torch.Tensor:
    """(batch, samples) -> (batch, 1, n_mels, frames) from torch.stft and torchaudio's port of Kaldi."""
    if config.remove_mean:
        waveform = waveform - waveform.mean(1, keepdim=True)
    if config.preemphasis:
        waveform = waveform[:, 1:] - config.preemphasis * waveform[:, :-1]
    window = torch.hann_window(config.window_samples, periodic=False)
    spectrum = torch.stft(
        waveform, config.n_fft, config.hop_samples, config.window_samples, window, center=True, return_complex=True
    )
    bank = kaldi_bank(config, fmin_hz, fmax_hz)
    mel = torch.nn.functional.pad(bank, (0, 1)) @ spectrum.abs().square()
    logarithm = torch.log(mel + config.log_offset) if config.logarithm == "ln" else to_db(mel + config.log_offset)
    clips = list((logarithm + config.shift) / config.scale)
    if config.standardize:
        clips = [torch.from_numpy((clip.numpy() - clip.numpy().mean()) / clip.numpy().std()) for clip in clips]
    if config.tile_seconds:
        frames = config.frames(round(config.tile_seconds * config.sample_rate_hz))
        if frames > clips[0].shape[1]:
            clips = [clip[:, torch.arange(frames) % clip.shape[1]] for clip in clips]
    return torch.stack(clips)[:, None]


to_db = torchaudio.transforms.AmplitudeToDB("power")


def kaldi_bank(config: LogMelConfig, fmin_hz: float, fmax_hz: float) -> torch.Tensor:
    return torchaudio.compliance.kaldi.get_mel_banks(
        config.n_mels, config.n_fft, config.sample_rate_hz, fmin_hz, fmax_hz, 100.0, -500.0, 1.0
    )[0]


def noise(batch: int, samples: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, samples, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> LogMelConfig:
    return CONFIGS[request.param]


def test_reproduces_the_reference(reference_dir: Path) -> None:
    reference = np.load(reference_dir / "reference" / "mn04_as_esc10_clips.npz")
    waveform = torch.from_numpy(reference["waveform_int16_32k"].astype(np.float32) / 32768)
    log_mel = LogMel()(waveform)
    assert log_mel.shape == (3, 1, 128, 500)
    np.testing.assert_allclose(log_mel[:, 0].numpy(), reference["log_mel"], atol=2e-4, rtol=0)


def test_is_the_plain_implementation(config: LogMelConfig) -> None:
    waveform = noise(2, 12_345)
    expected = plain_log_mel(waveform, config, config.fmin_hz, config.fmax_hz)
    log_mel = LogMel(config)(waveform)
    assert log_mel.shape == expected.shape == (2, 1, config.n_mels, config.frames(12_345))
    torch.testing.assert_close(log_mel, expected, atol=2e-4, rtol=0)


def test_jittered_clips_are_the_plain_implementation_with_their_own_bands(config: LogMelConfig) -> None:
    waveform = noise(4, 9_000)
    rng = np.random.default_rng(1)
    edges = [draw_band_edges(config, rng) for _ in range(3)] + [(123.0, config.nyquist_hz)]
    log_mel = LogMel(config)(waveform, torch.tensor(edges))
    for clip, (fmin_hz, fmax_hz) in enumerate(edges):
        expected = plain_log_mel(waveform[clip : clip + 1], config, fmin_hz, fmax_hz)
        torch.testing.assert_close(log_mel[clip : clip + 1], expected, atol=3e-4, rtol=0)
    assert not torch.allclose(log_mel, LogMel(config)(waveform), atol=1e-2)


def test_mel_bands_are_kaldis(config: LogMelConfig) -> None:
    edges = torch.tensor([[config.fmin_hz, config.fmax_hz], [3.5, config.nyquist_hz], [7.0, config.fmax_hz - 900.0]])
    banks = mel_banks(config, edges)
    for bank, (fmin_hz, fmax_hz) in zip(banks, edges.tolist(), strict=True):
        torch.testing.assert_close(bank, kaldi_bank(config, fmin_hz, fmax_hz), atol=1e-4, rtol=0)


def test_configured_edges_given_by_hand_change_nothing() -> None:
    config = LogMelConfig()
    waveform = noise(2, 4_000)
    edges = torch.tensor([[config.fmin_hz, config.fmax_hz]] * 2)
    assert torch.equal(LogMel(config)(waveform, edges), LogMel(config)(waveform))


@given(st.integers(1, 5_000))
@settings(deadline=None, max_examples=30)
def test_a_clip_of_any_length_gives_the_promised_frames(samples: int) -> None:
    config = LogMelConfig()
    log_mel = LogMel(config)(noise(1, samples))
    assert log_mel.shape == (1, 1, 128, config.frames(samples))
    assert log_mel.isfinite().all()


def test_mergenets_front_end_hears_ten_standardised_seconds() -> None:
    config = mergenet_frontend()
    assert config.hop_samples / config.sample_rate_hz == 0.010
    assert config.window_samples / config.sample_rate_hz == 0.025
    one, ten = LogMel(config)(noise(2, 16_000)), LogMel(config)(noise(1, 160_000))
    assert one.shape == (2, 1, 128, 1001)
    assert ten.shape == (1, 1, 128, 1001)
    assert LogMel(config)(noise(1, 240_000)).shape[3] == 1501  # longer clips stay whole
    period = 101
    assert torch.equal(one[..., period:], one[..., :-period])
    for clip in (*one[..., :period], *ten):
        assert clip.mean().item() == pytest.approx(0.0, abs=1e-4)
        assert clip.std(correction=0).item() == pytest.approx(1.0, abs=1e-4)
    assert not (ten == ten.amin()).all(-1).any()  # no band lies between two bins of the transform


def test_mergenets_front_end_hears_no_loudness_and_no_constant() -> None:
    front_end = LogMel(mergenet_frontend())
    waveform = noise(1, 16_000)
    torch.testing.assert_close(front_end(0.5 * waveform + 0.3), front_end(waveform), atol=1e-2, rtol=0)


def test_standardised_silence_lets_gradients_through() -> None:
    waveform = torch.zeros(1, 4_000, requires_grad=True)
    LogMel(mergenet_frontend())(waveform).square().sum().backward()
    assert waveform.grad.isfinite().all()


def test_a_short_clip_is_padded_at_its_end() -> None:
    config = LogMelConfig()
    short = noise(1, 200)
    padded = torch.nn.functional.pad(short, (0, config.minimum_samples - 200))
    assert torch.equal(LogMel(config)(short), LogMel(config)(padded))


def test_silence_is_a_finite_constant(config: LogMelConfig) -> None:
    log_mel = LogMel(config)(torch.zeros(1, 8_000))
    logarithm = 10 * math.log10(config.log_offset) if config.logarithm == "db" else math.log(config.log_offset)
    expected = 0.0 if config.standardize else (logarithm + config.shift) / config.scale
    torch.testing.assert_close(
        log_mel, torch.full_like(log_mel, expected), atol=0.05 if config.standardize else 1e-5, rtol=1e-5
    )


def test_computes_in_float32_under_mixed_precision() -> None:
    waveform = noise(2, 4_000)
    front_end = LogMel()
    expected = front_end(waveform)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(front_end(waveform), expected)
    log_mel = front_end(waveform.half())
    assert log_mel.dtype == torch.float32
    assert torch.equal(log_mel, front_end(waveform.half().float()))


def test_a_clip_does_not_depend_on_its_batch() -> None:
    waveform = noise(5, 6_000)
    edges = torch.tensor([draw_band_edges(LogMelConfig(), np.random.default_rng(seed)) for seed in range(5)])
    front_end = LogMel()
    assert torch.equal(front_end(waveform)[2:3], front_end(waveform[2:3]))
    assert torch.equal(front_end(waveform, edges)[2:3], front_end(waveform[2:3], edges[2:3]))


@pytest.mark.parametrize(
    "settings", [{}, {"logarithm": "db", "remove_mean": True, "standardize": True, "tile_seconds": 0.2}]
)
def test_lets_gradients_through_and_leaves_its_input_alone(settings: dict) -> None:
    waveform = noise(2, 3_000).double().requires_grad_()
    before = waveform.detach().clone()
    edges = torch.tensor([[0.0, 15000.0], [5.0, 14000.0]])
    direction = noise(2, 3_000, seed=1).double()
    front_end = LogMel(LogMelConfig(log_offset=1.0, **settings))
    weights = torch.linspace(0.0, 2.0, 128, dtype=torch.float64)[:, None]  # a standardised clip's plain sum is always 0

    def weighted_sum(waveform: torch.Tensor) -> torch.Tensor:
        return (front_end(waveform, edges) * weights).sum()

    weighted_sum(waveform).backward()
    assert torch.equal(waveform.detach(), before)
    along = (waveform.grad * direction).sum().item()
    with torch.no_grad():
        ahead, behind = (weighted_sum(waveform + step * direction) for step in (1e-2, -1e-2))
    assert along == pytest.approx(((ahead - behind) / 2e-2).item(), rel=2e-2)


def test_carries_no_weights() -> None:
    assert not LogMel().state_dict()
    assert not list(LogMel().parameters())


def test_drawn_edges_stay_in_their_ranges_and_come_from_the_generator_alone() -> None:
    config = LogMelConfig()
    drawn = np.array([draw_band_edges(config, np.random.default_rng(seed)) for seed in range(500)])
    fmin_hz, fmax_hz = drawn.T
    assert fmin_hz.min() >= 0
    assert 9 < fmin_hz.max() < 10
    assert 14_000 <= fmax_hz.min() < 14_100
    assert 15_900 < fmax_hz.max() <= 16_000
    assert draw_band_edges(config, np.random.default_rng(7)) == draw_band_edges(config, np.random.default_rng(7))
    high = LogMelConfig(fmax_hz=15_900.0)
    assert max(draw_band_edges(high, np.random.default_rng(seed))[1] for seed in range(50)) == 16_000.0
    still = LogMelConfig(fmin_jitter_hz=0.0, fmax_jitter_hz=0.0)
    assert draw_band_edges(still, np.random.default_rng(0)) == (0.0, 15_000.0)


def test_settings_survive_json() -> None:
    config = CONFIGS["16 kHz"]
    assert LogMelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match=r"unknown front-end setting hop; choices: sample_rate_hz, n_fft"):
        LogMelConfig.from_dict({"hop": 3})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_rate_hz": 0}, "sample_rate_hz must be a whole number above 0; found 0"),
        ({"sample_rate_hz": 16000}, r"fmax_hz <= 8000 Hz \(half the sample rate\); found fmin_hz=0, fmax_hz=15000"),
        ({"hop_samples": 10.5}, "hop_samples must be a whole number"),
        ({"n_mels": 0}, "n_mels must be a whole number"),
        ({"n_fft": 1023}, "n_fft must be even; found 1023"),
        ({"window_samples": 1025}, r"window_samples must be at most n_fft \(1024\); found 1025"),
        ({"fmin_hz": -1.0}, "fmin_hz must not be negative"),
        ({"fmin_hz": 15000.0}, "fmin_hz < fmax_hz"),
        ({"fmin_hz": 13_995.0}, "is too large for mel bands"),
        ({"log_offset": 0.0}, "log_offset must be above 0"),
        ({"scale": 0.0}, "scale must be above 0"),
        ({"shift": math.nan}, "shift must be a finite number"),
        ({"logarithm": "dB"}, "unknown logarithm 'dB'; choices: ln, db"),
        ({"tile_seconds": -1.0}, "tile_seconds must not be negative"),
        ({"preemphasis": math.nan}, "preemphasis must not be negative"),
        ({"fmax_jitter_hz": -1.0}, "fmax_jitter_hz must not be negative"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogMelConfig(**settings)


def test_wrong_shapes_are_refused() -> None:
    front_end = LogMel()
    for shape in [(100,), (1, 1, 100), (2, 0)]:
        with pytest.raises(ValueError, match=r"shape \(batch, samples\); found"):
            front_end(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"band edges must have shape \(batch, 2\), here \(3, 2\); found \(2, 2\)"):
        front_end(torch.zeros(3, 1000), torch.ones(2, 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_hears_the_same() -> None:
    waveform = noise(3, 20_000)
    edges = torch.tensor([draw_band_edges(LogMelConfig(), np.random.default_rng(seed)) for seed in range(3)])
    on_cpu, on_gpu = LogMel(), LogMel().cuda()
    for band_edges in (None, edges):
        torch.testing.assert_close(
            on_gpu(waveform.cuda(), band_edges).cpu(), on_cpu(waveform, band_edges), atol=1e-3, rtol=0
        )
