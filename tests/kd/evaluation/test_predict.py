"""What a tagger says of chosen clips: the mean over windows, bad clips, and the tables made from it."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from audio_datasets.audio.bad_clips import BadClipError
from kd.data.windows import Window
from kd.evaluation.metrics import tagging_metrics
from kd.evaluation.predict import ClipEvaluator, class_table, drop_skipped, listed_absent

SECONDS = [0.5, 2.5, 1.0, 3.0, 0.2]
ROWS = np.array([3, 0, 4, 1])


def moments(waveform: torch.Tensor) -> torch.Tensor:
    """(batch, samples) -> (batch, 2): mean and largest sample."""
    return torch.stack([waveform.mean(1), waveform.amax(1)], dim=1)


def evaluator(clips: object, batch_size: int = 3, workers: int = 0, **options: object) -> ClipEvaluator:
    return ClipEvaluator(
        Accelerator(cpu=True),
        clips,
        ROWS,
        Window(100, 1.0),
        batch_size=batch_size,
        workers=workers,
        description="test",
        **options,
    )


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_each_clip_is_the_mean_over_its_windows_in_the_order_of_the_rows(numbered_clips: type, batch_size: int) -> None:
    clips = numbered_clips(("a", "b"), np.zeros((5, 2)), seconds=SECONDS)
    found = evaluator(clips, batch_size).predict(moments)
    expected = []
    for row in ROWS:
        starts = {3: [0.0, 1.0, 2.0], 1: [0.0, 0.75, 1.5]}.get(int(row), [0.0])
        windows = np.zeros((len(starts), 100), dtype=np.float32)
        for window, start in zip(windows, starts, strict=True):
            heard = clips.waveform(int(row), 100, start, 1.0)
            window[: len(heard)] = heard
        expected.append([windows.mean(1).mean(), windows.max(1).mean()])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found.dtype == np.float32


def test_only_the_beginning_counts_on_request(numbered_clips: type) -> None:
    clips = numbered_clips(("a", "b"), np.zeros((5, 2)), seconds=SECONDS)
    found = evaluator(clips, whole_clips=False).predict(moments)
    np.testing.assert_allclose(found[:, 1], ROWS + 1.5)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_clips_are_refused_or_left_without_values(numbered_clips: type, workers: int) -> None:
    clips = numbered_clips(("a", "b"), np.zeros((5, 2)), seconds=SECONDS, bad=(1,))
    skipping = evaluator(clips, workers=workers, on_bad_clip="skip")
    found = skipping.predict(moments)
    assert np.isnan(found).any(axis=1).tolist() == [False, False, False, True]
    assert skipping.skipped == {"clip1": "no sound"}
    clips_again = numbered_clips(("a", "b"), np.zeros((5, 2)), seconds=SECONDS)
    np.testing.assert_array_equal(found[:3], evaluator(clips_again).predict(moments)[:3])
    with pytest.raises(BadClipError, match="clip1"):
        evaluator(clips, workers=workers).predict(moments)


def test_a_tagger_whose_output_is_not_finite_is_named_with_the_clip(numbered_clips: type) -> None:
    clips = numbered_clips(("a", "b"), np.zeros((5, 2)), seconds=SECONDS)

    def broken(waveform: torch.Tensor) -> torch.Tensor:
        return torch.where((waveform.amax(1, keepdim=True) == 5.5), torch.nan, moments(waveform))

    with pytest.raises(ValueError, match="not finite for clip 'clip4'"):
        evaluator(clips).predict(broken)


def test_every_batch_asks_first_and_may_end_it(numbered_clips: type) -> None:
    clips = numbered_clips(("a", "b"), np.zeros((5, 2)), seconds=SECONDS)
    calls: list[int] = []

    def stop_at_second() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluator(clips).predict(moments, stop_at_second)
    assert len(calls) == 2


def test_an_evaluator_may_be_used_again(numbered_clips: type) -> None:
    clips = numbered_clips(("a", "b"), np.zeros((5, 2)), seconds=SECONDS)
    again = evaluator(clips)
    first = again.predict(moments)
    np.testing.assert_array_equal(again.predict(lambda waveform: -moments(waveform)), -first)


def test_skipped_clips_are_dropped_with_their_rows() -> None:
    values = np.array([[1.0, 2.0], [np.nan, np.nan], [3.0, 4.0]])
    rows, kept = drop_skipped(np.array([7, 8, 9]), values, "test")
    assert rows.tolist() == [7, 9]
    assert kept.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    with pytest.raises(ValueError, match="none of the 2 test clips can be used"):
        drop_skipped(np.array([7, 8]), np.full((2, 2), np.nan), "test")


def test_tables_list_the_best_classes_first_and_name_those_that_do_not_occur() -> None:
    targets = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]], dtype=np.float32)
    scores = np.array([[0.0, 0.1, 0.0, 0.0], [1.0, 0.9, 0.0, 0.0], [0.0, 0.8, 0.0, 0.0]])
    names = ("often wrong", "right", "no clip", "neither")
    found = tagging_metrics(targets, scores, names)
    lines = class_table(found, names).splitlines()
    assert [line.split()[0] for line in lines] == ["class", "right", "often"]
    assert lines[1].split()[1:] == ["2", "1.000", "1.000"]
    assert lines[2].split()[2] == "1"
    assert listed_absent(found) == "2 classes without clips are left out: no clip, neither"
    assert listed_absent(found, at_most=1) == "2 classes without clips are left out: no clip and 1 more"
    assert listed_absent(tagging_metrics(targets[:, :2], scores[:, :2], names[:2])) == "every class occurs"
