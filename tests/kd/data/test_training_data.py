from pathlib import Path

import numpy as np
import torch
from kd.data.training_data import EvaluationClips, TrainingClips
from torch.utils.data import DataLoader

from audio_datasets.audio.augment import AugmentConfig
from audio_datasets.stores.clip_store import ClipStore
from kd.data.sampling import ClipRequest, EpochBatches, SamplingConfig
from students.frontend import LogMelConfig
from teacher_logits.stores.ensemble import LogitEnsemble


def training_clips(store: Path, logits: Path | None, **augment: float) -> TrainingClips:
    return TrainingClips(
        ClipStore.open(store),
        LogitEnsemble.open([logits]) if logits else None,
        frontend=LogMelConfig(),
        clip_seconds=0.4,
        augment=AugmentConfig(**augment),
        seed=5,
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


def test_evaluation_pads_with_silence(tiny_store: Path) -> None:
    clips = EvaluationClips(ClipStore.open(tiny_store), np.array([3]), sample_rate_hz=32000, clip_seconds=1.0)
    index, waveform = clips[0]
    assert index == 0
    assert waveform.shape == (32000,)
    assert waveform[:16000].abs().max() > 0
    assert not waveform[16000:].any()
