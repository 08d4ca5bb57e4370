"""The fine-tuning cache: a task's clips, decoded and resampled once into an ordinary clip store of 16-bit samples.

The store is ``KEY.h5``, where the key depends on its contents: clips, labels, sample rate and what the audio files hold. It
appears by a rename, so it is complete or absent. Clips that cannot be used are not in it; reading one opens its file and
reports the error.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from audio_datasets.audio import codec as audio_codec
from audio_datasets.audio.bad_clips import BadClipError, OnBadClip
from audio_datasets.audio.spool import FilePart, Spool
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.clip_writer import ClipRecord, concatenate, write_clip_store
from audio_datasets.system.command import progress
from audio_datasets.system.disk_space import require_space
from audio_datasets.system.files import digest_of, remove_path
from audio_datasets.system.locks import locked
from audio_datasets.tasks.task import TaskClips, usable_durations

BYTES_PER_SAMPLE = 2
DECODING = "2"
"""Counts up when clips are decoded otherwise: caches from before are not used again."""
WHOLE_SAMPLES = 2**24
"""Longer clips (9 minutes at 32 kHz) are decoded in parts of ``PART_SECONDS``."""
PART_SECONDS = 60
SHARD_BYTES = 64 * 2**20
"""Samples that are held in memory before they are written."""


def _samples(clips: TaskClips, row: int, sample_rate_hz: int, spool: Spool) -> np.ndarray | FilePart:
    """A clip's samples, int16 (samples,). Those of a long one are decoded in parts and wait on the disk."""
    if clips.duration_seconds(row) * sample_rate_hz <= WHOLE_SAMPLES:
        return spool.keep(audio_codec.to_pcm16(clips.waveform(row, sample_rate_hz)))
    return spool.keep_pieces(map(audio_codec.to_pcm16, _parts(clips, row, sample_rate_hz)))


def _parts(clips: TaskClips, row: int, sample_rate_hz: int) -> Iterator[np.ndarray]:
    start = 0
    while len(part := clips.waveform(row, sample_rate_hz, start, PART_SECONDS)):
        yield part
        if len(part) < PART_SECONDS * sample_rate_hz:
            return
        start += PART_SECONDS


class CachedClips(TaskClips):
    """The clips of a task with their waveforms from a cache, at one sample rate, rounded to 16 bits."""

    def __init__(self, clips: TaskClips, folder: Path, sample_rate_hz: int) -> None:
        """``fill_cache`` must have been called; ValueError if it was not, or for other clips."""
        super().__init__(clips.path, clips.class_names, clips.clips, clips.label_space)
        path = cache_path(clips, folder, sample_rate_hz)
        self.know_contents(clips.contents)
        if not path.exists():
            raise ValueError(f"{folder} has no cache of these clips at {sample_rate_hz} Hz")
        self.store = ClipStore.open(path, clips.class_names)
        self.sample_rate_hz = sample_rate_hz
        self._store_rows = self.store.find(self.clip_ids)  # -1 for a clip that cannot be used

    def duration_seconds(self, row: int) -> float:
        stored = int(self._store_rows[row])
        return super().duration_seconds(row) if stored < 0 else self.store.duration_seconds(stored)

    def waveform(
        self, row: int, sample_rate_hz: int, start_seconds: float = 0.0, seconds: float | None = None
    ) -> np.ndarray:
        """(see TaskClips); ValueError for another rate than the cache's."""
        if sample_rate_hz != self.sample_rate_hz:
            raise ValueError(
                f"the cache has a sample rate of {self.sample_rate_hz} Hz; requested were {sample_rate_hz} Hz"
            )
        stored = int(self._store_rows[row])
        if stored < 0:
            return super().waveform(row, sample_rate_hz)
        return self.store.waveform(stored, sample_rate_hz, start_seconds, seconds)


def fill_cache(
    clips: TaskClips,
    folder: Path,
    sample_rate_hz: int,
    on_bad_clip: OnBadClip = "refuse",
    before_clip: Callable[[], None] = lambda: None,
) -> None:
    """Decodes every clip into ``folder``, unless this has been done before. Called by one process of a run.

    Clips are written into small stores that are then merged, so that memory does not grow with their number. If another run is
    filling the same cache, this function waits. ``before_clip`` is called before each clip, and while waiting. It may raise; in that
    case nothing is left behind.

    Raises:
        BadClipError: audio that cannot be used, unless bad clips are skipped.
        ValueError: not enough disk space.
    """
    path = cache_path(clips, folder, sample_rate_hz)
    work = folder / f".{path.stem}.shards"
    if path.exists() and not work.exists():
        return
    with locked(path.with_suffix(".lock"), f"the cache in {folder}", while_busy=before_clip):
        _remove_leftovers(path, work)
        if path.exists():  # another run has just filled it, or was killed while it tidied up
            return
        seconds = sum(usable_durations(clips, on_bad_clip, before_clip))
        size = int(seconds * sample_rate_hz) * BYTES_PER_SAMPLE
        require_space(folder, 2 * size, "filling the cache (shards, then the store; half of it stays)")
        work.mkdir()
        try:
            shards = list(_write_shards(clips, work, sample_rate_hz, on_bad_clip, before_clip))
            concatenate(shards, path, report=lambda clips: before_clip())
        finally:
            remove_path(work)


def cache_path(clips: TaskClips, folder: Path, sample_rate_hz: int) -> Path:
    """The path of the clips' cache. It changes with the labels and with what the audio files hold, which is read if it is not known."""
    contents = clips.contents or clips.take_down_contents()
    described = [DECODING, clips.fingerprint, json.dumps(clips.label_space.to_json()), contents.digest]
    return folder / f"{digest_of(str(sample_rate_hz), *described)}.h5"


def _remove_leftovers(path: Path, work: Path) -> None:
    """Removes the leftovers of a killed process. Safe because no other process is writing there."""
    shutil.rmtree(work, ignore_errors=True)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink()


def _write_shards(
    clips: TaskClips, work: Path, sample_rate_hz: int, on_bad_clip: OnBadClip, before_clip: Callable[[], None]
) -> Iterator[Path]:
    """Clip stores of about ``SHARD_BYTES`` with all clips that can be used, one after the other; at least one store."""
    records: list[ClipRecord] = []
    number, size = 0, 0
    spool = Spool(work)

    def write() -> Path:
        path = work / f"{number}.h5"
        write_clip_store(
            path,
            records,
            clips.class_names,
            audio_kind="pcm16",
            sample_rate_hz=sample_rate_hz,
            label_space=clips.label_space,
        )
        return path

    for row in progress(range(len(clips)), desc="decode", unit="clip", leave=False):
        before_clip()
        try:
            samples = _samples(clips, row, sample_rate_hz, spool)
        except BadClipError:
            if on_bad_clip == "refuse":
                raise
            continue
        clip = clips.clips[row]
        records.append(ClipRecord(clip.clip_id, samples, clip.labels, clip.known))
        size += samples.size if isinstance(samples, FilePart) else samples.nbytes
        if size >= SHARD_BYTES:
            yield write()
            spool.close()
            records, number, size = [], number + 1, 0
    if records or number == 0:
        yield write()
    spool.close()
