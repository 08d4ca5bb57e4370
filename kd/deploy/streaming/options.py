"""The options of ``kd tag`` that are about streams, and the source and the settings that they describe."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from kd.deploy.streaming.event_stream import StreamSettings
from kd.deploy.streaming.events import EventSettings
from kd.deploy.streaming.microphone import Microphone
from kd.deploy.streaming.pcm import PcmFormat, PcmStream, SampleType
from kd.deploy.streaming.tag_stream import STANDARD_INPUT, FileSource, Source, read_standard_input

SOURCES = ("stream", "microphone")
RAW = ("channels", "sample_type")


@dataclass(frozen=True)
class StreamOptions:
    """Streams: events as JSON lines."""

    help_title: ClassVar[str] = "Streams (events as JSON lines)"

    stream: str | None = None
    """Print events instead of tags: of standard input (-), which is a WAV stream or raw PCM, or of an audio file."""
    microphone: bool = False
    """Print events of what a microphone hears, until Ctrl-C."""
    microphone_device: str | None = None
    """Number of the recording device, or a part of its name (the system's default if left out)."""
    sample_rate_hz: int | None = None
    """Rate of raw PCM from standard input, or of the microphone (the device's own if left out)."""
    channels: int | None = None
    """Channels of raw PCM (1 if left out)."""
    sample_type: SampleType | None = None
    """Samples of raw PCM, little-endian (s16 if left out)."""
    hop_seconds: float | None = None
    """Distance between windows (0.5 s if left out). Windows of a stream last 2 s unless --window-seconds is given."""
    release: float | None = None
    """An event goes on while the score is at least this share of its threshold (0.5 if left out)."""
    min_event_seconds: float | None = None
    """Shorter events are left out (0.5 s if left out)."""
    max_gap_seconds: float | None = None
    """Events of one class with no more than this between them are one event (0.5 s if left out)."""

    def __post_init__(self) -> None:
        given = [item.name for item in dataclasses.fields(self) if getattr(self, item.name) not in (None, False)]
        if not self.is_used:
            if given:
                raise ValueError(f"{_flags(given)} would not be used without --stream or --microphone; leave it out")
            return
        if self.stream is not None and self.microphone:
            raise ValueError("--stream and --microphone exclude each other")
        if self.microphone:
            unused = [name for name in RAW if name in given]
        elif self.stream == STANDARD_INPUT:
            unused = [name for name in ("microphone_device",) if name in given]
            raw = [name for name in RAW if name in given]
            if raw and self.sample_rate_hz is None:
                raise ValueError(f"{_flags(raw)} describes raw PCM, which also needs --sample-rate-hz")
        else:
            unused = [name for name in ("microphone_device", "sample_rate_hz", *RAW) if name in given]
        if unused:
            raise ValueError(f"{_flags(unused)} would not be used with this source; leave it out")
        self.settings(None)
        if self.sample_rate_hz is not None:
            self._format()

    @property
    def is_used(self) -> bool:
        return self.stream is not None or self.microphone

    def settings(self, window_seconds: float | None) -> StreamSettings:
        """How the stream is heard. ValueError for values that are not allowed."""
        events = {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(EventSettings)
            if getattr(self, item.name) is not None
        }
        hop = {} if self.hop_seconds is None else {"hop_seconds": self.hop_seconds}
        return StreamSettings(window_seconds=window_seconds, **hop, events=EventSettings(**events))

    def open(self) -> Source:
        """Where the samples come from. Raises ValueError or OSError if it cannot be opened."""
        if self.microphone:
            return Microphone(self.microphone_device, self.sample_rate_hz)
        if self.stream != STANDARD_INPUT:
            return FileSource(Path(self.stream))
        if sys.stdin.isatty():
            raise ValueError("--stream - reads audio from standard input, which is a terminal; send it through a pipe")
        return PcmStream(read_standard_input, None if self.sample_rate_hz is None else self._format())

    def _format(self) -> PcmFormat:
        return PcmFormat(self.sample_rate_hz, self.channels or 1, self.sample_type or "s16")


def _flags(names: list[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
