"""What phones record and libsndfile does not read."""

import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from audio_datasets.audio.bad_clips import suspicion
from audio_datasets.audio.codec import AUDIO_SUFFIXES, audio_info, check_audio, decode
from audio_datasets.audio.ffmpeg_reader import FFmpegReader

RATE = 48000
FORMATS = {
    ".m4a": ("ipod", "aac"),
    ".mp4": ("mp4", "aac"),
    ".3gp": ("3gp", "aac"),
    ".mov": ("mov", "pcm_s24le"),
    ".m4b": ("mp4", "alac"),
    ".aac": ("adts", "aac"),
    ".webm": ("webm", "libopus"),
    ".mka": ("matroska", "aac"),
    ".wma": ("asf", "wmav2"),
    ".ac3": ("ac3", "ac3"),
    ".tta": ("tta", "tta"),
    ".wav": ("wav", "wmav2"),  # a container that libsndfile knows, with a codec that it does not
}


@pytest.fixture(scope="module")
def wave(sound_steps: SimpleNamespace) -> np.ndarray:
    return sound_steps.wave(3.0, RATE)


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_phones_record(suffix: str, wave: np.ndarray, sound_steps: SimpleNamespace, tmp_path: Path) -> None:
    assert suffix in AUDIO_SUFFIXES
    path = tmp_path / f"sound{suffix}"
    path.write_bytes(sound_steps.encode(wave, RATE, *FORMATS[suffix]))
    info, whole = audio_info(path), decode(path)
    assert info.sample_rate_hz == RATE
    assert info.samples == len(whole) == pytest.approx(len(wave), abs=0.05 * RATE)
    expected = sound_steps.levels(wave, RATE)
    np.testing.assert_allclose(sound_steps.levels(whole, RATE)[:5], expected[:5], atol=0.02)
    check = check_audio(path.read_bytes())
    assert (check.info.samples, suspicion(check)) == (len(whole), None)
    np.testing.assert_allclose(decode(path, 32000, 1.2, 0.5), decode(path, 32000)[38400:54400], atol=1e-6)


@pytest.mark.parametrize(("container", "codec"), [("webm", "libopus"), ("adts", "aac")])
def test_a_recording_that_is_cut_off(
    container: str, codec: str, wave: np.ndarray, sound_steps: SimpleNamespace
) -> None:
    data = sound_steps.encode(wave, RATE, container, codec)
    cut = data[: len(data) // 2]
    part = decode(cut)
    assert RATE < len(part) < 2 * RATE
    np.testing.assert_allclose(sound_steps.levels(part, RATE)[:2], sound_steps.levels(wave, RATE)[:2], atol=0.02)
    assert audio_info(cut).samples == len(part)
    assert suspicion(check_audio(cut)) is not None


def test_what_cannot_be_read_names_its_extension(
    wave: np.ndarray, sound_steps: SimpleNamespace, tmp_path: Path
) -> None:
    whole = sound_steps.encode(wave, RATE, "ipod", "aac")
    for name, data in {"a.m4a": b"no sound at all", "b.mp4": whole[: len(whole) // 2], "c": b"nothing"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"\({Path(name).suffix or 'without a suffix'}\)"):
            audio_info(tmp_path / name)


def test_a_playlist_is_no_audio(tmp_path: Path) -> None:
    """FFmpeg would open what it lists."""
    (tmp_path / "other.wav").write_bytes(b"")
    (tmp_path / "list.m4a").write_text("#EXTM3U\n#EXTINF:1,\nother.wav\n")
    with pytest.raises(ValueError, match="no format"):
        decode(tmp_path / "list.m4a")


def test_an_interruption_while_ffmpeg_reads_is_not_lost(wave: np.ndarray, sound_steps: SimpleNamespace) -> None:
    data = sound_steps.encode(np.tile(wave, 4), RATE, "ipod", "aac")

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            for _ in range(1000):
                FFmpegReader(data, "mov").read(10**9)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
