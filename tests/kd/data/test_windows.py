"""Windows that evaluation hears."""

from pathlib import Path

import numpy as np

from audio_datasets.stores.clip_store import ClipStore
from kd.data.windows import EvaluationWindows, Window, window_starts


def test_windows_cover_a_clip_whole(ramp: type) -> None:
    assert window_starts(0.3, 10.0) == [0.0]
    assert window_starts(10.003, 10.0) == [0.0]
    assert window_starts(30.0, 10.0) == [0.0, 10.0, 20.0]
    assert window_starts(25.0, 10.0) == [0.0, 7.5, 15.0]
    clips = ramp([0.5, 2.5, 1.0])
    windows = EvaluationWindows(clips, np.array([2, 1, 0]), Window(1000, 1.0))
    assert windows.clip_of == [0, 1, 1, 1, 2]
    np.testing.assert_array_equal(windows[3][1].numpy()[[0, -1]], [1501, 2500])
    means = windows.mean_of_clips(np.array([[1.0], [1.0], [2.0], [6.0], [5.0]]))
    np.testing.assert_allclose(means, [[1.0], [3.0], [5.0]])


def test_only_the_beginning_is_heard_on_request(ramp: type) -> None:
    windows = EvaluationWindows(ramp([2.5, 0.5]), np.array([0, 1]), Window(1000, 1.0), whole_clips=False)
    assert windows.clip_of == [0, 1]
    np.testing.assert_array_equal(windows[0][1].numpy()[[0, -1]], [1, 1000])


def test_evaluation_pads_with_silence(tiny_store: Path) -> None:
    windows = EvaluationWindows(ClipStore.open(tiny_store), np.array([3]), Window(32000, 1.0))
    index, waveform = windows[0]
    assert index == 0
    assert waveform.shape == (32000,)
    assert waveform[:16000].abs().max() > 0
    assert not waveform[16000:].any()
