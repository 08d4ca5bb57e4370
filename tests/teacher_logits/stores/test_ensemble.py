"""Ensembles of logit stores: weighted means, weights of 0, and what must be refused."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit

from teacher_logits.store import to_float16, write_logit_store
from teacher_logits.stores.ensemble import LogitEnsemble, parse_weighted_path, weighted_mean

CLASSES = ("dog", "rain, heavy", "Geige ♪")


def write(path: Path, ids, logits=None, classes=CLASSES, digests=None) -> np.ndarray:
    """Writes a store with random logits (or the given ones) and returns them as float16."""
    if logits is None:
        logits = np.random.default_rng(len(ids)).normal(0, 4, (len(ids), len(classes)))
    logits = to_float16(np.asarray(logits), ids)
    write_logit_store(
        path,
        clip_ids=ids,
        audio_digests=np.zeros((len(ids), 16), np.uint8) if digests is None else digests,
        logit_blocks=[logits],
        class_names=classes,
        teacher={"name": "T", "fingerprint": "f", "link": "sigmoid"},
        clip_store_fingerprint="clips",
    )
    return logits


@dataclass
class Clips:
    """As much of a clip store as ``check_against`` looks at."""

    ids: list[str]
    digests: np.ndarray
    class_names: tuple[str, ...] = CLASSES
    path: Path = field(default=Path("clips.h5"))

    def __len__(self) -> int:
        return len(self.ids)

    def clip_id(self, row: int) -> str:
        return self.ids[row]

    def audio_digests(self, rows: np.ndarray) -> np.ndarray:
        return self.digests[rows]


def test_an_ensemble_is_the_weighted_mean_where_all_have_the_clip(tmp_path):
    a = write(tmp_path / "a.h5", ["x", "y", "z"]).astype(np.float64)
    b = write(tmp_path / "b.h5", ["z", "y"]).astype(np.float64)
    ensemble = LogitEnsemble.open([f"{tmp_path / 'a.h5'}:3", tmp_path / "b.h5"])
    mean, present = ensemble.read(["z", "x", "y"])
    assert present.tolist() == [True, False, True]
    np.testing.assert_allclose(mean[0], 0.75 * a[2] + 0.25 * b[0], rtol=1e-6)
    np.testing.assert_allclose(mean[2], 0.75 * a[1] + 0.25 * b[1], rtol=1e-6)
    assert not mean[1].any()
    assert ensemble.present(["x", "y", "?"]).tolist() == [False, True, False]
    assert [store["weight"] for store in ensemble.describe()] == [3.0, 1.0]


def test_a_weight_of_0_takes_a_store_out_without_another_run_of_the_teacher(tmp_path):
    a = write(tmp_path / "a.h5", ["x", "y"])
    write(tmp_path / "b.h5", ["x"], np.array([[9.0, -9.0, 9.0]]))
    specs = [tmp_path / "a.h5", f"{tmp_path / 'b.h5'}:2"]
    both, _ = LogitEnsemble.open(specs).read(["x"])
    ensemble = LogitEnsemble.open([tmp_path / "a.h5", f"{tmp_path / 'b.h5'}:0"])
    alone, present = ensemble.read(["x", "y"])
    np.testing.assert_array_equal(alone, a.astype(np.float32))
    assert present.all()  # a clip that only the idle store lacks is not missing
    assert not np.allclose(both[0], alone[0])
    assert [store.path.name for store in ensemble.taking_part] == ["a.h5"]
    assert [store["weight"] for store in ensemble.describe()] == [1.0, 0.0]
    digests = np.ones((2, 16), np.uint8)
    assert not ensemble.check_against(Clips(["x", "y"], digests)).any()


def test_the_mean_of_probabilities_is_read_as_its_logit(tmp_path):
    a = write(tmp_path / "a.h5", ["x", "y", "z"]).astype(np.float64)
    b = write(tmp_path / "b.h5", ["x", "y", "z"], np.full((3, 3), -5.5)).astype(np.float64)
    ensemble = LogitEnsemble.open([f"{tmp_path / 'a.h5'}:3", tmp_path / "b.h5"], mean="probabilities")
    read, _ = ensemble.read(["x", "y", "z"])
    assert read.dtype == np.float32
    np.testing.assert_allclose(expit(read), 0.75 * expit(a) + 0.25 * expit(b), rtol=1e-5)
    assert {store["mean_of"] for store in ensemble.describe()} == {"probabilities"}


def test_a_mean_of_probabilities_stays_finite_where_they_round_to_0_and_1():
    sure = np.array([[40.0, -40.0, 65504.0, -65504.0]], np.float32)
    np.testing.assert_allclose(weighted_mean([sure, sure], [1, 1], "probabilities"), [[40, -40, 700, -700]], rtol=1e-6)
    # σ(40) and σ(0): 1 minus the mean is a quarter, to all digits.
    one = weighted_mean([sure[:, :1], np.zeros((1, 1), np.float32)], [1, 1], "probabilities")
    np.testing.assert_allclose(one, np.log(3), rtol=1e-6)


def test_ensembles_that_are_refused(tmp_path):
    write(tmp_path / "a.h5", ["x"])
    write(tmp_path / "b.h5", ["x"], classes=("dog", "rain", "Geige ♪"))
    with pytest.raises(ValueError, match=r"class 1 is 'rain, heavy' in .*a\.h5 and 'rain' in .*b\.h5"):
        LogitEnsemble.open([tmp_path / "a.h5", tmp_path / "b.h5"])
    for weight in ("-1", "nan", "inf"):
        with pytest.raises(ValueError, match="must be a positive number, or 0"):
            LogitEnsemble.open([f"{tmp_path / 'a.h5'}:{weight}"])
    with pytest.raises(ValueError, match="at least one needs a weight above 0"):
        LogitEnsemble.open([f"{tmp_path / 'a.h5'}:0"])
    with pytest.raises(ValueError, match=r"one of \['logits', 'probabilities'\]; found 'odds'"):
        LogitEnsemble.open([tmp_path / "a.h5"], mean="odds")
    with pytest.raises(ValueError, match="class 1 is"):  # also for a store that takes no part
        LogitEnsemble.open([tmp_path / "a.h5", f"{tmp_path / 'b.h5'}:0"])
    with pytest.raises(ValueError, match="at least one logit store"):
        LogitEnsemble.open([])
    with pytest.raises(ValueError, match="must be a number; found 'much'"):
        LogitEnsemble.open([f"{tmp_path / 'a.h5'}:much"])


def test_parse_weighted_path(tmp_path):
    assert parse_weighted_path("a.h5") == (Path("a.h5"), 1.0)
    assert parse_weighted_path("a.h5:0.25") == (Path("a.h5"), 0.25)
    (tmp_path / "odd:2").touch()
    assert parse_weighted_path(str(tmp_path / "odd:2")) == (tmp_path / "odd:2", 1.0)


def test_check_against_a_clip_store(tmp_path):
    digests = np.arange(64, dtype=np.uint8).reshape(4, 16) + 1
    ids = ["a", "b", "c", "d"]
    write(tmp_path / "a.h5", ids[:3], digests=digests[:3])
    ensemble = LogitEnsemble.open([tmp_path / "a.h5"])
    assert ensemble.check_against(Clips(ids, digests)).tolist() == [False, False, False, True]
    assert ensemble.check_against(Clips(ids, digests), rows=np.array([3, 0])).tolist() == [True, False]

    other = digests.copy()
    other[1, 0] = 200
    with pytest.raises(ValueError, match="the audio of clip 'b' in .* is not what the teacher heard"):
        ensemble.check_against(Clips(ids, other))
    assert not ensemble.check_against(Clips(ids, other), rows=np.array([0, 2])).any()
    other[1] = 0  # not known, as in a store of the foreign layout
    assert ensemble.check_against(Clips(ids, other)).tolist() == [False, False, False, True]
    with pytest.raises(ValueError, match="class lists differ"):
        ensemble.check_against(Clips(ids, digests, class_names=("dog", "rain", "x")))
