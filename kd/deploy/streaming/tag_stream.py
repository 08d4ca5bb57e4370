"""``kd tag`` on a stream: events as JSON lines on standard output, everything else on standard error."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from audio_datasets.audio.codec import mono_blocks
from audio_datasets.audio.readers import open_audio
from audio_datasets.system.stop_signals import StopRequested
from kd.deploy.streaming.event_stream import EventStream, StreamSettings
from kd.deploy.streaming.events import Event
from kd.deploy.streaming.microphone import Microphone
from kd.deploy.tagging.model import TaggingModel

STANDARD_INPUT = "-"
PACE_SECONDS = 10.0
"""Of audio, over which the speed of computing is judged."""


class Source(Protocol):
    """Where samples come from."""

    sample_rate_hz: int

    def chunks(self) -> Iterator[np.ndarray]: ...  # float32 (any,), mono
    def remarks(self) -> list[str]: ...  # what is to be said so far


class FileSource:
    """A file of any format and length, as a stream."""

    def __init__(self, path: Path) -> None:
        self._reader = open_audio(path)
        self.sample_rate_hz = self._reader.sample_rate_hz

    def chunks(self) -> Iterator[np.ndarray]:
        with closing(self._reader):
            yield from mono_blocks(self._reader, 0, None)

    def remarks(self) -> list[str]:
        return self._reader.oddities()


@dataclass
class Pace:
    """Tells when computing takes longer than the audio lasts: whoever sends it then has to wait, or loses samples."""

    audio_seconds: float = 0.0
    busy_seconds: float = 0.0
    _audio: float = 0.0
    _busy: float = 0.0
    slow_stretches: int = 0

    def add(self, audio_seconds: float, busy_seconds: float) -> str | None:
        """What to say, if computing begins to be too slow."""
        self.audio_seconds += audio_seconds
        self.busy_seconds += busy_seconds
        self._audio += audio_seconds
        self._busy += busy_seconds
        if self._audio < PACE_SECONDS:
            return None
        factor, self._audio, self._busy = self._busy / self._audio, 0.0, 0.0
        if factor <= 1:
            return None
        self.slow_stretches += 1
        if self.slow_stretches > 1:
            return None
        return (
            f"at {self.audio_seconds:.0f} s: computing takes {factor:.1f} times as long as the audio lasts; a live source "
            "will lose samples (a longer --hop-seconds or a smaller student helps)"
        )

    def summary(self) -> str:
        factor = self.busy_seconds / self.audio_seconds if self.audio_seconds else 0.0
        slow = f", too slow in {self.slow_stretches:,} stretches of {PACE_SECONDS:g} s" if self.slow_stretches else ""
        return f"{self.audio_seconds:.1f} s of audio; computing took {factor:.2g} times as long{slow}"


def tag_stream(
    model: TaggingModel,
    source: Source,
    settings: StreamSettings,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Prints each event as soon as it is over; returns the command's exit code.

    Ctrl-C and stop signals end the stream: events that are not over yet are printed. Ctrl-C is how a microphone is
    switched off; in all other cases the signal is passed on.
    """
    stream, pace, count = EventStream(model, source.sample_rate_hz, settings), Pace(), 0
    try:
        with closing(source.chunks()) as chunks:
            for chunk in chunks:
                before = clock()
                count += _print(stream.feed(chunk))
                warning = pace.add(len(chunk) / source.sample_rate_hz, clock() - before)
                if warning:
                    print(warning, file=sys.stderr, flush=True)
    except (KeyboardInterrupt, StopRequested) as signal:
        _end(stream, source, pace, count)
        if not (isinstance(signal, KeyboardInterrupt) and isinstance(source, Microphone)):
            raise
        return 0
    _end(stream, source, pace, count)
    return 0


def _end(stream: EventStream, source: Source, pace: Pace, count: int) -> None:
    count += _print(stream.finish())
    for line in [*source.remarks(), f"{count:,} events in {pace.summary()}"]:
        print(line, file=sys.stderr, flush=True)


def _print(events: list[Event]) -> int:
    for event in events:
        print(json.dumps(event.to_json()), flush=True)
    return len(events)


def read_standard_input(count: int) -> bytes:
    """What has arrived, at most so many bytes; none at the end."""
    return os.read(sys.stdin.fileno(), count)
