"""`kd compact-logits`, and `kd teach --keep`: the same store by two ways, and what it loses."""

from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit

from audio_datasets.stores.clip_store import ClipStore
from teacher_logits.compact import main, storage_error
from teacher_logits.precompute import TeachConfig, teach
from teacher_logits.store import LogitStore


@pytest.fixture
def dense(tiny_logits: Path) -> LogitStore:
    return LogitStore.open(tiny_logits)


def test_a_store_is_made_compact_and_the_loss_is_told(dense, tmp_path, capsys):
    out = tmp_path / "top2.h5"
    command = ["--logits", str(dense.path), "--out", str(out), "--keep", "2"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    stored = LogitStore.open(out)
    assert (stored.keep, stored.teacher, stored.clip_ids) == (2, dense.teacher, dense.clip_ids)
    assert stored.clip_store_fingerprint == dense.clip_store_fingerprint

    p, q = (expit(store.read(dense.clip_ids).astype(np.float64)) for store in (dense, stored))
    error = storage_error(dense, stored)
    assert error.probability == pytest.approx(abs(p - q).mean())
    divergence = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert error.cross_entropy == pytest.approx(divergence.mean(), rel=1e-6)
    assert error.entropy == pytest.approx((-p * np.log(p) - (1 - p) * np.log(1 - p)).mean(), rel=1e-6)
    assert f"mean error of the stored probabilities: {error.probability:.2e};" in printed

    assert main(command) == 2
    assert "--replace" in capsys.readouterr().err
    before = out.read_bytes()
    assert main([*command, "--replace"]) == 0
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("keep", "compact_first", "message"),
    [(3, False, "must be from 1 to 2 of 3"), (1, True, "already keeps only 2 logits of each clip")],
)
def test_what_cannot_be_made_compact(dense, tmp_path, capsys, keep, compact_first, message):
    source = dense.path
    if compact_first:
        source = tmp_path / "top2.h5"
        main(["--logits", str(dense.path), "--out", str(source), "--keep", "2"])
    assert main(["--logits", str(source), "--out", str(tmp_path / "out.h5"), "--keep", str(keep)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.h5").exists()


def test_a_store_is_not_replaced_by_its_own_compact_form(dense, tmp_path, capsys):
    before = dense.path.read_bytes()
    assert main(["--logits", str(dense.path), "--out", str(dense.path), "--keep", "2", "--replace"]) == 2
    assert dense.path.read_bytes() == before


def test_a_teacher_can_keep_the_largest_only(clips: ClipStore, own_teachers, tmp_path):
    spec = (f"{own_teachers}:good",)
    (dense,) = teach(TeachConfig(clips.path, spec, tmp_path / "dense", workers=0))
    (kept,) = teach(TeachConfig(clips.path, spec, tmp_path / "kept", workers=0, keep=1, shard_clips=5))
    main(["--logits", str(dense), "--out", str(tmp_path / "made.h5"), "--keep", "1"])
    assert kept.read_bytes() == (tmp_path / "made.h5").read_bytes()
    teach(TeachConfig(clips.path, spec, tmp_path / "kept", workers=0, keep=1))  # complete: nothing to do
    with pytest.raises(ValueError, match="made with another teacher or other settings"):
        teach(TeachConfig(clips.path, spec, tmp_path / "kept", workers=0, keep=2))
    with pytest.raises(ValueError, match="from 1 to 2 of 3"):
        teach(TeachConfig(clips.path, spec, tmp_path / "other", workers=0, keep=3))
