"""Decoding, resampling, cutting and encoding of clips."""

import io
import signal
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from scipy.signal import resample_poly

from audio_datasets.audio import codec as audio
from audio_datasets.audio.bad_clips import suspicion
from audio_datasets.audio.codec import (
    audio_info,
    check_audio,
    decode,
    encode,
    fit_length,
    from_pcm16,
    to_pcm16,
)
from audio_datasets.audio.resampling import resample, resample_direct
from audio_datasets.system.randomness import generator


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


# -- What a clip may be ------------------------------------------------------------------------------------------------


def peak_memory(function) -> int:
    """Most bytes that Python and NumPy hold at a time while ``function`` runs."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def three_hours(path: Path) -> Path:
    """A WAV of three hours of silence at 192 kHz and 1 second of noise at the end, which takes hardly any room on disk."""
    rate, seconds = 192_000, 3 * 3600
    head = bytearray(file_bytes(np.zeros((0, 1)), rate, "WAV", "PCM_16"))
    tail = to_pcm16(noise(rate)[:, 0]).tobytes()
    size = 2 * rate * seconds
    head[4:8], head[40:44] = (len(head) - 8 + size).to_bytes(4, "little"), size.to_bytes(4, "little")
    with open(path, "wb") as file:
        file.write(head)
        file.seek(len(head) + size - len(tail))
        file.write(tail)
    return path


def test_a_part_of_three_hours_takes_the_memory_of_the_part(tmp_path: Path) -> None:
    path = three_hours(tmp_path / "long.wav")
    assert audio_info(path).duration_seconds == 3 * 3600
    last = decode(path, 32000, start_seconds=3 * 3600 - 1, seconds=1)
    np.testing.assert_allclose(last[2000:-2000], resample(noise(192_000)[:, 0], 192_000, 32000)[2000:-2000], atol=1e-4)
    assert peak_memory(lambda: decode(path, 32000, start_seconds=7000, seconds=1)) < 10 * 2**20


@pytest.mark.parametrize("file_format", ["MP3", "FLAC"])
def test_memory_does_not_grow_with_what_is_passed_over_or_checked(
    file_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audio, "BLOCK_SAMPLES", 2**14)
    data = file_bytes(noise(8000 * 120), 8000, file_format)
    assert peak_memory(lambda: decode(data, start_seconds=100, seconds=1)) < len(data) + 2**20
    assert peak_memory(lambda: check_audio(data)) < len(data) + 2**20
    whole = decode(data)
    np.testing.assert_array_equal(decode(data, start_seconds=100, seconds=1), whole[100 * 8000 : 101 * 8000])
    assert check_audio(data).info.samples == len(whole)
    assert check_audio(data).peak == np.abs(whole).max()


def test_what_is_too_long_to_be_decoded_in_one_piece_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio, "MOST_SAMPLES", 10_000)
    data = file_bytes(noise(6000), 8000, "FLAC")
    assert len(decode(data)) == 6000
    assert len(decode(data, 12000)) == 9000
    with pytest.raises(ValueError, match="too long to be decoded in one piece.*10000 samples"):
        decode(data, 16000)
    assert len(decode(data, 16000, seconds=0.5)) == 8000


@pytest.mark.parametrize("channels", [1, 2, 8])
def test_a_clip_of_one_sample(channels: int) -> None:
    data = file_bytes(np.full((1, channels), 0.5), 192_000, "WAV", "FLOAT")
    np.testing.assert_allclose(decode(data), [0.5])
    assert len(decode(data, 32000)) == 1


def test_what_is_odd_about_a_clip() -> None:
    def check(wave: np.ndarray) -> str | None:
        return suspicion(check_audio(file_bytes(wave, 8000, "WAV", "PCM_16")))

    assert check(noise(4000)) is None
    assert check(np.zeros((4000, 1))) == "silent"
    assert check(np.clip(50 * noise(4000), -1, 1)).startswith("clipped (")
    assert check(noise(3)) == "very short (3 samples)"


@pytest.mark.parametrize("rate", [1, 999, 1_000_001, 2**31 - 1])
def test_absurd_sample_rates_are_refused(rate: int) -> None:
    data = bytearray(file_bytes(noise(100), 8000, "WAV", "PCM_16"))
    data[24:28] = rate.to_bytes(4, "little")
    for function in (decode, audio_info, check_audio):
        with pytest.raises(ValueError, match=f"sample rate of {rate} Hz"):
            function(bytes(data))


def test_absurd_magnitudes_are_refused() -> None:
    integers = file_bytes(32768 * noise(100), 8000, "WAV", "FLOAT")
    assert np.abs(decode(integers)).max() > 1000
    with pytest.raises(ValueError, match="times full scale"):
        decode(file_bytes(1e9 * noise(100), 8000, "WAV", "FLOAT"))


@pytest.mark.parametrize("reading", [True, False])
def test_an_interruption_inside_the_codec_is_not_lost(reading: bool) -> None:
    """Of a callback from libsndfile into Python it would be, and the audio would come out short."""
    wave = noise(1_500_000)[:, 0]
    data = encode(wave, 32000, "mp3") if reading else b""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            if reading:
                decode(data)
            else:
                encode(wave, 32000, "mp3")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
