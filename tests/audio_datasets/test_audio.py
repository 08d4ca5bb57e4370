"""Decoding, resampling, cutting and encoding of clips."""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
from scipy.signal import resample_poly

from audio_datasets.audio import (
    audio_info,
    decode,
    encode,
    fit_length,
    from_pcm16,
    resample,
    resample_direct,
    to_pcm16,
)
from audio_datasets.randomness import generator


def noise(samples: int, channels: int = 1) -> np.ndarray:
    wave = 0.2 * generator(1, "test noise").standard_normal((samples, channels))
    return wave.astype(np.float32)


def sine(frequency_hz: float, sample_rate_hz: int, seconds: float = 1.0) -> np.ndarray:
    time = np.arange(round(seconds * sample_rate_hz)) / sample_rate_hz
    return np.sin(2 * np.pi * frequency_hz * time).astype(np.float32)


def file_bytes(wave: np.ndarray, sample_rate_hz: int, file_format: str, subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, sample_rate_hz, format=file_format, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize("file_format", ["WAV", "FLAC", "OGG", "MP3", "AIFF", "CAF", "AU", "W64"])
@pytest.mark.parametrize("channels", [1, 2])
def test_every_format_is_decoded_to_mono(file_format: str, channels: int) -> None:
    # Sounds that differ between the channels, and that a lossy format keeps.
    wave = np.stack([0.4 * sine(440 * (channel + 1), 32000) for channel in range(channels)], axis=1)
    decoded = decode(file_bytes(wave, 32000, file_format))
    assert decoded.dtype == np.float32
    assert decoded.shape == (32000,)
    inner = slice(2000, -2000)
    error = np.abs(decoded - wave.mean(axis=1))[inner].max()
    assert error < (0.02 if file_format in ("OGG", "MP3") else 1e-4)


def test_a_path_and_its_bytes_decode_alike(tmp_path: Path) -> None:
    data = file_bytes(noise(5000, 2), 22050, "FLAC")
    (tmp_path / "clip.flac").write_bytes(data)
    np.testing.assert_array_equal(decode(tmp_path / "clip.flac", 32000), decode(data, 32000))
    info = audio_info(tmp_path / "clip.flac")
    assert (info.sample_rate_hz, info.channels, info.samples, info.file_format) == (22050, 2, 5000, "FLAC")
    assert info.duration_seconds == pytest.approx(5000 / 22050)


@pytest.mark.parametrize("from_hz", [8000, 11025, 16000, 22050, 44100, 48000, 96000])
def test_resampling_keeps_what_both_rates_can_hold_and_removes_the_rest(from_hz: int) -> None:
    to_hz = 32000
    inner = slice(2000, -2000)
    kept = resample(sine(1000, from_hz), from_hz, to_hz)
    assert len(kept) == to_hz
    assert np.abs(kept - sine(1000, to_hz))[inner].max() < 0.01
    if from_hz > to_hz:
        # Dropping samples would fold this tone down to an audible one.
        removed = resample(sine(0.65 * to_hz, from_hz), from_hz, to_hz)
        assert np.abs(removed[inner]).max() < 0.02


def test_resampling_agrees_with_another_polyphase_filter() -> None:
    low = sine(500, 44100) + 0.5 * sine(3000, 44100)
    ours, theirs = resample(low, 44100, 32000), resample_poly(low, 320, 441)
    assert np.abs(ours - theirs)[2000:-2000].max() < 0.01


@pytest.mark.parametrize(("from_hz", "to_hz"), [(44100, 32000), (8000, 32000), (48000, 16000), (11025, 32000)])
def test_direct_evaluation_of_the_filter_equals_torchaudio(from_hz: int, to_hz: int) -> None:
    wave = noise(4321)[:, 0]
    np.testing.assert_allclose(resample_direct(wave, from_hz, to_hz), resample(wave, from_hz, to_hz), atol=2e-5)


def test_rates_without_a_common_divisor_need_no_giant_table() -> None:
    resampled = resample(sine(1000, 11127), 11127, 32000)
    assert np.abs(resampled[2000:-2000] - sine(1000, 32000)[2000:-2000]).max() < 0.01


@pytest.mark.parametrize("file_format", ["WAV", "FLAC", "MP3", "OGG"])
@pytest.mark.parametrize(("start", "seconds"), [(0.0, 0.3), (0.51, 0.7), (1.9, 5.0), (0.33, None), (1.2, 0.0)])
@pytest.mark.parametrize("to_hz", [44100, 32000, 48000])
def test_a_part_equals_the_same_part_of_the_whole(
    file_format: str, start: float, seconds: float | None, to_hz: int
) -> None:
    data = file_bytes(noise(2 * 44100 + 17), 44100, file_format)
    whole, part = decode(data, to_hz), decode(data, to_hz, start, seconds)
    first = round(start * to_hz)
    expected = whole[first:] if seconds is None else whole[first : first + round(seconds * to_hz)]
    assert part.shape == expected.shape
    np.testing.assert_allclose(part, expected, atol=1e-6)


def test_a_part_beyond_the_end_is_empty() -> None:
    assert decode(file_bytes(noise(1000), 32000, "WAV"), 16000, start_seconds=3.0, seconds=1.0).shape == (0,)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty: 0 bytes"),
        (b"this is text and no sound", "no format"),
        (file_bytes(np.zeros((0, 1), np.float32), 32000, "WAV"), "no samples"),
        (file_bytes(np.full((10, 1), np.nan, np.float32), 32000, "WAV", "FLOAT"), "NaN"),
        (file_bytes(np.full((10, 1), np.inf, np.float32), 32000, "WAV", "FLOAT"), "infinite"),
    ],
)
def test_audio_that_cannot_be_used_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(data, 32000)


@pytest.mark.parametrize("file_format", ["WAV", "FLAC", "OGG", "MP3"])
def test_a_truncated_file_gives_a_waveform_or_a_value_error(file_format: str) -> None:
    data = file_bytes(noise(8000), 32000, file_format)
    for length in range(0, len(data), max(1, len(data) // 150)):
        try:
            waveform = decode(data[:length])
        except ValueError:
            continue
        assert 0 < len(waveform) <= 8000 + 1152


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        decode(tmp_path / "absent.wav")


def test_negative_starts_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        decode(file_bytes(noise(100), 32000, "WAV"), 32000, start_seconds=-1.0)


def test_fit_length_pads_at_the_end_and_crops_from_the_offset() -> None:
    wave = np.arange(1, 6, dtype=np.float32)
    np.testing.assert_array_equal(fit_length(wave, 7), [1, 2, 3, 4, 5, 0, 0])
    np.testing.assert_array_equal(fit_length(wave, 2, offset=1), [2, 3])
    np.testing.assert_array_equal(fit_length(wave, 3, offset=4), [5, 0, 0])
    np.testing.assert_array_equal(fit_length(wave, 2, offset=9), [0, 0])
    assert fit_length(wave, 7).dtype == np.float32


def test_pcm16_keeps_all_16_bit_values_and_clips_louder_ones() -> None:
    values = np.arange(-32768, 32768, dtype=np.int16)
    np.testing.assert_array_equal(to_pcm16(from_pcm16(values)), values)
    np.testing.assert_array_equal(to_pcm16(np.array([2.0, -2.0], np.float32)), [32767, -32768])


@pytest.mark.parametrize("audio_format", ["wav", "flac", "mp3"])
def test_encoding_gives_the_same_bytes_each_time_and_decodes_again(audio_format: str) -> None:
    wave = sine(440, 32000)
    data = encode(wave, 32000, audio_format)
    assert data == encode(wave, 32000, audio_format)
    error = np.abs(decode(data) - wave)
    assert error[2000:-2000].max() < (0.05 if audio_format == "mp3" else 1e-4)


def test_formats_and_rates_that_cannot_be_encoded_are_refused() -> None:
    with pytest.raises(ValueError, match="flac"):
        encode(sine(440, 32000), 32000, "aac")
    with pytest.raises(ValueError, match="31999"):
        encode(sine(440, 32000), 31999, "mp3")
