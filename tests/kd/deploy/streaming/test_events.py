"""Events by hysteresis, against a slow reference written another way."""

import numpy as np
import pytest

from audio_datasets.system.randomness import generator
from kd.deploy.streaming.events import Event, EventDetector, EventSettings

NAMES = ("dog", "rain", "clock")


def detected(scores: np.ndarray, thresholds: np.ndarray, settings: EventSettings, rate: int = 10) -> list[Event]:
    """Scores (stretches, C) of stretches of 5 samples."""
    detector, found = EventDetector(NAMES, thresholds, rate, settings), []
    for number, row in enumerate(scores):
        found += detector.add(5 * number, 5 * number + 5, row)
    return found + detector.finish(5 * len(scores))


def by_hand(scores: np.ndarray, thresholds: np.ndarray, settings: EventSettings, rate: int = 10) -> set[Event]:
    """Runs of each class from the whole of its scores: first found, then joined, then those that are too short left out."""
    found = set()
    for name, column, threshold in zip(NAMES, scores.T, thresholds, strict=True):
        runs, place = [], 0
        while place < len(column):
            if column[place] >= threshold:
                end = place
                while end < len(column) and column[end] >= settings.release * threshold:
                    end += 1
                runs.append((5 * place, 5 * end))
                place = end
            else:
                place += 1
        joined: list[tuple[int, int]] = []
        for start, end in runs:
            if joined and start - joined[-1][1] <= settings.max_gap_seconds * rate:
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((start, end))
        for start, end in joined:
            if end - start >= settings.min_event_seconds * rate:
                inside = column[start // 5 : end // 5]
                # What lies in a gap is below the threshold, and therefore below the peak.
                found.add(Event(start / rate, end / rate, name, float(inside.max())))
    return found


@pytest.mark.parametrize("release", [0.5, 1.0])
@pytest.mark.parametrize(("shortest", "gap"), [(0.0, 0.0), (0.5, 0.5), (1.5, 1.0), (1.0, 3.0)])
def test_events_are_those_of_the_whole_sequence(release: float, shortest: float, gap: float) -> None:
    settings = EventSettings(release, shortest, gap)
    thresholds = np.array([0.5, 0.7, 0.9])
    for draw in range(10):
        noise = generator(1, "event scores", 0, draw).random((200, 3))
        scores = (noise + np.roll(noise, 1, axis=0) + np.roll(noise, 2, axis=0)) / 3 * 1.3
        events = detected(scores, thresholds, settings)
        assert set(events) == by_hand(scores, thresholds, settings)
        assert len(events) == len(set(events)) > 5


def test_a_score_holds_an_event_that_would_not_begin_one() -> None:
    scores = np.array([0.4, 0.6, 0.3, 0.4, 0.2, 0.4])[:, None] * np.ones(3)
    (event, *_) = detected(scores, np.full(3, 0.5), EventSettings(0.5, 0.0, 0.0))
    assert event == Event(0.5, 2.0, "dog", 0.6)
    assert event.to_json() == {"start": 0.5, "end": 2.0, "class": "dog", "peak": 0.6}


def test_an_event_is_given_as_soon_as_its_gap_has_passed() -> None:
    detector = EventDetector(("dog",), np.array([0.5]), 10, EventSettings(1.0, 0.0, 0.5))
    given = [len(detector.add(5 * k, 5 * k + 5, np.array([score]))) for k, score in enumerate([1, 0, 1, 0, 0, 0])]
    assert given == [0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"release": 0.0}, "--release must lie above 0"),
        ({"release": 1.1}, "be at most 1; found 1.1"),
        ({"min_event_seconds": -1.0}, "--min-event-seconds must lie between 0 and 3600; found -1"),
        ({"max_gap_seconds": 1e9}, "--max-gap-seconds must lie"),
    ],
)
def test_impossible_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EventSettings(**options)
