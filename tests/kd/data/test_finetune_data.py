"""Splits, windows, batches and examples of fine-tuning."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_datasets.audio.augment import AugmentConfig
from audio_datasets.audio.codec import fit_length
from audio_datasets.audio.impulse_responses import convolve, load_impulse_responses
from audio_datasets.tasks.listing import Clip
from audio_datasets.tasks.task import TaskClips
from kd.data.finetune_data import (
    EvaluationWindows,
    Hearing,
    TaskAugmentConfig,
    TaskExamples,
    equal_batches,
    window_starts,
)
from kd.data.sampling import ClipRequest, EpochBatches, SamplingConfig
from kd.data.splits import partitions, stratified_share
from students.frontend import LogMelConfig

NO_AUGMENT = AugmentConfig(mixup_alpha=0.0, mel_jitter=False)
NO_TASK_AUGMENT = TaskAugmentConfig(waveform_mixup=0.0)


def listed(labels: list[tuple[str, ...]], groups: list[str | None] | None = None, **more: list) -> TaskClips:
    """Clips without audio."""
    names = tuple(sorted({name for clip in labels for name in clip}))
    clips = [
        Clip(
            f"clip{index}",
            Path("nowhere"),
            clip,
            group=groups[index] if groups else None,
            **{key: values[index] for key, values in more.items()},
        )
        for index, clip in enumerate(labels)
    ]
    return TaskClips(Path("own"), names, clips)


class Ramp(TaskClips):
    """Clips whose samples are their own number, counted at 1000 Hz: what is heard tells where it was read."""

    def __init__(self, seconds: list[float]) -> None:
        clips = [Clip(f"clip{index}", Path("nowhere"), ("a",)) for index in range(len(seconds))]
        super().__init__(Path("ramp"), ("a", "b"), clips)
        self.seconds = seconds

    def duration_seconds(self, row: int) -> float:
        return self.seconds[row]

    def waveform(self, row, sample_rate_hz, start_seconds=0.0, seconds=None):
        ramp = 1 + np.arange(round(self.seconds[row] * 1000), dtype=np.float32)
        start = round(start_seconds * 1000)
        return ramp[start : None if seconds is None else start + round(seconds * 1000)]


# -- Splits ------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.integers(0, 9)), min_size=10, max_size=60),
    st.floats(0.1, 0.4),
)
def test_a_stratified_share_divides_no_group(content: list[tuple[str, bool, int]], share: float) -> None:
    labels = [(name, "extra") if extra else (name,) for name, extra, _ in content]
    clips = listed(labels, groups=[str(group) for *_, group in content])
    chosen = stratified_share(clips, np.arange(len(clips)), share, "test")
    groups = np.array([clip.group for clip in clips.clips])
    rest = np.setdiff1d(np.arange(len(clips)), chosen)
    assert not set(groups[chosen]) & set(groups[rest])
    assert len(rest)


def test_a_stratified_share_holds_each_class_in_proportion() -> None:
    clips = listed([("rare",)] * 10 + [("common",)] * 90 + [("single",)])
    chosen = stratified_share(clips, np.arange(101), 0.2, "test")
    counts = dict(zip(clips.class_names, clips.targets(chosen).sum(axis=0), strict=True))
    assert counts == {"rare": 2, "common": 18, "single": 0}
    np.testing.assert_array_equal(chosen, stratified_share(clips, np.arange(101), 0.2, "test"))
    other = stratified_share(clips, np.arange(101), 0.2, "another purpose")
    assert not np.array_equal(chosen, other)


def test_folds_with_validation_clips_set_aside() -> None:
    clips = listed([("a",), ("b",)] * 15, fold=[index // 10 for index in range(30)])
    parts, told = partitions(clips, valid_share=0.2)
    assert "cross-validation" in told
    assert [part.fold for part in parts] == [0, 1, 2]
    for part in parts:
        assert len(part.test) == 10
        assert len(part.valid) == 4
        assert len(part.train) == 16
        assert not set(part.valid) & set(part.train)


def test_clips_of_one_group_on_both_sides_are_refused() -> None:
    clips = listed([("a",), ("b",)] * 2, groups=["x", "x", "y", "y"], fold=[1, 2, 1, 2])
    with pytest.raises(ValueError, match=r"2 groups have clips both in the test of fold 1.*'x', 'y'"):
        partitions(clips)


def test_splits_must_be_whole() -> None:
    with pytest.raises(ValueError, match="'clip1' has none"):
        partitions(listed([("a",), ("b",)], split=["train", None]))
    with pytest.raises(ValueError, match="no clip to test on"):
        partitions(listed([("a",), ("b",)], split=["train", "valid"]))


# -- Batches -----------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 400), st.integers(2, 130), st.integers(1, 4), st.booleans())
def test_batches_are_equal_and_leave_little_over(clips: int, largest: int, per_step: int, pairs: bool) -> None:
    try:
        size = equal_batches(clips, largest, per_step, pairs)
    except ValueError:
        assert clips < 2 * per_step
        return
    assert 2 <= size <= largest
    assert not (pairs and size % 2)
    steps = clips // (size * per_step)
    assert steps >= 1
    assert clips - steps * size * per_step < 2 * steps * per_step


def test_equal_batches() -> None:
    assert equal_batches(320, 128, 1, pairs=True) == 106
    assert equal_batches(320, 32, 1, pairs=True) == 32
    assert equal_batches(129, 128, 1, pairs=True) == 64  # not 128 and 1
    with pytest.raises(ValueError, match="1 training clips are too few"):
        equal_batches(1, 8, 1, pairs=False)


def test_the_balanced_sampler_shows_all_classes_equally_often() -> None:
    clips = listed([("common",)] * 95 + [("rare",)] * 5)
    batches = EpochBatches(
        clips, np.arange(100), SamplingConfig(sampler="balanced"), batch_size=50, batches_per_step=1, seed=0
    )
    rows = []
    for epoch in range(20):
        batches.start_at(epoch, 0)
        rows += [request.row for batch in batches for request in batch]
    assert len(rows) == 2000
    assert abs(np.mean(np.array(rows) >= 95) - 0.5) < 0.05


# -- Examples ----------------------------------------------------------------------------------------------------------


def examples(clips: TaskClips, hearing: Hearing, **settings_given) -> TaskExamples:
    given_settings = {"frontend": LogMelConfig(), "augment": NO_AUGMENT, "task_augment": NO_TASK_AUGMENT, "seed": 3}
    return TaskExamples(clips, np.arange(len(clips)), hearing, **{**given_settings, **settings_given})


def test_a_random_crop_reads_a_slice_and_reaches_all_of_a_long_clip() -> None:
    dataset = examples(Ramp([30.0]), Hearing(1000, 1.0), augment=AugmentConfig(0.0, False, crop="random"))
    starts = []
    for position in range(200):
        wave = dataset[ClipRequest(0, position, 0)]["waveform"].numpy()
        np.testing.assert_array_equal(np.diff(wave), 1.0)
        starts.append(wave[0])
    assert min(starts) < 1500
    assert max(starts) > 27_500
    again = dataset[ClipRequest(0, 5, 0)]["waveform"].numpy()
    assert again[0] == starts[5]


def test_short_clips_are_padded_or_repeated() -> None:
    padded = examples(Ramp([0.3]), Hearing(1000, 1.0))[ClipRequest(0, 0, 0)]["waveform"].numpy()
    assert padded[299] == 300
    assert not padded[300:].any()
    repeated = examples(Ramp([0.3]), Hearing(1000, 1.0, "repeat"))[ClipRequest(0, 0, 0)]["waveform"].numpy()
    np.testing.assert_array_equal(repeated[300:600], repeated[:300])
    np.testing.assert_array_equal(repeated[900:], repeated[:100])


def test_waveform_mixup_mixes_targets_alike() -> None:
    class Two(Ramp):
        def targets(self, rows):
            return np.eye(2, dtype=np.float32)[np.asarray(rows) % 2]

        def waveform(self, row, *ignored):
            return np.full(1000, float(row % 2), dtype=np.float32)

    clips = Two([1.0] * 8)
    equal = examples(clips, Hearing(1000, 1.0), task_augment=TaskAugmentConfig(1.0, waveform_mixup_alpha=0.0))
    found = [equal[ClipRequest(0, position, position)] for position in range(8)]
    for example in found:
        # The waveform is the share of odd clips in it, and so is the second target.
        np.testing.assert_allclose(example["waveform"].numpy(), float(example["targets"][1]))
    assert any(float(example["targets"][1]) == 0.5 for example in found)
    drawn = examples(clips, Hearing(1000, 1.0), task_augment=TaskAugmentConfig(1.0))
    for position in range(8):
        example = drawn[ClipRequest(0, position, position)]
        assert float(example["targets"][position % 2]) >= 0.5  # the larger part is the clip itself


def test_windows_cover_a_clip_whole() -> None:
    assert window_starts(0.3, 10.0) == [0.0]
    assert window_starts(10.003, 10.0) == [0.0]
    assert window_starts(30.0, 10.0) == [0.0, 10.0, 20.0]
    assert window_starts(25.0, 10.0) == [0.0, 7.5, 15.0]
    clips = Ramp([0.5, 2.5, 1.0])
    windows = EvaluationWindows(clips, np.array([2, 1, 0]), Hearing(1000, 1.0))
    assert windows.clip_of == [0, 1, 1, 1, 2]
    np.testing.assert_array_equal(windows[3][1].numpy()[[0, -1]], [1501, 2500])
    means = windows.mean_of_clips(np.array([[1.0], [1.0], [2.0], [6.0], [5.0]]))
    np.testing.assert_allclose(means, [[1.0], [3.0], [5.0]])


# -- Impulse responses -------------------------------------------------------------------------------------------------


def test_convolution_is_numpys(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    wave, response = rng.standard_normal(700).astype(np.float32), rng.standard_normal(90).astype(np.float32)
    np.testing.assert_allclose(convolve(wave, response), np.convolve(wave, response)[:700], atol=1e-4)
    np.testing.assert_allclose(convolve(wave, np.array([1.0])), wave, atol=1e-6)
    assert fit_length(convolve(wave, response), 700).dtype == np.float32
    with pytest.raises(ValueError, match="no impulse responses"):
        load_impulse_responses(tmp_path, 32000)
