"""Events of a stream: the same however it is cut, and those of windows computed by hand; flat memory."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from audio_datasets.audio.resampling import StreamResampler
from audio_datasets.tasks.label_space import LabelSpace
from kd.data.windows import Window
from kd.deploy.streaming.event_stream import EventStream, StreamSettings
from kd.deploy.streaming.events import Event, EventDetector, EventSettings
from kd.deploy.tagging.model import TaggingModel
from kd.deploy.tagging.tagger import Tagger
from kd.deploy.tagging.tags import scores_of

SETTINGS = StreamSettings(window_seconds=0.5, hop_seconds=0.1, events=EventSettings(0.8, 0.0, 0.0))


@pytest.fixture(scope="module")
def waveform() -> np.ndarray:
    """Four seconds at 8 kHz, and a bit: noise, a tone and silence in turn."""
    time = np.arange(33333) / 8000
    parts = (time * 2.5).astype(int) % 3
    noise = 0.2 * np.random.default_rng(0).standard_normal(len(time))
    return np.where(parts == 0, noise, np.where(parts == 1, 0.3 * np.sin(5000 * time), 0)).astype(np.float32)


@pytest.fixture(scope="module")
def tagger(tiny_run: Path, waveform: np.ndarray) -> Tagger:
    """With thresholds in the middle of the scores, so that there are events."""
    tagger = Tagger.load(tiny_run, window_seconds=0.5)
    scores = np.stack([window.scores for window in tagger(waveform, 8000).windows])
    return Tagger.load(tiny_run, threshold=float(np.median(scores)))


def events_in_pieces(stream: EventStream, waveform: np.ndarray, size: int) -> list[Event]:
    found = [event for start in range(0, len(waveform), size) for event in stream.feed(waveform[start : start + size])]
    return found + stream.finish()


def test_the_events_do_not_depend_on_the_pieces(tagger: Tagger, waveform: np.ndarray) -> None:
    found = [events_in_pieces(tagger.stream(8000, SETTINGS), waveform, size) for size in (1, 997, 100_000)]
    assert len(found[0]) > 3
    assert found[0] == found[1] == found[2]
    assert max(event.end_seconds for event in found[0]) <= len(waveform) / 8000 + 1e-3


@pytest.mark.parametrize("samples", [16000, 8000 * 3 // 10, 16000 + 333])
def test_events_are_those_of_windows_cut_by_hand(tagger: Tagger, waveform: np.ndarray, samples: int) -> None:
    """Of audio that ends with a window, is shorter than one, or goes on a little after the last."""
    heard = np.repeat(waveform, 2)[:samples]  # at the student's rate of 16 kHz, so that nothing is resampled
    size, hop = 8000, 1600
    starts = list(range(0, max(1, len(heard) - size + 1), hop))
    if len(heard) > starts[-1] + size:
        starts.append(len(heard) - size)
    windows = [np.pad(heard[start:][:size], (0, size - len(heard[start:][:size]))) for start in starts]
    logits = np.concatenate([tagger.model.run(window[None])[0] for window in windows])
    scores = scores_of(logits, tagger.model.label_space)
    regular = (len(heard) - size) // hop + 1 if len(heard) >= size else 0
    borders = [0, *(start + (size + hop) // 2 for start in starts[:regular])]
    borders[-1 if len(starts) == regular else len(borders) :] = [len(heard)]
    detector = EventDetector(tagger.class_names, tagger.thresholds, 16000, SETTINGS.events)
    wanted = []
    for start, end, row in zip(borders[:-1], borders[1:], scores, strict=True):
        wanted += detector.add(start, end, row)
    assert events_in_pieces(tagger.stream(16000, SETTINGS), heard, 5000) == wanted + detector.finish(len(heard))


def test_no_audio_has_no_events(tagger: Tagger) -> None:
    stream = tagger.stream(8000)
    assert stream.feed(np.empty(0, np.float32)) == []
    assert stream.finish() == []
    assert stream.seconds == 0


def test_streams_have_windows_of_two_seconds_unless_the_model_takes_its_own_only(tagger: Tagger) -> None:
    assert tagger.stream(8000).window.seconds == 2.0
    fixed = TaggingModel(**{**vars(tagger.model), "fixed_length": True})
    assert EventStream(fixed, 8000).window.seconds == 1.0
    with pytest.raises(ValueError, match="takes windows of 1 s only; found 0.5 s"):
        EventStream(fixed, 8000, SETTINGS)


@pytest.mark.parametrize(
    ("rate", "settings", "message"),
    [
        (10, SETTINGS, "a sample rate lies between 1000 and 1000000 Hz; found 10"),
        (8000, StreamSettings(window_seconds=0.5, hop_seconds=0.6), "leave gaps; the hop is at most the window"),
    ],
)
def test_impossible_streams_are_refused(tagger: Tagger, rate: int, settings: StreamSettings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tagger.stream(rate, settings)


def test_memory_is_flat_over_two_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a model that only measures the level, so that this takes a second or two; at 2 kHz, resampled to 1 kHz."""
    monkeypatch.setattr(StreamResampler, "BLOCK_SECONDS", 5.0)
    model = TaggingModel(
        name="level",
        label_space=LabelSpace.single(["loud"], exclusive=False),
        window=Window(1000, 1.0),
        thresholds=np.array([0.6]),
        thresholds_from="default",
        embedding_dim=1,
        fixed_length=False,
        run=lambda windows: (10 * np.abs(windows).mean(1, keepdims=True) - 5, windows[:, :1]),
    )
    stream = EventStream(model, 2000, StreamSettings(hop_seconds=2.0))
    minute = np.repeat(np.tile([1.0, 0.0], 6), 10_000).astype(np.float32)  # five seconds loud, five silent
    count, sizes = 0, []
    tracemalloc.start()
    try:
        for number in range(120):
            count += len(stream.feed(minute))
            if number in (10, 119):
                sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert count + len(stream.finish()) == 120 * 6
    assert sizes[1] < sizes[0] + 50_000
    assert stream.seconds == pytest.approx(7200, abs=1)
