"""Synthetic sound scenes with known labels: the embedded data of ``kd demo``, for tests and for trying things out.

A scene is a noise floor with one to a few overlapping sounds at random times and levels. Several classes are easily
taken for each other (rising and falling chirp, tone and amplitude-modulated tone and beeps, regular and irregular
clicks), many sounds are faint, and a class has no pitch of its own: a tagger has to learn shapes in time and frequency.

The same seed gives the same int16 samples on every machine: all random numbers are uniform draws of a counter-based
generator, drawn parameters are rounded to a binary grid before use, and the rest is double precision, where the last
bits of ``sin``, ``exp`` and the FFT, which do differ between processors, are far below one step of int16.

Shapes: a waveform is (samples,), mono.
"""

import csv
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from audio_datasets.system.command import progress
from audio_datasets.system.files import written_aside
from audio_datasets.system.randomness import generator

TAU = 2 * np.pi
FADE_SECONDS = 0.004


@dataclass(frozen=True)
class SynthConfig:
    """What the scenes are like. Raises ValueError for values that make no scene."""

    seed: int = 0
    """Seed of everything: sounds, times, levels and which labels go missing."""
    sample_rate_hz: int = 32000
    """At least 16,000 Hz, since sounds reach up to 7.5 kHz."""
    clip_seconds: float = 2.0
    """Length of every clip; at least 0.5 s, so that each sound fits in."""
    max_events: int = 3
    """A clip has 1 to this many sounds, each of another class."""
    min_snr_db: float = -6.0
    """Faintest sound: its power while it lasts, over the power of the noise floor."""
    max_snr_db: float = 18.0
    """Loudest sound, likewise."""
    label_dropout: float = 0.0
    """Probability that a sound is missing from the annotated labels, as in AudioSet; the loudest is never missing."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must not be negative; found {self.seed}")
        if self.sample_rate_hz < 16000:
            raise ValueError(f"sample_rate_hz must be at least 16000; found {self.sample_rate_hz}")
        if not 0.5 <= self.clip_seconds <= 3600:
            raise ValueError(f"clip_seconds must be 0.5 to 3600; found {self.clip_seconds}")
        if not 1 <= self.max_events <= len(CLASS_NAMES):
            raise ValueError(f"max_events must be 1 to {len(CLASS_NAMES)}, the classes; found {self.max_events}")
        if not -60 <= self.min_snr_db <= self.max_snr_db <= 60:
            raise ValueError(
                "min_snr_db and max_snr_db must be in rising order between -60 and 60; "
                f"found {self.min_snr_db} and {self.max_snr_db}"
            )
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout must be at least 0 and below 1; found {self.label_dropout}")


class SynthEvent(NamedTuple):
    class_name: str
    start_samples: int
    samples: int
    snr_db: float


class SynthClip(NamedTuple):
    clip_id: str
    waveform: np.ndarray  # int16 (samples,)
    events: tuple[SynthEvent, ...]
    labels: tuple[str, ...]  # every class that sounds, in the order of CLASS_NAMES
    annotated_labels: tuple[str, ...]  # what an incomplete annotation says; equals `labels` without label_dropout


def synthesise_clip(config: SynthConfig, index: int, split: str = "train") -> SynthClip:
    """Clip ``index`` of ``split``; depends on nothing but its arguments, so any clip can be made alone."""
    rng = generator(config.seed, f"synth scene {split}", position=index)
    samples = round(config.clip_seconds * config.sample_rate_hz)
    tilt = _uniform(rng, 0.0, 1.0)  # power falls with frequency to this power: white to pink
    scene = _rms_one(_noise(rng, samples, config.sample_rate_hz, lambda f_hz: np.maximum(f_hz, 50.0) ** (-tilt / 2)))
    count = 1 + int(rng.random() * config.max_events)
    events = []
    for choice in np.argsort(rng.random(len(CLASS_NAMES)))[:count]:
        name = CLASS_NAMES[choice]
        sound, (shortest, longest) = SOUNDS[name]
        length = round(_uniform(rng, shortest, min(longest, config.clip_seconds)) * config.sample_rate_hz)
        start = int(rng.random() * (samples - length + 1))
        snr_db = _uniform(rng, config.min_snr_db, config.max_snr_db)
        waveform = _rms_one(_faded(sound(rng, length, config.sample_rate_hz), config.sample_rate_hz))
        scene[start : start + length] += waveform * 10 ** (snr_db / 20)
        events.append(SynthEvent(name, start, length, snr_db))
    peak = 10 ** (_uniform(rng, -20.0, -1.0) / 20)
    pcm = np.round(scene * (peak * 32767 / np.abs(scene).max())).astype(np.int16)
    labels = {event.class_name for event in events}
    return SynthClip(
        clip_id=f"{split}-{index:06d}",
        waveform=pcm,
        events=tuple(events),
        labels=_in_class_order(labels),
        annotated_labels=_in_class_order(_annotated(config, index, split, events)),
    )


def write_source(
    folder: Path,
    config: SynthConfig,
    clips_per_split: Mapping[str, int],
    incomplete_splits: Collection[str] = ("train",),
    audio_format: str = "wav",
    show_progress: bool = False,
) -> Path:
    """Writes audio files, ``class_names.txt`` and ``manifest.csv`` under ``folder``; returns the manifest's path.

    The manifest has the columns clip_id, path (relative to it), labels (separated by ``;``) and split. Clips of
    ``incomplete_splits`` get the annotated labels, the others the true ones. It is written last: where it exists, all
    its files do. Clips of a split do not depend on the other splits nor on how many there are.

    Raises ValueError if ``audio_format`` is neither ``wav`` nor ``flac``, or for a split without clips.
    """
    if audio_format not in ("wav", "flac"):
        raise ValueError(f"audio_format must be wav or flac; found {audio_format!r}")
    if empty := [split for split, count in clips_per_split.items() if count < 1]:
        raise ValueError(f"each split needs at least one clip; found none for {', '.join(empty)}")
    wanted = [(split, index) for split, count in clips_per_split.items() for index in range(count)]
    manifest = folder / "manifest.csv"
    manifest.unlink(missing_ok=True)
    rows = []
    for split, index in progress(wanted, shown=show_progress, desc="synthesising", unit="clip"):
        clip = synthesise_clip(config, index, split)
        path = Path("audio", split, f"{clip.clip_id}.{audio_format}")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / path, clip.waveform, config.sample_rate_hz, subtype="PCM_16")
        labels = clip.annotated_labels if split in incomplete_splits else clip.labels
        rows.append((clip.clip_id, path.as_posix(), ";".join(labels), split))
    with written_aside(folder / "class_names.txt") as aside:
        aside.write_text("".join(f"{name}\n" for name in CLASS_NAMES), encoding="utf-8")
    with written_aside(manifest) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("clip_id", "path", "labels", "split"))
        writer.writerows(rows)
    return manifest


def _annotated(config: SynthConfig, index: int, split: str, events: list[SynthEvent]) -> set[str]:
    # A stream of its own, so that label_dropout changes no sound.
    draws = generator(config.seed, f"synth annotation {split}", position=index).random(len(events))
    heard = {event.class_name for event, draw in zip(events, draws, strict=True) if draw >= config.label_dropout}
    return heard | {max(events, key=lambda event: event.snr_db).class_name}


def _in_class_order(names: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name in CLASS_NAMES if name in names)


# ---- The sounds: each function gives (samples,) in double precision, of any level.


def sine_tone(rng: np.random.Generator, samples: int, sample_rate_hz: int) -> np.ndarray:
    return _sine(rng, _pitch(rng), samples, sample_rate_hz)


def modulated_tone(rng: np.random.Generator, samples: int, sample_rate_hz: int) -> np.ndarray:
    """Tone whose level swings smoothly, 4 to 12 times a second."""
    depth = _uniform(rng, 0.6, 1.0)
    swing = 1 + depth * _sine(rng, _uniform(rng, 4.0, 12.0), samples, sample_rate_hz)
    return swing * _sine(rng, _pitch(rng), samples, sample_rate_hz)


def beeps(rng: np.random.Generator, samples: int, sample_rate_hz: int) -> np.ndarray:
    """Tone switched on and off, 4 to 9 times a second."""
    rate_hz, on_part = _uniform(rng, 4.0, 9.0), _uniform(rng, 0.35, 0.65)
    since_on = (np.arange(samples) * (rate_hz / sample_rate_hz)) % 1
    to_nearest_edge = np.minimum(since_on, on_part - since_on) / rate_hz  # seconds; negative while off
    gate = np.clip(to_nearest_edge / FADE_SECONDS, 0, 1)
    return gate * _sine(rng, _pitch(rng), samples, sample_rate_hz)


def siren(rng: np.random.Generator, samples: int, sample_rate_hz: int) -> np.ndarray:
    """Tone whose pitch swings by 6 to 20 %, 2 to 7 times a second."""
    pitch_hz, rate_hz = _pitch(rng), _uniform(rng, 2.0, 7.0)
    index = _uniform(rng, 0.06, 0.2) * pitch_hz / rate_hz
    return np.sin(_phase(pitch_hz, samples, sample_rate_hz) + index * _sine(rng, rate_hz, samples, sample_rate_hz))


def rising_chirp(rng: np.random.Generator, samples: int, sample_rate_hz: int) -> np.ndarray:
    """Tone gliding up to 1.5 to 3 times its pitch."""
    start_hz = _pitch(rng, 250.0, 2200.0)
    rise_hz = start_hz * (_uniform(rng, 1.5, 3.0) - 1)
    glide = np.arange(samples) / (2 * samples)  # the phase is the integral of the frequency
    return np.sin(_phase(1.0, samples, sample_rate_hz) * (start_hz + rise_hz * glide))


def falling_chirp(rng: np.random.Generator, samples: int, sample_rate_hz: int) -> np.ndarray:
    return rising_chirp(rng, samples, sample_rate_hz)[::-1]


def chord(rng: np.random.Generator, samples: int, sample_rate_hz: int) -> np.ndarray:
    """Major or minor triad of pure tones."""
    root_hz, third = _pitch(rng, 200.0, 1500.0), 5 / 4 if rng.random() < 0.5 else 6 / 5
    return sum(_sine(rng, root_hz * ratio, samples, sample_rate_hz) for ratio in (1, third, 3 / 2))


def buzz(rng: np.random.Generator, samples: int, sample_rate_hz: int) -> np.ndarray:
    """Steady tone with all its harmonics."""
    return _harmonics(_phase(_pitch(rng, 80.0, 300.0), samples, sample_rate_hz), _uniform(rng, 0.65, 0.85))


def plucked_string(rng: np.random.Generator, samples: int, sample_rate_hz: int) -> np.ndarray:
    """Harmonics that die away, the higher the faster: harmonic k falls as exp(-k t / decay)."""
    decay_seconds = _uniform(rng, 0.15, 0.5)
    strength = _uniform(rng, 0.65, 0.85) * np.exp(np.arange(samples) / (-decay_seconds * sample_rate_hz))
    return _harmonics(_phase(_pitch(rng, 100.0, 500.0), samples, sample_rate_hz), strength)


def bell(rng: np.random.Generator, samples: int, sample_rate_hz: int) -> np.ndarray:
    """Inharmonic partials that die away, the higher the faster (ratios near those of a church bell)."""
    strike_hz = _pitch(rng, 300.0, 1200.0)
    decay = np.exp(np.arange(samples) / (-_uniform(rng, 0.4, 1.0) * sample_rate_hz))
    waveform, level = np.zeros(samples), np.ones(samples)
    for ratio in (0.5, 1.0, 1.19, 1.56, 2.0, 2.74):
        level *= decay
        detuned_hz = strike_hz * ratio * _uniform(rng, 0.98, 1.02)
        waveform += level * _sine(rng, detuned_hz, samples, sample_rate_hz)
    return waveform


def noise_burst(rng: np.random.Generator, samples: int, sample_rate_hz: int) -> np.ndarray:
    """Short white noise."""
    return _noise(rng, samples, sample_rate_hz, np.ones_like)


def rumble(rng: np.random.Generator, samples: int, sample_rate_hz: int) -> np.ndarray:
    """Noise below 100 to 350 Hz, falling by 24 dB per octave above."""
    corner_hz = _pitch(rng, 100.0, 350.0)
    return _noise(rng, samples, sample_rate_hz, lambda f_hz: 1 / np.sqrt(1 + (f_hz / corner_hz) ** 8))


def hiss(rng: np.random.Generator, samples: int, sample_rate_hz: int) -> np.ndarray:
    """Noise in a band of half to one octave somewhere between 1.5 and 7.5 kHz."""
    low_hz = _pitch(rng, 1500.0, 3750.0)
    high_hz = low_hz * _uniform(rng, 1.4, 2.0)
    return _noise(rng, samples, sample_rate_hz, lambda f_hz: (low_hz <= f_hz) & (f_hz <= high_hz))


def pulsing_noise(rng: np.random.Generator, samples: int, sample_rate_hz: int) -> np.ndarray:
    """Noise in a band of one to three octaves whose level swings 4 to 12 times a second, like a rotor."""
    low_hz = _pitch(rng, 200.0, 900.0)
    high_hz = low_hz * _pitch(rng, 2.0, 8.0)
    noise = _noise(rng, samples, sample_rate_hz, lambda f_hz: (low_hz <= f_hz) & (f_hz <= high_hz))
    return noise * (1 + _sine(rng, _uniform(rng, 4.0, 12.0), samples, sample_rate_hz))


def click_train(rng: np.random.Generator, samples: int, sample_rate_hz: int) -> np.ndarray:
    """The same click 6 to 20 times a second, evenly."""
    period = sample_rate_hz / _uniform(rng, 6.0, 20.0)
    return _clicks(rng, np.arange(rng.random() * period, samples, period), samples, sample_rate_hz)


def crackle(rng: np.random.Generator, samples: int, sample_rate_hz: int) -> np.ndarray:
    """The same click 6 to 20 times a second on average, at random moments."""
    count = max(3, round(_uniform(rng, 6.0, 20.0) * samples / sample_rate_hz))
    return _clicks(rng, rng.random(count) * samples, samples, sample_rate_hz)


class Sound(NamedTuple):
    make: Callable[[np.random.Generator, int, int], np.ndarray]
    seconds: tuple[float, float]  # shortest and longest


SOUNDS: dict[str, Sound] = {
    "Sine tone": Sound(sine_tone, (0.4, 1.5)),
    "Modulated tone": Sound(modulated_tone, (0.4, 1.5)),
    "Beeps": Sound(beeps, (0.4, 1.5)),
    "Siren": Sound(siren, (0.4, 1.5)),
    "Rising chirp": Sound(rising_chirp, (0.2, 1.0)),
    "Falling chirp": Sound(falling_chirp, (0.2, 1.0)),
    "Chord": Sound(chord, (0.4, 1.5)),
    "Buzz": Sound(buzz, (0.4, 1.5)),
    "Plucked string": Sound(plucked_string, (0.4, 1.2)),
    "Bell": Sound(bell, (0.4, 1.5)),
    "Noise burst": Sound(noise_burst, (0.05, 0.25)),
    "Rumble": Sound(rumble, (0.4, 1.8)),
    "Hiss": Sound(hiss, (0.4, 1.8)),
    "Pulsing noise": Sound(pulsing_noise, (0.45, 1.8)),
    "Click train": Sound(click_train, (0.4, 1.5)),
    "Crackle": Sound(crackle, (0.4, 1.5)),
}
CLASS_NAMES: tuple[str, ...] = tuple(SOUNDS)


# ---- What the sounds are made of.


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Uniform draw between ``low`` and ``high`` on a grid of 1/1024."""
    return round((low + (high - low) * rng.random()) * 1024) / 1024


def _pitch(rng: np.random.Generator, low: float = 250.0, high: float = 3500.0) -> float:
    """Draw between ``low`` and ``high``, uniform in octaves, on a grid of 1/1024.

    Powers differ in the last bit between machines, which a long phase multiplies until int16 shows it. The grid hides it.
    """
    return round(low * (high / low) ** rng.random() * 1024) / 1024


def _phase(frequency_hz: float, samples: int, sample_rate_hz: int) -> np.ndarray:
    return np.arange(samples) * (TAU * frequency_hz / sample_rate_hz)


def _sine(rng: np.random.Generator, frequency_hz: float, samples: int, sample_rate_hz: int) -> np.ndarray:
    return np.sin(_phase(frequency_hz, samples, sample_rate_hz) + TAU * rng.random())


def _harmonics(phase: np.ndarray, strength: float | np.ndarray) -> np.ndarray:
    """Σ over k ≥ 1 of strength^k · sin(k · phase), in closed form (Moorer, "The synthesis of complex audio spectra by
    means of discrete summation formulas", 1976)."""
    return strength * np.sin(phase) / (1 + strength * strength - 2 * strength * np.cos(phase))


def _noise(
    rng: np.random.Generator, samples: int, sample_rate_hz: int, gain: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Noise whose amplitude spectrum follows ``gain`` of the frequency in Hz."""
    padded = -(-samples // 2048) * 2048  # a length that the FFT is fast for
    parts = rng.random((padded // 2 + 1, 2)) - 0.5
    parts *= gain(np.arange(len(parts)) * (sample_rate_hz / padded))[:, None]
    return np.fft.irfft(parts.view(np.complex128)[:, 0], n=padded)[:samples]


def _clicks(rng: np.random.Generator, moments: np.ndarray, samples: int, sample_rate_hz: int) -> np.ndarray:
    """A short damped oscillation at each of ``moments`` (in samples)."""
    length = round(0.006 * sample_rate_hz)
    click = np.exp(np.arange(length) / (-_uniform(rng, 0.5, 1.5) / 1000 * sample_rate_hz))
    click *= np.sin(_phase(_pitch(rng, 800.0, 5000.0), length, sample_rate_hz))
    waveform = np.zeros(samples + length)
    for moment in moments:
        waveform[int(moment) : int(moment) + length] += click
    return waveform[:samples]


def _faded(waveform: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    """Softens both ends, so that no sound begins or ends with a click of its own."""
    ramp = np.arange(1, round(FADE_SECONDS * sample_rate_hz)) / round(FADE_SECONDS * sample_rate_hz)
    waveform = waveform.copy()
    waveform[: len(ramp)] *= ramp
    waveform[-len(ramp) :] *= ramp[::-1]
    return waveform


def _rms_one(waveform: np.ndarray) -> np.ndarray:
    return waveform / np.sqrt(np.mean(waveform * waveform))
