"""A task's clips decoded and resampled once, and then read as 16-bit samples from one file.

A cache is two files named by what is in them, ``KEY.pcm`` (int16 samples, all clips one after the other) and
``KEY.lengths.npy``; the second is written last, so that a cache is whole or absent. Changed audio files have another key.
A clip that cannot be used has no samples there; whoever asks for it is told by its file why.
"""

import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np

from audio_datasets.audio import codec as audio_codec
from audio_datasets.audio.bad_clips import BadClipError, OnBadClip
from audio_datasets.system.command import progress
from audio_datasets.system.files import digest_of, written_aside
from audio_datasets.system.locks import locked
from audio_datasets.tasks.task import TaskClips, usable_durations

BYTES_PER_SAMPLE = 2


class CachedClips(TaskClips):
    """The clips of a task with their waveforms from a cache, at one sample rate, rounded to 16 bits."""

    def __init__(self, clips: TaskClips, folder: Path, sample_rate_hz: int) -> None:
        """``fill_cache`` must have been called; ValueError if it was not, or for other clips."""
        super().__init__(clips.path, clips.class_names, clips.clips)
        self.sample_rate_hz = sample_rate_hz
        self._samples_file, lengths_file = _files(clips, folder, sample_rate_hz)
        if not lengths_file.exists():
            raise ValueError(f"{folder} holds no cache of these clips at {sample_rate_hz} Hz")
        self._offsets = np.concatenate([[0], np.cumsum(np.load(lengths_file, allow_pickle=False))])
        found, needed = self._samples_file.stat().st_size, int(self._offsets[-1]) * BYTES_PER_SAMPLE
        if found != needed:
            raise ValueError(f"{self._samples_file} has {found} bytes in place of {needed}; remove it")

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_samples"}

    @cached_property
    def _samples(self) -> np.ndarray:
        return np.memmap(self._samples_file, np.int16, "r")

    def _is_bad(self, row: int) -> bool:
        return self._offsets[row + 1] == self._offsets[row]

    def duration_seconds(self, row: int) -> float:
        if self._is_bad(row):
            return super().duration_seconds(row)
        return float(self._offsets[row + 1] - self._offsets[row]) / self.sample_rate_hz

    def waveform(
        self, row: int, sample_rate_hz: int, start_seconds: float = 0.0, seconds: float | None = None
    ) -> np.ndarray:
        """(see TaskClips); ValueError for another rate than the cache's."""
        if sample_rate_hz != self.sample_rate_hz:
            raise ValueError(f"the cache holds {self.sample_rate_hz} Hz; {sample_rate_hz} Hz were asked for")
        if self._is_bad(row):
            return super().waveform(row, sample_rate_hz)
        first = self._offsets[row] + round(start_seconds * sample_rate_hz)
        end = self._offsets[row + 1] if seconds is None else first + round(seconds * sample_rate_hz)
        return audio_codec.from_pcm16(self._samples[first : min(end, self._offsets[row + 1])])


def fill_cache(
    clips: TaskClips,
    folder: Path,
    sample_rate_hz: int,
    on_bad_clip: OnBadClip = "refuse",
    before_clip: Callable[[], None] = lambda: None,
) -> None:
    """Decodes every clip into ``folder``, unless that was done before. To be called by one process of a run.

    If another run is at it, this waits. ``before_clip`` is called before a clip is looked at, and while it waits; it may raise,
    which leaves nothing behind.

    Raises:
        BadClipError: audio that cannot be used, unless it is to be skipped.
        ValueError: not enough room on the disk.
    """
    samples_file, lengths_file = _files(clips, folder, sample_rate_hz)
    if lengths_file.exists():
        return
    with locked(lengths_file.with_suffix(".lock"), f"the cache in {folder}", while_busy=before_clip):
        if lengths_file.exists():  # somebody else has just filled it
            return
        for leftover in folder.glob(f".{samples_file.name}.*.tmp"):
            leftover.unlink()
        seconds = sum(usable_durations(clips, on_bad_clip, before_clip))
        needed, free = int(seconds * sample_rate_hz) * BYTES_PER_SAMPLE, shutil.disk_usage(folder).free
        if needed > free:
            raise ValueError(
                f"the cache needs {needed / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free; choose another "
                "folder for --cache, or leave it out"
            )
        lengths = []
        with written_aside(samples_file) as aside, open(aside, "wb") as file:
            for row in progress(range(len(clips)), desc="decode", unit="clip", leave=False):
                before_clip()
                try:
                    samples = audio_codec.to_pcm16(clips.waveform(row, sample_rate_hz))
                except BadClipError:
                    if on_bad_clip == "refuse":
                        raise
                    samples = np.zeros(0, dtype=np.int16)
                lengths.append(len(samples))
                file.write(samples.tobytes())
        with written_aside(lengths_file) as aside, open(aside, "wb") as file:
            np.save(file, np.array(lengths, dtype=np.int64))


def _files(clips: TaskClips, folder: Path, sample_rate_hz: int) -> tuple[Path, Path]:
    described = []
    for clip in clips.clips:
        found = clip.path.stat()
        described.append(f"{clip.clip_id}\0{found.st_size}\0{found.st_mtime_ns}")
    key = digest_of(str(sample_rate_hz), *described)
    return folder / f"{key}.pcm", folder / f"{key}.lengths.npy"
