"""Files whose header tells another length than they have: they are heard whole, and called suspicious."""

import io
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from audio_datasets.audio.bad_clips import suspicion
from audio_datasets.audio.codec import ClipParts, OpenClip, audio_info, check_audio, decode, encode, to_pcm16
from audio_datasets.audio.readers import SoundfileReader

RATE = 16000
SECONDS = 6.0
SAMPLES = round(SECONDS * RATE)


def file_bytes(wave: np.ndarray, file_format: str, subtype: str | None = None, rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    wave = to_pcm16(wave) if subtype == "PCM_16" else wave  # libsndfile would round to another value
    soundfile.write(buffer, wave, rate, format=file_format, subtype=subtype)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def wave(sound_steps: SimpleNamespace) -> np.ndarray:
    return sound_steps.wave(SECONDS, RATE)


def heard(data: bytes, samples: int | None = None, within: int = 0) -> np.ndarray:
    """What a file decodes to, if every way to ask for its length tells the same, and the same as expected."""
    whole = decode(data)
    assert audio_info(data).samples == check_audio(data).info.samples == len(whole)
    if samples is not None:
        assert len(whole) == pytest.approx(samples, abs=within)
    middle = decode(data, None, 1.3, 0.5)
    np.testing.assert_allclose(middle, whole[round(1.3 * RATE) :][: len(middle)], atol=1e-6)
    return whole


def odd(data: bytes) -> str | None:
    return suspicion(check_audio(data))


def wav(wave: np.ndarray, size: int | None = None, riff: int | None = None) -> bytes:
    """A 16-bit WAV file whose header gives other sizes."""
    data = bytearray(file_bytes(wave, "WAV", "PCM_16"))
    data[4:8] = struct.pack("<I", len(data) - 8 if riff is None else riff)
    data[40:44] = struct.pack("<I", len(data) - 44 if size is None else size)
    return bytes(data)


# -- MP3 ---------------------------------------------------------------------------------------------------------------


def test_a_download_that_was_interrupted(wave: np.ndarray, sound_steps: SimpleNamespace) -> None:
    data = encode(wave, RATE, "mp3")
    assert heard(data, SAMPLES).shape == (SAMPLES,)
    assert odd(data) is None
    cut = heard(data[: len(data) // 3])
    assert 1.5 * RATE < len(cut) < 2.5 * RATE
    expected = sound_steps.levels(wave, RATE)[:3]
    np.testing.assert_allclose(sound_steps.levels(cut, RATE)[:3], expected, atol=0.02)
    assert odd(data[: len(data) // 3]) == f"its header says 6.1 s, but it holds {len(cut) / RATE:.1f} s"


def test_a_variable_bit_rate_that_no_header_tells(sound_steps: SimpleNamespace) -> None:
    """Its first frames are the smallest or the largest: lengths are guessed from them."""
    rng = np.random.default_rng(0)
    loud = 0.3 * rng.standard_normal(4 * RATE).astype(np.float32)
    for wave in (np.concatenate([np.zeros_like(loud), loud]), np.concatenate([loud, np.zeros_like(loud)])):
        counted = encode(wave, RATE, "mp3")
        data = counted.replace(b"Xing", bytes(4))
        assert data != counted
        whole = heard(data, len(wave), within=1152 * 2)
        seconds = whole[: 8 * RATE].reshape(8, RATE)[:, 3000:-3000].std(axis=1)
        np.testing.assert_allclose(seconds > 0.1, np.arange(8) >= 4 if not wave[:100].any() else np.arange(8) < 4)


TAGS = {
    "": b"",
    "ID3v2": b"ID3\3\0\0\0\0\0\x0a" + bytes(10),
    "ID3v1": b"TAG" + bytes(125),
    "APE": b"APETAGEX" + struct.pack("<III", 2000, 40, 1) + bytes(12) + bytes(40),
}


@pytest.mark.parametrize("tag", TAGS)
def test_two_files_joined_end_to_end(sound_steps: SimpleNamespace, tag: str) -> None:
    one, other = sound_steps.wave(3.0, RATE), sound_steps.wave(3.0, RATE, seed=1)
    data = encode(one, RATE, "mp3") + TAGS[tag]
    assert heard(data, 3 * RATE).shape == (3 * RATE,)
    assert odd(data) is None
    whole = heard(data + encode(other, RATE, "mp3"), 6 * RATE, within=4 * 1152)
    expected = np.concatenate([sound_steps.levels(one, RATE), sound_steps.levels(other, RATE)])
    np.testing.assert_allclose(sound_steps.levels(whole, RATE), expected[: len(whole) // (RATE // 2)], atol=0.03)
    assert odd(data + encode(other, RATE, "mp3")).startswith("its header says 3.1 s, but it holds 6.")


def test_a_damaged_frame_does_not_end_a_file(wave: np.ndarray, sound_steps: SimpleNamespace) -> None:
    data = bytearray(encode(wave, RATE, "mp3"))
    for place in range(len(data) // 2, len(data) // 2 + 200):
        data[place] ^= 0x5A
    whole = decode(bytes(data))
    assert len(whole) == pytest.approx(SAMPLES, abs=4 * 1152)
    np.testing.assert_allclose(sound_steps.levels(whole, RATE)[:4], sound_steps.levels(wave, RATE)[:4], atol=0.02)
    assert odd(bytes(data)) is not None


# -- WAV and its like --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "riff"), [(0, 0), (0, None), (2 * RATE, 2 * RATE + 36)])
def test_a_recorder_that_was_killed(wave: np.ndarray, size: int, riff: int | None) -> None:
    data = wav(wave, size, riff)
    np.testing.assert_array_equal(to_pcm16(heard(data)), to_pcm16(wave))
    assert odd(data) == f"its header says {size / RATE / 2:.1f} s, but it holds 6.0 s"


@pytest.mark.parametrize("size", [0xFFFF_FFFF, 0x7FFF_FFFF])
def test_a_stream_whose_size_is_not_known(wave: np.ndarray, size: int) -> None:
    np.testing.assert_array_equal(to_pcm16(heard(wav(wave, size, size))), to_pcm16(wave))
    assert odd(wav(wave, size, size)) is None


@pytest.mark.parametrize("file_format", ["WAV", "AIFF"])
def test_a_file_that_is_cut_off(wave: np.ndarray, file_format: str) -> None:
    data = file_bytes(wave, file_format, "PCM_16")[: 4 * RATE + 1000]
    np.testing.assert_array_equal(to_pcm16(heard(data))[: 2 * RATE], to_pcm16(wave)[: 2 * RATE])
    assert odd(data) == "its header says 6.0 s, but it holds 2.0 s"


CHUNKS = {
    "names": b"LIST" + struct.pack("<I", 18) + b"INFOISFT" + b"a" * 10,
    "names, cut off": b"LIST" + struct.pack("<I", 1800) + b"INFOISFT" + b"a" * 10,
    "tags": b"ID3\4\0\0\0\0\1\0" + bytes(range(256)) * 40,
    "junk": b"\x12" * 500,
}


@pytest.mark.parametrize("chunk", CHUNKS)
def test_what_follows_the_samples_is_no_audio(wave: np.ndarray, chunk: str) -> None:
    np.testing.assert_array_equal(to_pcm16(heard(wav(wave) + CHUNKS[chunk])), to_pcm16(wave))
    assert odd(wav(wave) + CHUNKS[chunk]) is None
    if chunk != "junk":
        with pytest.raises(ValueError, match="empty"):
            decode(wav(wave[:0]) + CHUNKS[chunk])


def test_two_wav_files_joined_are_refused(wave: np.ndarray) -> None:
    for function in (decode, audio_info, check_audio):
        with pytest.raises(ValueError, match="several WAV files joined end to end"):
            function(wav(wave) + wav(wave))


# -- FLAC and Ogg ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "told"), [(0, None), (2 * RATE, "2.0 s, but it holds 6.0"), (9 * RATE, "9.0 s, but")]
)
def test_flac_with_another_number_of_samples(wave: np.ndarray, total: int, told: str | None) -> None:
    data = file_bytes(wave, "FLAC", "PCM_16")
    rest = int.from_bytes(data[18:26], "big") >> 36
    changed = data[:18] + (rest << 36 | total).to_bytes(8, "big") + data[26:]
    np.testing.assert_array_equal(to_pcm16(heard(changed)), to_pcm16(wave))
    assert (told is None) == (odd(changed) is None)
    assert told is None or told in odd(changed)


def test_flac_that_is_cut_off_is_heard_as_far_as_it_goes(wave: np.ndarray) -> None:
    data = file_bytes(wave, "FLAC", "PCM_16")
    part = heard(data[: len(data) // 2])
    assert 2 * RATE < len(part) < 4 * RATE
    np.testing.assert_array_equal(to_pcm16(part), to_pcm16(wave)[: len(part)])
    assert "its header says 6.0 s" in odd(data[: len(data) // 2])


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg_with_a_hole_and_with_a_second_stream(sound_steps: SimpleNamespace, subtype: str) -> None:
    one, other = sound_steps.wave(4.0, RATE), sound_steps.wave(2.0, RATE, seed=1)
    data = file_bytes(one, "OGG", subtype)
    assert audio_info(data).duration_seconds == 4.0
    joined = data + file_bytes(other, "OGG", subtype)
    info, whole = audio_info(joined), decode(joined, RATE)
    assert info.duration_seconds == pytest.approx(6.0, abs=0.1)
    assert len(whole) == pytest.approx(6 * RATE, abs=0.1 * RATE)
    expected = np.concatenate([sound_steps.levels(one, RATE), sound_steps.levels(other, RATE)])
    np.testing.assert_allclose(sound_steps.levels(whole, RATE)[:8], expected[:8], atol=0.03)
    pages = [place for place in range(len(data)) if data[place : place + 4] == b"OggS"]
    middle = len(pages) // 2
    hole = data[: pages[middle]] + data[pages[middle + 1] :]
    assert check_audio(hole).info.samples == audio_info(hole).samples
    assert audio_info(hole).duration_seconds < 3.95


# -- Codecs that cannot seek -------------------------------------------------------------------------------------------

SEQUENTIAL = [
    *(("WAV", name) for name in ("GSM610", "NMS_ADPCM_16", "NMS_ADPCM_24", "NMS_ADPCM_32", "G721_32")),
    *(("AU", name) for name in ("G721_32", "G723_24", "G723_40")),
    *(("WAV", name) for name in ("IMA_ADPCM", "MS_ADPCM", "ULAW", "ALAW")),
    ("CAF", "ALAC_16"),
]


@pytest.mark.parametrize(("file_format", "subtype"), SEQUENTIAL)
def test_codecs_of_telephones(file_format: str, subtype: str, wave: np.ndarray) -> None:
    data = file_bytes(wave[: 2 * RATE], file_format, subtype)
    expected, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    np.testing.assert_array_equal(heard(data), expected)
    assert odd(data) is None
    np.testing.assert_array_equal(decode(data, None, 1.0, 0.5), expected[RATE : RATE + RATE // 2])


# -- Parts, one after the other ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mp3", "cut mp3", "vorbis", "m4a", "wav", "gsm"])
def test_parts_in_any_order_equal_those_of_the_whole(kind: str, wave: np.ndarray, sound_steps: SimpleNamespace) -> None:
    mp3 = encode(wave, RATE, "mp3")
    data = {
        "mp3": mp3,
        "cut mp3": mp3[:-3000],
        "vorbis": file_bytes(wave, "OGG", "VORBIS"),
        "m4a": sound_steps.encode(wave, RATE, "ipod", "aac"),
        "wav": file_bytes(wave, "WAV"),
        "gsm": file_bytes(wave, "WAV", "GSM610"),
    }[kind]
    whole, parts = decode(data, 32000), ClipParts(data, 32000)
    for start, seconds in [(0, 2), (1.5, 2), (3.25, 0.5), (3.75, 1), (4.7, 9), (9, 1), (0.5, 1), (0.5, 1), (5, None)]:
        first = round(start * 32000)
        expected = whole[first : None if seconds is None else first + round(seconds * 32000)]
        np.testing.assert_allclose(parts.part(start, seconds), expected, atol=1e-6)


def test_windows_take_one_pass_over_a_clip(wave: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding each from the start would take 6 + 5 + 4 + … seconds of audio."""
    decoded, read = [], SoundfileReader.read
    monkeypatch.setattr(SoundfileReader, "read", lambda self, count: decoded.append(read(self, count)) or decoded[-1])
    data, clip = encode(wave, RATE, "mp3"), OpenClip()
    for start in np.arange(0, SECONDS, 0.25):
        clip.part("a", lambda: data, 32000, float(start), 0.25)
    assert sum(map(len, decoded)) == SAMPLES
