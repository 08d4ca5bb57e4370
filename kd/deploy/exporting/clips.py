"""The clips on which an export is compared with PyTorch, and those that calibrate its int8 activations.

Shapes: C classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from audio_datasets.audio.bad_clips import BadClipError
from audio_datasets.audio.codec import AUDIO_SUFFIXES, audio_info, decode, fit_length
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.manifest import select_rows
from audio_datasets.system.randomness import generator
from kd.data.windows import Window, window_starts
from kd.deploy.exporting.subject import Subject
from kd.run_folder.predictions import PREDICTIONS_FILE, VALIDATION_FILE, Predictions

SYNTHETIC_CLIPS = 8


@dataclass(frozen=True)
class ClipSet:
    """Clips by number, and perhaps what they are."""

    description: str
    """Where they come from, such as "the run's validation clips"."""
    names: tuple[str, ...]
    windows: Callable[[int], np.ndarray]
    """The windows of a clip, (windows, samples) float32. Raises BadClipError or ValueError for one that cannot be decoded."""
    targets: np.ndarray | None = None
    """(clips, C) bool; None where labels are not known."""
    known: np.ndarray | None = None
    """(clips, C) bool: which targets are known."""

    def first(self, count: int | None) -> "ClipSet":
        """At most so many of them, evenly spread over all."""
        if count is None or count >= len(self.names):
            return self
        chosen = np.linspace(0, len(self.names) - 1, count).round().astype(int)
        return ClipSet(
            f"{count} of {self.description}",
            tuple(self.names[number] for number in chosen),
            lambda number: self.windows(int(chosen[number])),
            None if self.targets is None else self.targets[chosen],
            None if self.known is None else self.known[chosen],
        )


def parity_clips(subject: Subject, given: Path | None) -> ClipSet:
    """The given clips; else the run's validation clips, else its test clips, else synthetic signals."""
    if given is not None:
        return clips_at(given, subject)
    if subject.run is not None:
        for file, what in ((VALIDATION_FILE, "validation"), (PREDICTIONS_FILE, "test")):
            if (subject.run / file).is_file():
                found = _predicted_clips(subject, Predictions.read(subject.run / file, subject.label_space.class_names))
                if found is not None:
                    return ClipSet(f"the run's {what} clips", *found)
        config = subject.provenance.get("config")
        if isinstance(config, dict) and isinstance(config.get("valid_clips") or config.get("clips"), str | list):
            found = _validation_store(subject, config)
            if found is not None:
                return found
    return synthetic_clips(subject.window)


def clips_at(path: Path, subject: Subject) -> ClipSet:
    """The clips of a clip store, or the audio files in a folder. ValueError if there are none."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES and file.is_file())
        if not files:
            raise ValueError(f"{path} holds no audio files; give a clip store or a folder with audio files")
        names = tuple(file.relative_to(path).as_posix() for file in files)
        return ClipSet(f"the {len(files)} audio files of {path.name}", names, _windows_of_files(files, subject.window))
    if not path.is_file():
        raise ValueError(f"no such clip store or folder: {path}")
    store = ClipStore.open(path, class_names=subject.label_space.class_names)
    return _of_store(store, np.arange(len(store)), subject, f"the {len(store)} clips of {path.name}")


def training_clips(subject: Subject) -> ClipSet | None:
    """Clips that the run trained on, never its test clips; None where they cannot be found again."""
    config = subject.provenance.get("config")
    if not isinstance(config, dict) or subject.run is None:
        return None
    if config.get("task") is not None:
        return _training_clips_of_task(subject, config)
    stores = config.get("clips")
    if not isinstance(stores, list) or not all(Path(store).is_file() for store in stores):
        return None
    store = ClipStore.open(Path(stores[0]), class_names=subject.label_space.class_names)
    rows = select_rows(store, split=config.get("split"), folds=tuple(config.get("folds") or ()) or None)
    return _of_store(store, rows, subject, "the run's training clips")


def synthetic_clips(window: Window) -> ClipSet:
    """Noises and chirps of many levels, for students without any clips."""

    def windows(number: int) -> np.ndarray:
        rng = generator(0, "parity clips", 0, number)
        time = np.arange(window.samples) / window.sample_rate_hz
        chirp = np.sin(2 * np.pi * (100.0 + 400.0 * number + 300.0 * time) * time)
        noise = rng.standard_normal(window.samples)
        level = 10.0 ** -(number % 4)
        return (level * (0.5 * chirp + 0.1 * noise)).astype(np.float32)[None]

    names = tuple(f"synthetic {number}" for number in range(SYNTHETIC_CLIPS))
    return ClipSet(f"{SYNTHETIC_CLIPS} synthetic signals", names, windows)


def cut_into_windows(waveform: np.ndarray, window: Window) -> np.ndarray:
    """(any,) -> (windows, samples): as evaluation hears a clip."""
    starts = window_starts(len(waveform) / window.sample_rate_hz, window.seconds)
    parts = [waveform[round(start * window.sample_rate_hz) :][: window.samples] for start in starts]
    return np.stack([fit_length(window.repeated(part), window.samples) for part in parts]).astype(np.float32)


def _windows_of_files(files: Sequence[Path], window: Window) -> Callable[[int], np.ndarray]:
    def windows(number: int) -> np.ndarray:
        try:
            starts = window_starts(audio_info(files[number]).duration_seconds, window.seconds)
            parts = [decode(files[number], window.sample_rate_hz, start, window.seconds) for start in starts]
        except (ValueError, OSError) as error:
            raise BadClipError(f"{files[number]}: {error}", str(error)) from error
        return np.stack([fit_length(window.repeated(part), window.samples) for part in parts])

    return windows


def _of_store(store: ClipStore, rows: np.ndarray, subject: Subject, description: str) -> ClipSet:
    window = subject.window
    same = tuple(store.class_names) == subject.label_space.class_names

    def windows(number: int) -> np.ndarray:
        row = int(rows[number])
        starts = window_starts(store.duration_seconds(row), window.seconds)
        parts = [store.waveform(row, window.sample_rate_hz, start, window.seconds) for start in starts]
        return np.stack([fit_length(window.repeated(part), window.samples) for part in parts])

    return ClipSet(
        description,
        tuple(store.clip_id(int(row)) for row in rows),
        windows,
        store.targets(rows) > 0.5 if same else None,
        store.mask(rows) if same else None,
    )


def _predicted_clips(
    subject: Subject, predictions: Predictions
) -> tuple[tuple[str, ...], Callable[[int], np.ndarray], np.ndarray, np.ndarray] | None:
    """The clips that predictions were saved of; None if their audio files are not there any more."""
    if predictions.sources is None:
        return None
    files = [Path(source) for source in predictions.sources]
    if not all(file.is_file() for file in files):
        return None
    windows = _windows_of_files(files, subject.window)
    return tuple(map(str, predictions.clip_ids)), windows, predictions.targets, predictions.known


def _validation_store(subject: Subject, config: dict) -> ClipSet | None:
    paths = config.get("valid_clips") or config["clips"]
    path = Path(paths if isinstance(paths, str) else paths[0])
    split, folds = config.get("valid_split"), tuple(config.get("valid_folds") or ())
    if not path.is_file() or not (config.get("valid_clips") or split or folds):
        return None
    store = ClipStore.open(path, class_names=subject.label_space.class_names)
    return _of_store(store, select_rows(store, split=split, folds=folds or None), subject, "the run's validation clips")


def _training_clips_of_task(subject: Subject, config: dict) -> ClipSet | None:
    """All clips of the task but those that the run tested and validated on."""
    from audio_datasets.tasks.catalog import get_task
    from audio_datasets.tasks.task import read_task

    data = Path(str(config.get("data")))
    if not data.exists() or not (subject.run / PREDICTIONS_FILE).is_file():
        return None
    clips, _ = read_task(
        get_task(config["task"]),
        data,
        "leave-out",
        allow_outside=config.get("allow_outside") is True,
        on_bad_clip="skip",
    )
    held_out: set[str] = set()
    for file in (PREDICTIONS_FILE, VALIDATION_FILE):
        if (subject.run / file).is_file():
            held_out |= set(Predictions.read(subject.run / file, subject.label_space.class_names).clip_ids)
    files = {clip.clip_id: clip.path for clip in clips.clips if clip.clip_id not in held_out and clip.row is None}
    if not files:
        return None
    return ClipSet("the run's training clips", tuple(files), _windows_of_files(list(files.values()), subject.window))
