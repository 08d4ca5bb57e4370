"""Training examples: what a clip becomes, and what it depends on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from audio_datasets.audio.augment import AugmentConfig
from audio_datasets.audio.bad_clips import BadClipError, ClipList
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.system.randomness import generator
from audio_datasets.tasks.task import TaskClips
from kd.data.examples import TrainingExamples
from kd.data.replacements import Replacements
from kd.data.sampling import ClipRequest, EpochBatches, SamplingConfig
from kd.data.windows import Clips, Window
from students.frontend import LogMelConfig
from teacher_logits.store import write_logit_store
from teacher_logits.stores.ensemble import LogitEnsemble


def training_clips(store: Path, logits: Path | None, **augment: float) -> TrainingExamples:
    clips = ClipStore.open(store)
    return TrainingExamples(
        clips,
        np.arange(len(clips)),
        Window(32000, 0.4),
        frontend=LogMelConfig(),
        augment=AugmentConfig(**augment),
        seed=5,
        teachers=LogitEnsemble.open([logits]) if logits else None,
    )


def test_an_example_holds_the_clips_own_audio_labels_and_logits(tiny_store: Path, tiny_logits: Path) -> None:
    store, ensemble = ClipStore.open(tiny_store), LogitEnsemble.open([tiny_logits])
    example = training_clips(tiny_store, tiny_logits)[ClipRequest(epoch=1, position=6, row=4)]
    np.testing.assert_array_equal(example["waveform"], store.waveform(4, 32000)[:12800])
    np.testing.assert_array_equal(example["targets"], store.targets([4])[0])
    np.testing.assert_array_equal(example["teacher_logits"], ensemble.read([store.clip_id(4)])[0][0])
    assert example["has_teacher"]
    low, high = example["band_edges"].tolist()
    assert 0 <= low < 10
    assert 14000 <= high <= 16000


def test_what_is_drawn_depends_on_epoch_and_position_alone(tiny_store: Path) -> None:
    clips = training_clips(tiny_store, None, gain_db=6)
    request = ClipRequest(epoch=2, position=3, row=1)
    first = clips[request]
    clips[ClipRequest(0, 0, 0)]  # draws made in between change nothing
    again = clips[request]
    assert all(torch.equal(torch.as_tensor(first[key]), torch.as_tensor(again[key])) for key in first)
    for other in (ClipRequest(3, 3, 1), ClipRequest(2, 4, 1)):
        changed = clips[other]
        for key in ("waveform", "band_edges", "mix_weight", "sample_key"):
            assert not torch.equal(torch.as_tensor(first[key]), torch.as_tensor(changed[key])), key


def test_workers_change_nothing(tiny_store: Path, tiny_logits: Path) -> None:
    clips = training_clips(tiny_store, tiny_logits)
    seen = []
    for workers in (0, 2):
        batches = EpochBatches(clips.clips, np.arange(12), SamplingConfig(), batch_size=4, batches_per_step=1, seed=5)
        seen.append(list(DataLoader(clips, batch_sampler=batches, num_workers=workers)))
    for alone, shared in zip(*seen, strict=True):
        assert alone.keys() == shared.keys()
        assert all(torch.equal(alone[key], shared[key]) for key in alone)


def examples(clips: Clips, window: Window, **augment: Any) -> TrainingExamples:
    plain = AugmentConfig(**{"mixup_alpha": 0.0, "mel_jitter": False, **augment})
    return TrainingExamples(clips, np.arange(len(clips)), window, frontend=LogMelConfig(), augment=plain, seed=3)


def test_a_random_crop_reads_a_slice_and_reaches_all_of_a_long_clip(ramp: type) -> None:
    dataset = examples(ramp([30.0]), Window(1000, 1.0), crop="random")
    starts = []
    for position in range(200):
        wave = dataset[ClipRequest(0, position, 0)]["waveform"].numpy()
        np.testing.assert_array_equal(np.diff(wave), 1.0)
        starts.append(wave[0])
    assert min(starts) < 1500
    assert max(starts) > 27_500
    again = dataset[ClipRequest(0, 5, 0)]["waveform"].numpy()
    assert again[0] == starts[5]


def test_short_clips_are_padded_or_repeated(ramp: type) -> None:
    padded = examples(ramp([0.3]), Window(1000, 1.0))[ClipRequest(0, 0, 0)]["waveform"].numpy()
    assert padded[299] == 300
    assert not padded[300:].any()
    repeated = examples(ramp([0.3]), Window(1000, 1.0, "repeat"))[ClipRequest(0, 0, 0)]["waveform"].numpy()
    np.testing.assert_array_equal(repeated[300:600], repeated[:300])
    np.testing.assert_array_equal(repeated[900:], repeated[:100])


def test_waveform_mixup_mixes_targets_alike(ramp: type) -> None:
    class Two(ramp):
        def targets(self, rows):
            return np.eye(2, dtype=np.float32)[np.asarray(rows) % 2]

        def waveform(self, row, *ignored):
            return np.full(1000, float(row % 2), dtype=np.float32)

    clips = Two([1.0] * 8)
    equal = examples(clips, Window(1000, 1.0), waveform_mixup=1.0, waveform_mixup_alpha=0.0)
    found = [equal[ClipRequest(0, position, position)] for position in range(8)]
    for example in found:
        # The waveform is the share of odd clips in it, and so is the second target.
        np.testing.assert_allclose(example["waveform"].numpy(), float(example["targets"][1]))
    assert any(float(example["targets"][1]) == 0.5 for example in found)
    drawn = examples(clips, Window(1000, 1.0), waveform_mixup=1.0)
    for position in range(8):
        example = drawn[ClipRequest(0, position, position)]
        assert float(example["targets"][position % 2]) >= 0.5  # the larger part is the clip itself


def test_a_mixed_waveform_brings_both_teachers(tiny_store: Path, tiny_logits: Path) -> None:
    """Logits cannot be mixed like probabilities, so the objective gets both."""
    plain = training_clips(tiny_store, tiny_logits, mixup_alpha=0.0)
    mixed = training_clips(tiny_store, tiny_logits, mixup_alpha=0.0, waveform_mixup=0.5)
    shares = []
    for position in range(12):
        one, both = plain[ClipRequest(0, position, position)], mixed[ClipRequest(0, position, position)]
        assert torch.equal(one["teacher_logits"], both["teacher_logits"])
        share = both["waveform_mix_weight"]
        shares.append(float(share))
        if share == 1:
            assert torch.equal(both["teacher_logits"], both["mixed_with_teacher_logits"])
            assert torch.equal(both["waveform"], one["waveform"])
        rest = (both["targets"] - share * one["targets"]) / (1 - share).clamp(min=1e-9)
        if share < 1:
            np.testing.assert_allclose(rest, rest.round(), atol=1e-5)  # what remains is another clip's labels
    assert 0 < sum(share == 1 for share in shares) < 12


def test_a_clip_with_labels_is_mixed_with_another_that_has_labels(clips_with_labels: Callable[..., TaskClips]) -> None:
    """Else the labels of the few would be unknown in nearly every mixture."""
    labels = [("a",), ("b",)] + [()] * 18
    clips = clips_with_labels(labels, known=[None] * 2 + [()] * 18)
    clips.waveform = lambda row, *span: np.full(400, float(row), dtype=np.float32)  # type: ignore[method-assign]
    clips.duration_seconds = lambda row: 0.4  # type: ignore[method-assign]
    augment = AugmentConfig(waveform_mixup=1.0, waveform_mixup_alpha=0.0, mixup_alpha=0.0, mel_jitter=False)
    frontend = LogMelConfig()
    examples = TrainingExamples(clips, np.arange(20), Window(1000, 0.4), frontend=frontend, augment=augment, seed=0)
    seen = {True: set(), False: set()}
    for position in range(40):
        for row in (0, 7):
            example = examples[ClipRequest(0, position, row)]
            partner = round(2 * float(example["waveform"][0]) - row)
            seen[row == 0].add(partner)
            assert example["known"].all() == (row == 0)
    assert seen[True] == {0, 1}
    assert seen[False] <= set(range(2, 20))
    assert len(seen[False]) > 10


def test_a_random_crop_stays_within_what_the_teachers_heard(ramp: Callable[..., TaskClips], tmp_path: Path) -> None:
    """The logits are of the first 0.5 s of each clip."""
    clips = ramp([5.0] * 2)
    write_logit_store(
        tmp_path / "logits.h5",
        clip_ids=clips.clip_ids,
        audio_digests=np.zeros((2, 16), dtype=np.uint8),
        logit_blocks=[np.zeros((2, 2), dtype=np.float16)],
        class_names=clips.class_names,
        teacher={"name": "t", "clip_seconds": 0.5},
        clip_store_fingerprint="0",
    )
    options = {"frontend": LogMelConfig(), "seed": 0}
    options["augment"] = AugmentConfig(crop="random", mixup_alpha=0.0, mel_jitter=False)
    heard = {}
    for logits in (None, LogitEnsemble.open([tmp_path / "logits.h5"])):
        examples = TrainingExamples(clips, np.arange(2), Window(1000, 0.2), teachers=logits, **options)
        heard[logits is None] = max(
            float(examples[ClipRequest(0, position, 0)]["waveform"].max()) for position in range(50)
        )
    assert heard[True] > 2000
    assert 400 < heard[False] <= 500


def test_a_bad_clip_is_replaced_by_one_of_its_kind(tmp_path: Path) -> None:
    """Of rows 10 to 19 the first three have labels."""
    rows = np.arange(10, 20)
    replacements = Replacements(rows, ClipList(tmp_path / "skipped.txt"), has_labels=rows < 13)

    def read(row: int) -> int:
        if row in (10, 15):
            raise BadClipError(f"clip {row}", "broken")
        return row

    def drawn(row: int) -> set[int]:
        return {replacements.first_usable(row, read, generator(0, "test", 0, number), str) for number in range(60)}

    assert drawn(10) == {11, 12}
    assert drawn(15) == {13, 14, 16, 17, 18, 19}
