"""Events of audio that arrives piece by piece, by windows that are each computed anew.

Shapes: S samples of a window, C classes.
"""

from dataclasses import dataclass, field

import numpy as np

from audio_datasets.audio.codec import fit_length
from audio_datasets.audio.readers import FASTEST_HZ, SLOWEST_HZ
from audio_datasets.audio.resampling import StreamResampler
from kd.deploy.streaming.events import Event, EventDetector, EventSettings
from kd.deploy.tagging.model import TaggingModel, with_window
from kd.deploy.tagging.tags import scores_of

STREAM_WINDOW_SECONDS = 2.0


@dataclass(frozen=True)
class StreamSettings:
    """How a stream is heard."""

    window_seconds: float | None = None
    """Length of the windows: 2 s if left out, or the model's own length if it takes no other."""
    hop_seconds: float = 0.5
    """Distance between windows."""
    events: EventSettings = field(default_factory=EventSettings)

    def __post_init__(self) -> None:
        if not 0.01 <= self.hop_seconds <= 3600:
            raise ValueError(f"--hop-seconds must lie between 0.01 and 3600; found {self.hop_seconds:g}")


class EventStream:
    """Feed it samples; it returns events as soon as they are over.

    A window's scores count for the stretch of one hop in its middle; those of the first window also before that, and those of the
    last also after. The events do not depend on how the samples are cut into pieces, and memory does not grow with time.
    """

    def __init__(self, model: TaggingModel, sample_rate_hz: int, settings: StreamSettings | None = None) -> None:
        """
        Args:
            sample_rate_hz: rate of the samples that will be fed.

        Raises:
            ValueError: a rate or a window that the model cannot have; windows that leave gaps.
        """
        settings = settings or StreamSettings()
        if not SLOWEST_HZ <= sample_rate_hz <= FASTEST_HZ:
            raise ValueError(f"a sample rate lies between {SLOWEST_HZ} and {FASTEST_HZ} Hz; found {sample_rate_hz}")
        seconds = settings.window_seconds
        if seconds is None:
            seconds = model.window.seconds if model.fixed_length else STREAM_WINDOW_SECONDS
        self.model = with_window(model, seconds)
        self.window = self.model.window
        self.rate = self.window.sample_rate_hz
        """Of the model; all that is counted is counted at this rate."""
        self._hop = round(settings.hop_seconds * self.rate)
        if self._hop > self.window.samples:
            raise ValueError(
                f"windows of {seconds:g} s at every {settings.hop_seconds:g} s leave gaps; the hop is at most the window"
            )
        self._resampler = StreamResampler(sample_rate_hz, self.rate)
        self._detector = EventDetector(model.class_names, model.thresholds, self.rate, settings.events)
        self._pieces: list[np.ndarray] = []
        self._waiting = 0  # samples in the pieces
        self._window_start = 0  # of the first waiting sample
        self._decided = 0  # up to where stretches have their scores

    def feed(self, waveform: np.ndarray) -> list[Event]:
        """float32 (any,), full scale 1.0 -> the events that are over by now."""
        return self._add(self._resampler.feed(np.array(waveform, dtype=np.float32)))  # a copy: buffers are reused

    def finish(self) -> list[Event]:
        """The audio has ended: the events that are left."""
        found = self._add(self._resampler.finish())
        total = self._window_start + self._waiting
        if total == 0:
            return found
        size, waiting = self.window.samples, np.concatenate([np.empty(0, np.float32), *self._pieces])
        heard = self._window_start - self._hop + size if self._window_start else 0
        if total > heard:  # one more window, which ends where the audio ends
            last = waiting if self._window_start == 0 else np.concatenate([self._last, waiting])[-size:]
            found += self._detector.add(self._decided, total, self._scores(self._filled(last)))
        return found + self._detector.finish(total)

    @property
    def seconds(self) -> float:
        """How much has been heard."""
        return (self._window_start + self._waiting) / self.rate

    def _add(self, waveform: np.ndarray) -> list[Event]:
        size, found = self.window.samples, []
        self._pieces.append(waveform)
        self._waiting += len(waveform)
        if self._waiting < size:
            return found
        waiting, start = np.concatenate(self._pieces), 0
        while len(waiting) - start >= size:
            window = waiting[start : start + size]
            end = self._window_start + (size + self._hop) // 2
            found += self._detector.add(self._decided, end, self._scores(window))
            self._decided = end
            self._last = window[: self._hop].copy()
            start += self._hop
            self._window_start += self._hop
        self._pieces, self._waiting = [waiting[start:].copy()], len(waiting) - start
        return found

    def _filled(self, waveform: np.ndarray) -> np.ndarray:
        return fit_length(self.window.repeated(waveform), self.window.samples)

    def _scores(self, window: np.ndarray) -> np.ndarray:
        """(S,) -> (C,). ValueError if they are not finite."""
        logits, _ = self.model.run(np.ascontiguousarray(window)[None])
        if not np.isfinite(logits).all():
            raise ValueError(f"the logits of {self.model.name} are not finite (damaged weights?)")
        return scores_of(logits, self.model.label_space)[0]
