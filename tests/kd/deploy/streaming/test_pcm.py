"""PCM from a pipe: every type, with and without a WAV header, cut anywhere."""

import io
import struct
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audio_datasets.audio.codec import decode
from kd.deploy.streaming.pcm import PcmFormat, PcmStream

SUBTYPES = {"u8": "PCM_U8", "s16": "PCM_16", "s24": "PCM_24", "s32": "PCM_32", "f32": "FLOAT", "f64": "DOUBLE"}


def reader(data: bytes, size: int = 10_000) -> Callable[[int], bytes]:
    source = io.BytesIO(data)
    return lambda count: source.read(min(count, size))


def heard(stream: PcmStream) -> np.ndarray:
    return np.concatenate([np.empty(0, np.float32), *stream.chunks()])


@pytest.fixture(scope="module")
def sound() -> np.ndarray:
    return 0.5 * np.random.default_rng(0).standard_normal((3001, 2)).clip(-1.9, 1.9)


@pytest.mark.parametrize("kind", SUBTYPES)
@pytest.mark.parametrize("container", ["WAV", "WAVEX", "RF64"])
def test_a_wav_stream_has_the_samples_of_the_file(tmp_path: Path, sound: np.ndarray, kind: str, container: str) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, sound, 11025, SUBTYPES[kind], format=container)
    for size in (1, 997, 10**6):
        stream = PcmStream(reader(path.read_bytes(), size))
        assert stream.format == PcmFormat(11025, 2, kind)
        found = heard(stream)
        assert len(found) == len(sound)
        assert np.array_equal(found, decode(path))
        assert stream.remarks() == []


@pytest.mark.parametrize("kind", SUBTYPES)
def test_raw_pcm_has_the_samples_of_the_file(tmp_path: Path, sound: np.ndarray, kind: str) -> None:
    path = tmp_path / "a.raw"
    soundfile.write(path, sound, 11025, SUBTYPES[kind], format="RAW")
    stream = PcmStream(reader(path.read_bytes(), 999), PcmFormat(11025, 2, kind))
    assert np.abs(heard(stream) - sound.mean(1)).max() < (0.01 if kind == "u8" else 1e-4)


@pytest.mark.parametrize("size", [0, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_header_that_does_not_know_the_length_is_read_to_the_end(size: int) -> None:
    data = wav(np.arange(1000, dtype="<i2"), size)
    assert len(heard(PcmStream(reader(data)))) == 1000


def wav(samples: np.ndarray, size: int | None = None, rate: int = 8000, extra: bytes = b"") -> bytes:
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16)
    note = struct.pack("<4sI3sx", b"note", 3, b"abc")
    data = struct.pack("<4sI", b"data", samples.nbytes if size is None else size)
    return b"RIFF\xff\xff\xff\xffWAVE" + note + form + data + samples.tobytes() + extra


def test_pythons_own_wav_files_are_read(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(np.arange(100, dtype="<i2").tobytes())
    found = heard(PcmStream(reader((tmp_path / "a.wav").read_bytes())))
    assert np.array_equal(found, np.arange(100, dtype=np.float32) / 32768)


def test_what_is_odd_at_the_end_is_told() -> None:
    samples = np.arange(1000, dtype="<i2")
    cut = PcmStream(reader(wav(samples)[:-3]))
    assert len(heard(cut)) == 998
    assert cut.remarks() == [
        "the stream ends in the middle of a sample: 1 of 2 bytes are left out",
        "the stream ends 0.00 s before the end that its header tells",
    ]
    followed = PcmStream(reader(wav(samples, extra=b"LIST and so on")))
    assert len(heard(followed)) == 1000
    assert followed.remarks() == ["14 bytes after the samples are left out (further parts of the WAV file)"]
    floats = np.array([0.5, np.nan, np.inf, -1e9, 0.25], "<f4")
    damaged = PcmStream(reader(floats.tobytes()), PcmFormat(8000, 1, "f32"))
    assert heard(damaged).tolist() == [0.5, 0, 0, 0, 0.25]
    assert damaged.remarks() == ["3 samples were NaN, infinite or absurdly large; silence took their place"]


@pytest.mark.parametrize(
    ("data", "given", "message"),
    [
        (b"", None, "the stream is empty, which is no WAV header; give --sample-rate-hz"),
        (b"OggS and so on", None, "begins with b'OggS and so '"),
        (wav(np.zeros(4, "<i2")), PcmFormat(8000), "begins with a WAV header, which tells its format"),
        (wav(np.zeros(4, "<i2"))[:40], None, "the stream ends within its WAV header"),
        (wav(np.zeros(4, "<i2"), rate=7), None, "a sample rate lies between 1000 and 1000000 Hz; found 7"),
        (b"RIFF\0\0\0\0WAVEdata\0\0\0\0", None, "does not tell its format before the samples"),
        (b"RIFF\0\0\0\0WAVEjunk\0\0\0\x7f", None, "a part b'junk' of 2,130,706,432 bytes"),
        (wav(np.zeros(4, "<i2")).replace(b"\x10\x00data", b"\x0c\x00data"), None, "codec 0x1 with 12 bits"),
    ],
)
def test_streams_that_cannot_be_read_are_refused_in_one_line(data: bytes, given, message: str) -> None:
    with pytest.raises(ValueError, match="stream|header|rate") as caught:
        PcmStream(reader(data), given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_raw_stream_has_no_samples() -> None:
    stream = PcmStream(reader(b""), PcmFormat(8000))
    assert len(heard(stream)) == 0
    assert stream.remarks() == []
