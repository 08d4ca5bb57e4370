"""The linear probe."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from audio_datasets.tasks.label_space import LabelSpace
from audio_datasets.tasks.listing import Clip
from audio_datasets.tasks.task import TaskClips
from kd.data.splits import Partition
from kd.evaluation import probe as probe_module
from kd.evaluation.label_metrics import multi_label_metrics
from kd.evaluation.metrics import tagging_metrics
from kd.evaluation.probe import clips_to_fit, fit_probe

NAMES = ("a", "b", "c")
EXCLUSIVE, INDEPENDENT = (LabelSpace.single(NAMES, exclusive=exclusive) for exclusive in (True, False))


def labelled(labels: list[tuple[str, ...]], known: list[tuple[str, ...]] | None = None) -> TaskClips:
    clips = [
        Clip(f"clip{index}", Path("nowhere"), names, known=known[index] if known else None)
        for index, names in enumerate(labels)
    ]
    return TaskClips(Path("own"), NAMES, clips)


def test_the_probe_is_logistic_regression_on_standardised_embeddings() -> None:
    rng = np.random.default_rng(0)
    classes = np.arange(60) % 3
    embeddings = rng.standard_normal((60, 5)) + 2.0 * np.eye(5)[classes]
    clips = labelled([(NAMES[index],) for index in classes])
    part = Partition(None, np.arange(40), np.arange(0), np.arange(40, 60))
    logits = fit_probe(clips, EXCLUSIVE, part.train, embeddings).logits(embeddings[part.test])
    mean, deviation = embeddings[:40].mean(axis=0), embeddings[:40].std(axis=0)
    scaled = (embeddings - mean) / deviation
    expected = LogisticRegression(max_iter=1000).fit(scaled[:40], classes[:40]).predict_proba(scaled[40:])
    found = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    absent = Partition(None, np.flatnonzero(classes != 1), np.arange(0), np.flatnonzero(classes == 1))
    without = fit_probe(clips, EXCLUSIVE, absent.train, embeddings)
    assert not (without.logits(embeddings[absent.test]).argmax(axis=1) == 1).any()


def test_the_probe_and_the_metrics_see_only_known_labels() -> None:
    rng = np.random.default_rng(1)
    embeddings = rng.standard_normal((30, 4))
    labels = [tuple(name for name in NAMES if rng.random() < 0.5) for _ in range(30)]
    known = [tuple(name for name in NAMES if rng.random() < 0.7) for _ in range(30)]
    part = Partition(None, np.arange(20), np.arange(0), np.arange(20, 30))
    plain = labelled(labels, known)
    flipped = labelled(
        [
            tuple(name for name in NAMES if (name in has) == (name in knows))
            for has, knows in zip(labels, known, strict=True)
        ],
        known,
    )
    assert not np.array_equal(plain.targets(part.test), flipped.targets(part.test))
    one, other = (
        fit_probe(clips, INDEPENDENT, part.train, embeddings).logits(embeddings[part.test])
        for clips in (plain, flipped)
    )
    np.testing.assert_array_equal(one, other)
    first, second = (
        multi_label_metrics(clips.targets(part.test), one, clips.mask(part.test), NAMES) for clips in (plain, flipped)
    )
    assert first == second
    everything = multi_label_metrics(plain.targets(part.test), one, np.ones((10, 3), dtype=bool), NAMES)
    assert everything["mAP"] == tagging_metrics(plain.targets(part.test), one, NAMES).mean_average_precision


def test_a_very_large_training_set_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.arange(100, 200)
    np.testing.assert_array_equal(clips_to_fit(rows, seed=0), rows)
    monkeypatch.setattr(probe_module, "MOST_CLIPS", 30)
    some = clips_to_fit(rows, seed=0)
    assert len(set(some)) == 30
    assert set(some) <= set(rows)
    assert (np.diff(some) > 0).all()
    np.testing.assert_array_equal(some, clips_to_fit(rows, seed=0))
    assert set(some) != set(clips_to_fit(rows, seed=1))
