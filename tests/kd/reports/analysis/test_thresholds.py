"""Thresholds of highest F1, against a search over all thresholds."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import expit
from sklearn.metrics import f1_score

from audio_datasets.system.randomness import generator
from kd.reports.analysis.thresholds import best_threshold, choose_thresholds
from kd.reports.run_reader import Part, Predictions

MakePart = Callable[..., tuple[Part, Predictions]]

scored = arrays(np.int64, st.integers(1, 25), elements=st.integers(-3, 3)).flatmap(
    lambda scores: st.tuples(st.just(scores), arrays(bool, len(scores)).filter(lambda targets: bool(targets.any())))
)


@settings(max_examples=60, deadline=None)
@given(scored)
def test_the_best_threshold_is_the_best_of_all(found: tuple[np.ndarray, np.ndarray]) -> None:
    scores, targets = found
    threshold, f1 = best_threshold(targets, scores)
    candidates = np.append(np.unique(scores) - 0.5, scores.max() + 0.5)
    best = max(f1_score(targets, scores >= candidate, zero_division=0) for candidate in candidates)
    assert f1 == pytest.approx(best)
    assert f1_score(targets, scores >= threshold) == pytest.approx(best)


def test_thresholds_chosen_on_the_test_clips_are_not_judged_by_them(part: MakePart) -> None:
    """With random scores, F1 on the clips that a threshold was chosen on is higher than on others."""
    noise = generator(4, "nothing")
    targets = noise.random((400, 3)) < 0.05
    parts = [part("", noise.standard_normal((400, 3)), targets)]
    thresholds = choose_thresholds(parts)
    assert not thresholds.chosen_on_validation
    logits = parts[0][1].logits
    seemingly = [best_threshold(targets[:, index], logits[:, index])[1] for index in range(3)]
    assert (thresholds.f1 < seemingly).all()
    for index in range(3):
        chosen, _ = best_threshold(targets[:, index], logits[:, index])
        assert thresholds.probability[index] == pytest.approx(expit(chosen))
    # They depend on which clip it is, not on the order of the clips.
    order = noise.permutation(400)
    shuffled = parts[0][1]
    shuffled = Predictions(*(values[order] for values in (shuffled.clip_ids, logits, targets, shuffled.known)))
    np.testing.assert_allclose(choose_thresholds([(parts[0][0], shuffled)]).f1, thresholds.f1)


def test_thresholds_come_from_validation_clips_where_there_are_any(
    tmp_path: Path, random_part: MakePart, names: tuple[str, ...]
) -> None:
    _, test = random_part("")
    ids = [f"v{index}" for index in range(60)]
    targets = np.arange(180).reshape(60, 3) % 4 == 0
    logits = np.where(targets, 2.0, -1.0).astype(np.float32)
    np.savez(tmp_path / "validation_predictions.npz", clip_ids=np.array(ids), logits=logits, targets=targets)
    thresholds = choose_thresholds([(Part(tmp_path, names), test)])
    assert thresholds.chosen_on_validation
    np.testing.assert_allclose(thresholds.probability, expit(0.5))
    expected = f1_score(test.targets, test.logits >= 0.5, average=None)
    np.testing.assert_allclose(thresholds.f1, expected)
