"""Events from scores that follow each other: when a class begins and ends to be heard.

Shapes: C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class EventSettings:
    """When an event begins and ends."""

    release: float = 0.5
    """An event goes on while the score is at least this share of the threshold at which it began."""
    min_event_seconds: float = 0.5
    """Shorter events are left out."""
    max_gap_seconds: float = 0.5
    """Events of one class with no more than this between them are one event."""

    def __post_init__(self) -> None:
        if not 0 < self.release <= 1:
            raise ValueError(f"--release must lie above 0 and be at most 1; found {self.release:g}")
        for name in ("min_event_seconds", "max_gap_seconds"):
            if not 0 <= getattr(self, name) <= 3600:
                raise ValueError(
                    f"--{name.replace('_', '-')} must lie between 0 and 3600; found {getattr(self, name):g}"
                )


@dataclass(frozen=True)
class Event:
    """A class that is heard for some time."""

    start_seconds: float
    end_seconds: float
    class_name: str
    peak: float
    """The highest score."""

    def to_json(self) -> dict[str, Any]:
        return {
            "start": round(self.start_seconds, 3),
            "end": round(self.end_seconds, 3),
            "class": self.class_name,
            "peak": float(f"{self.peak:.4g}"),
        }


class EventDetector:
    """Turns scores of stretches of time that follow each other into events. Times are whole samples.

    A class begins when its score reaches its threshold, and goes on while the score is at least ``release`` times that. Memory
    does not grow with time.
    """

    def __init__(
        self, class_names: Sequence[str], thresholds: np.ndarray, sample_rate_hz: int, settings: EventSettings
    ) -> None:
        """
        Args:
            thresholds: (C,) on the scores.
        """
        self.class_names = tuple(class_names)
        self.sample_rate_hz = sample_rate_hz
        self._on, self._off = thresholds, settings.release * thresholds
        self._shortest = round(settings.min_event_seconds * sample_rate_hz)
        self._gap = round(settings.max_gap_seconds * sample_rate_hz)
        count = len(self.class_names)
        self._open = np.zeros(count, bool)  # began, and has not been given back yet
        self._heard = np.zeros(count, bool)  # in the last stretch
        self._start, self._end = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self._peak = np.zeros(count)

    def add(self, start: int, end: int, scores: np.ndarray) -> list[Event]:
        """The events that are over, now that the stretch from ``start`` to ``end`` has these scores (C,)."""
        heard = (scores >= self._on) | (self._heard & (scores >= self._off))
        begins = heard & ~self._open
        self._start[begins], self._peak[begins] = start, 0.0
        self._open |= begins
        self._end[heard] = end
        self._peak[heard] = np.maximum(self._peak[heard], scores[heard])
        self._heard = heard
        return self._close(self._open & ~heard & (end - self._end > self._gap))

    def finish(self, end: int) -> list[Event]:
        """The events that are left when the audio ends; what was heard last is heard up to ``end``."""
        self._end[self._heard] = end
        return self._close(self._open.copy())

    def _close(self, over: np.ndarray) -> list[Event]:
        """In order of their starts, and of the classes where these are equal."""
        self._open &= ~over
        self._heard &= ~over
        numbers = np.flatnonzero(over & (self._end - self._start >= self._shortest))
        numbers = numbers[np.argsort(self._start[numbers], kind="stable")]
        rate = self.sample_rate_hz
        return [
            Event(
                float(self._start[number] / rate),
                float(self._end[number] / rate),
                self.class_names[number],
                float(self._peak[number]),
            )
            for number in numbers
        ]
