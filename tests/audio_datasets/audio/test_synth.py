"""The synthetic scenes: sounds are what their labels say, the same everywhere, and go through ``kd pack``."""

import csv
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audio_datasets import pack
from audio_datasets.audio.synth import CLASS_NAMES, SynthClip, SynthConfig, SynthEvent, synthesise_clip, write_source
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.manifest import select_rows

RATE_HZ = 32000


def sound_of(clip: SynthClip, event: SynthEvent) -> np.ndarray:
    return clip.waveform[event.start_samples : event.start_samples + event.samples].astype(float)


def power_spectrum(sound: np.ndarray) -> np.ndarray:
    return np.abs(np.fft.rfft(sound * np.hanning(sound.shape[-1]))) ** 2


class Measured:
    """What can be measured of one sound without knowing how it was made. Thresholds leave room for faint noise."""

    def __init__(self, sound: np.ndarray):
        self.sound = sound
        self.seconds = len(sound) / RATE_HZ
        self.power = power_spectrum(sound)
        self.frequencies_hz = np.fft.rfftfreq(len(sound), 1 / RATE_HZ)
        frames = np.lib.stride_tricks.sliding_window_view(sound, 1024)[::512]
        self.frame_power = power_spectrum(frames)
        self.loud = self.frame_power.sum(1) > 0.2 * self.frame_power.sum(1).max()

    @cached_property
    def band_hz(self) -> tuple[float, float]:
        """Frequencies below and above which 2 % of the power lies."""
        share = np.cumsum(self.power) / self.power.sum()
        low, high = np.searchsorted(share, (0.02, 0.98))
        return self.frequencies_hz[low], self.frequencies_hz[high]

    @cached_property
    def octaves(self) -> float:
        return np.log2(self.band_hz[1] / self.band_hz[0])

    @cached_property
    def level(self) -> np.ndarray:
        """Root mean square of every 12 ms, relative to the loudest, without the two ends, which are faded."""
        frames = self.sound[: len(self.sound) // 384 * 384].reshape(-1, 384)[1:-1]
        rms = np.sqrt(np.mean(frames**2, axis=1))
        return rms / rms.max()

    @cached_property
    def dies_away(self) -> bool:
        rms = [np.sqrt(np.mean(part**2)) for part in np.array_split(self.sound, 4)]
        return bool(np.all(np.diff(rms) < 0)) and rms[-1] < 0.7 * rms[0]

    @cached_property
    def pitch_hz(self) -> np.ndarray:
        """Strongest frequency in each loud frame, to within about a quarter of the 31 Hz between bins."""
        power = self.frame_power[self.loud]
        near = np.clip(power.argmax(1)[:, None] + np.arange(-2, 3), 0, power.shape[1] - 1)
        weights = np.take_along_axis(power, near, 1)
        return (weights * near).sum(1) / weights.sum(1) * RATE_HZ / 1024

    @cached_property
    def one_tone(self) -> bool:
        """At any loud moment, nearly all power lies around one frequency."""
        power = self.frame_power[self.loud]
        away = np.abs(np.arange(power.shape[1]) - power.argmax(1)[:, None])
        return bool(np.median((power * (away <= 4)).sum(1) / power.sum(1)) > 0.97) and self.pitch_hz.min() > 200

    @cached_property
    def steady_pitch(self) -> bool:
        return bool(np.ptp(self.pitch_hz) < 12)

    @cached_property
    def partials_hz(self) -> np.ndarray:
        """Peaks of the spectrum within 20 dB of the highest, at least 25 Hz apart (of noise, not all)."""
        found: list[float] = []
        for place in np.argsort(self.power)[:-500:-1]:
            frequency_hz = self.frequencies_hz[place]
            if self.power[place] > self.power.max() / 100 and all(abs(frequency_hz - f) > 25 for f in found):
                found.append(frequency_hz)
        return np.sort(found)

    @cached_property
    def harmonic(self) -> bool:
        """The partials are whole multiples of the distance between neighbours."""
        ratios = self.partials_hz / np.median(np.diff(self.partials_hz)) if len(self.partials_hz) > 1 else np.ones(1)
        return bool(np.mean(np.abs(ratios - np.round(ratios))) < 0.08)

    @cached_property
    def noisy(self) -> bool:
        """Power is spread over all the bins of its band; that of tones lies in a few, that of clicks in a few moments."""
        inside = self.power[slice(*np.searchsorted(self.frequencies_hz, self.band_hz))]
        return bool(np.exp(np.log(inside).mean()) > 0.25 * inside.mean()) and not self.clicks

    @cached_property
    def clicks(self) -> bool:
        return bool(np.mean(np.abs(self.sound) > 0.1 * np.abs(self.sound).max()) < 0.1)

    @cached_property
    def click_gaps(self) -> np.ndarray:
        """Samples from one click to the next."""
        loud = np.flatnonzero(np.abs(self.sound) > 0.4 * np.abs(self.sound).max())
        return np.diff(loud[np.diff(loud, prepend=-RATE_HZ) > 0.005 * RATE_HZ])


def silent_part(sound: Measured) -> float:
    return float(np.mean(sound.level < 0.1))


# Asked in this order: the first that fits is the answer.
SIGNATURES = {
    "Click train": lambda s: s.clicks and len(s.click_gaps) > 1 and s.click_gaps.std() < 0.03 * s.click_gaps.mean(),
    "Crackle": lambda s: s.clicks,
    "Chord": lambda s: len(s.partials_hz) == 3 and abs(s.partials_hz[2] / s.partials_hz[0] - 1.5) < 0.02,
    "Beeps": lambda s: s.one_tone and s.steady_pitch and silent_part(s) > 0.25,
    "Modulated tone": lambda s: s.one_tone and s.steady_pitch and s.level.min() < 0.7,
    "Sine tone": lambda s: s.one_tone and s.steady_pitch and s.level.min() > 0.8,
    "Rising chirp": lambda s: s.one_tone and np.all(np.diff(s.pitch_hz) > -2),
    "Falling chirp": lambda s: s.one_tone and np.all(np.diff(s.pitch_hz) < 2),
    "Siren": lambda s: s.one_tone and s.level.min() > 0.8,
    "Noise burst": lambda s: s.noisy and s.seconds <= 0.25 and s.band_hz[1] > 12000,
    "Rumble": lambda s: s.noisy and s.band_hz[1] < 500,
    "Pulsing noise": lambda s: s.noisy and 500 < s.band_hz[1] < 7500 and s.level.min() < 0.25,
    "Hiss": lambda s: s.noisy and s.band_hz[0] > 1400 and s.octaves < 1.1,
    "Buzz": lambda s: s.harmonic and s.level.min() > 0.6,
    "Plucked string": lambda s: s.harmonic and s.dies_away,
    "Bell": lambda s: s.dies_away,
}


def test_sounds_are_what_the_labels_say() -> None:
    assert set(SIGNATURES) == set(CLASS_NAMES)
    config = SynthConfig(max_events=1, min_snr_db=45, max_snr_db=45)
    counts, wrong = dict.fromkeys(CLASS_NAMES, 0), []
    for index in range(320):
        clip = synthesise_clip(config, index)
        sound = Measured(sound_of(clip, clip.events[0]))
        heard = next((name for name, fits in SIGNATURES.items() if fits(sound)), "nothing known")
        counts[clip.labels[0]] += 1
        if (heard,) != clip.labels:
            wrong.append((index, clip.labels[0], heard))
    assert min(counts.values()) >= 8
    assert len(wrong) <= 2, wrong


@pytest.mark.parametrize("snr_db", [-6, 0, 20])
def test_an_event_is_where_and_as_loud_as_it_says(snr_db: float) -> None:
    config = SynthConfig(max_events=1, min_snr_db=snr_db, max_snr_db=snr_db)
    ratios_db = []
    for index in range(24):
        clip = synthesise_clip(config, index)
        (event,) = clip.events
        outside = clip.waveform.astype(float)
        outside[event.start_samples : event.start_samples + event.samples] = 0
        noise = (outside**2).sum() / (len(outside) - event.samples)
        ratios_db.append(10 * np.log10(np.mean(sound_of(clip, event) ** 2) / noise - 1 + 1e-9))
    # In one clip the floor itself differs a little inside and outside the event.
    assert np.median(ratios_db) == pytest.approx(snr_db, abs=0.5)


@pytest.mark.parametrize("config", [SynthConfig(), SynthConfig(sample_rate_hz=16000, clip_seconds=0.5, max_events=16)])
def test_a_clip_is_well_formed(config: SynthConfig) -> None:
    counts = set()
    for index in range(60):
        clip = synthesise_clip(config, index)
        assert clip.waveform.dtype == np.int16
        assert clip.waveform.shape == (round(config.clip_seconds * config.sample_rate_hz),)
        assert 3000 < np.abs(clip.waveform.astype(int)).max() < 32767  # neither inaudible nor clipped
        assert clip.labels == tuple(n for n in CLASS_NAMES if n in {event.class_name for event in clip.events})
        assert len(clip.labels) == len(clip.events)  # each of another class
        assert clip.annotated_labels == clip.labels
        assert all(0 <= e.start_samples <= len(clip.waveform) - e.samples for e in clip.events)
        assert all(config.min_snr_db <= e.snr_db <= config.max_snr_db for e in clip.events)
        counts.add(len(clip.events))
    assert counts == set(range(1, config.max_events + 1))


def test_the_same_samples_on_every_machine() -> None:
    """Stored numbers, within one step of int16, which no rounding difference between processors should reach."""
    config = SynthConfig(seed=7, label_dropout=0.5)
    stored = {
        ("train", 0): (("Buzz",), ("Buzz",), [1241, 223, -2454, 2115, 696, -2161, 903, -1899], 1243.80),
        ("train", 1): (
            ("Beeps", "Rising chirp", "Bell"),
            ("Beeps", "Bell"),
            [-113, 160, -9, 284, 842, -185, -130, 12],
            497.91,
        ),
        ("eval", 0): (
            ("Rising chirp", "Buzz"),
            ("Rising chirp", "Buzz"),
            [1974, 285, 310, -4313, 2660, -600, -1122, 8051],
            4453.59,
        ),
        ("eval", 5): (("Noise burst",), ("Noise burst",), [311, -479, 147, 166, -121, -277, 348, -229], 630.31),
    }
    for (split, index), (labels, annotated, samples, level) in stored.items():
        clip = synthesise_clip(config, index, split)
        assert clip.labels == labels
        assert clip.annotated_labels == annotated
        np.testing.assert_allclose(clip.waveform[::8000], samples, rtol=0, atol=1)
        assert np.sqrt(np.mean(clip.waveform.astype(float) ** 2)) == pytest.approx(level, abs=0.05)


def test_a_clip_depends_on_its_own_key_only() -> None:
    config = SynthConfig(seed=3)
    alone = synthesise_clip(config, 5)
    for index in range(5):
        synthesise_clip(config, index)
    np.random.seed(0)  # noqa: NPY002 - the global generator has no influence
    again = synthesise_clip(config, 5)
    np.testing.assert_array_equal(alone.waveform, again.waveform)
    assert alone.events == again.events
    others = [synthesise_clip(config, 6), synthesise_clip(config, 5, "eval"), synthesise_clip(SynthConfig(seed=4), 5)]
    assert all(not np.array_equal(alone.waveform, other.waveform) for other in others)


def test_label_dropout_removes_labels_but_never_the_loudest_nor_any_sound() -> None:
    whole, incomplete = SynthConfig(max_events=4), SynthConfig(max_events=4, label_dropout=0.4)
    may_go, gone = 0, 0
    for index in range(150):
        clip = synthesise_clip(incomplete, index)
        if index < 10:
            np.testing.assert_array_equal(clip.waveform, synthesise_clip(whole, index).waveform)
        assert set(clip.annotated_labels) <= set(clip.labels)
        assert max(clip.events, key=lambda event: event.snr_db).class_name in clip.annotated_labels
        may_go += len(clip.labels) - 1
        gone += len(clip.labels) - len(clip.annotated_labels)
    assert 0.3 < gone / may_go < 0.5


@pytest.mark.parametrize("audio_format", ["wav", "flac"])
def test_a_source_holds_the_clips_and_the_labels_of_its_splits(tmp_path: Path, audio_format: str) -> None:
    config = SynthConfig(clip_seconds=0.5, label_dropout=0.6)
    manifest = write_source(tmp_path / "source", config, {"train": 12, "eval": 6}, audio_format=audio_format)
    with open(manifest, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["split"] for row in rows] == ["train"] * 12 + ["eval"] * 6
    for place, row in enumerate(rows):
        clip = synthesise_clip(config, place if row["split"] == "train" else place - 12, row["split"])
        samples, rate_hz = soundfile.read(manifest.parent / row["path"], dtype="int16")
        assert rate_hz == config.sample_rate_hz
        np.testing.assert_array_equal(samples, clip.waveform)
        expected = clip.annotated_labels if row["split"] == "train" else clip.labels
        assert tuple(row["labels"].split(";")) == expected
    assert any(
        len(synthesise_clip(config, i).labels) > len(synthesise_clip(config, i).annotated_labels) for i in range(12)
    )


def test_the_number_of_clips_changes_no_clip_and_a_second_run_no_byte(tmp_path: Path) -> None:
    config = SynthConfig(clip_seconds=0.5)
    write_source(tmp_path / "few", config, {"eval": 2})
    write_source(tmp_path / "more", config, {"train": 1, "eval": 3})
    first = {file.relative_to(tmp_path): file.read_bytes() for file in sorted(tmp_path.rglob("*.*"))}
    for index in range(2):
        name = Path("audio", "eval", f"eval-{index:06d}.wav")
        assert first["few" / name] == first["more" / name]
    write_source(tmp_path / "few", config, {"eval": 2})
    assert first == {file.relative_to(tmp_path): file.read_bytes() for file in sorted(tmp_path.rglob("*.*"))}


def test_a_source_goes_through_pack(tmp_path: Path) -> None:
    config = SynthConfig(clip_seconds=0.5)
    manifest = write_source(tmp_path / "source", config, {"train": 3, "eval": 2})
    names, out = manifest.parent / "class_names.txt", tmp_path / "clips.h5"
    assert pack.main([str(manifest), "--out", str(out), "--class-names", str(names), "--workers", "1"]) == 0
    store = ClipStore.open(out)
    assert store.class_names == CLASS_NAMES
    (row,) = store.rows(["eval-000001"])
    clip = synthesise_clip(config, 1, "eval")
    np.testing.assert_array_equal(np.round(store.waveform(row, RATE_HZ) * 32768), clip.waveform)
    assert {CLASS_NAMES[i] for i in np.flatnonzero(store.targets([row])[0])} == set(clip.labels)
    assert [store.clip_id(row) for row in select_rows(store, split="eval")] == ["eval-000000", "eval-000001"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"seed": -1}, "seed"),
        ({"sample_rate_hz": 8000}, "at least 16000; found 8000"),
        ({"clip_seconds": 0.2}, "clip_seconds"),
        ({"clip_seconds": float("nan")}, "clip_seconds"),
        ({"max_events": 0}, "max_events"),
        ({"max_events": len(CLASS_NAMES) + 1}, "max_events"),
        ({"min_snr_db": 5.0, "max_snr_db": 4.0}, "rising order"),
        ({"label_dropout": 1.0}, "label_dropout"),
    ],
)
def test_settings_that_make_no_scene_are_refused(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SynthConfig(**setting)


def test_a_source_of_an_unknown_format_or_without_clips_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wav or flac; found 'mp3'"):
        write_source(tmp_path, SynthConfig(), {"train": 1}, audio_format="mp3")
    with pytest.raises(ValueError, match="none for eval"):
        write_source(tmp_path, SynthConfig(), {"train": 1, "eval": 0})
