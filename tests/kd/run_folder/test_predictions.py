"""The file of predictions: what is written is read again, and what is damaged is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd.run_folder.predictions import Predictions, write_predictions

NAMES = ("hiss", "hum, low", "Ö")
IDS = ["a", "folder/b 1.wav", "ü", "d"]
TARGETS = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1]], dtype=np.float32)
MASK = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1], [0, 1, 1]], dtype=bool)
LOGITS = np.array([[0.1, -2, 3], [4, 5, -6], [7, 8, 9], [-1, -2, 1e-30]], dtype=np.float64)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "predictions.npz"
    columns = {"source": [f"/data/{name}" for name in IDS], "device": list("aabs"), "group": list("ggh ")}
    columns["device_seen"] = np.array([True, True, True, False])
    write_predictions(path, clip_ids=IDS, logits=LOGITS, targets=TARGETS, mask=MASK, class_names=NAMES, columns=columns)
    assert [item.name for item in tmp_path.iterdir()] == ["predictions.npz"]
    found = Predictions.read(path, NAMES)
    assert found.clip_ids.tolist() == IDS
    assert found.sources.tolist() == columns["source"]
    assert found.devices.tolist() == columns["device"]
    np.testing.assert_array_equal(found.device_seen, columns["device_seen"])
    np.testing.assert_array_equal(found.logits, LOGITS.astype(np.float32))
    np.testing.assert_array_equal(found.targets, TARGETS == 1)
    np.testing.assert_array_equal(found.known, MASK)
    assert not found.one_label
    assert Predictions.read(path, None).clip_ids.tolist() == IDS
    with np.load(path, allow_pickle=False) as arrays:  # nothing in it is pickled
        assert set(arrays) == {"clip_ids", "logits", "targets", "mask", "class_names", *columns}


def test_columns_that_a_task_does_not_have_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "predictions.npz"
    write_predictions(path, clip_ids=IDS, logits=LOGITS, targets=TARGETS, mask=MASK, class_names=NAMES, columns={})
    found = Predictions.read(path, NAMES)
    assert (found.devices, found.device_seen, found.sources) == (None, None, None)


def test_one_label_needs_exactly_one_class_and_everything_known() -> None:
    def predictions(targets: np.ndarray, known: np.ndarray) -> Predictions:
        return Predictions(np.array(IDS), LOGITS.astype(np.float32), targets, known)

    single = np.eye(3, dtype=bool)[[0, 1, 2, 0]]
    everything = np.ones((4, 3), dtype=bool)
    assert predictions(single, everything).one_label
    assert not predictions(single, MASK).one_label
    assert not predictions(TARGETS > 0, everything).one_label


def whole() -> dict[str, Any]:
    return {
        "clip_ids": np.array(IDS),
        "logits": LOGITS.astype(np.float32),
        "targets": TARGETS,
        "mask": MASK,
        "class_names": np.array(NAMES),
    }


def test_the_oldest_files_without_mask_and_class_names_are_read(tmp_path: Path) -> None:
    arrays = {name: values for name, values in whole().items() if name in ("clip_ids", "logits", "targets")}
    np.savez(tmp_path / "old.npz", **arrays)
    found = Predictions.read(tmp_path / "old.npz", NAMES)
    assert found.known.all()
    with pytest.raises(ValueError, match="do not fit 0 class names"):
        Predictions.read(tmp_path / "old.npz", None)


DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "no logits": ({"logits": None}, "has no 'logits'"),
    "another class list": ({"class_names": np.array(["hiss", "hum", "Ö"])}, "another class list than the run"),
    "fewer classes": ({"class_names": np.array(["hiss"]), "logits": LOGITS[:, :1]}, "another class list"),
    "logits of another shape": ({"logits": LOGITS[:, :2]}, r"logits \(4, 2\) do not fit 3 class names"),
    "targets of another shape": ({"targets": TARGETS[:3]}, r"must be \(clips, classes\)"),
    "probabilities as targets": ({"targets": TARGETS * 0.5}, "targets must be 0 or 1"),
    "a clip twice": ({"clip_ids": np.array(["a", "b", "c", "a"])}, "occurs more than once"),
    "an id too few": ({"clip_ids": np.array(["a", "b", "c"])}, "one value for each of the 4 clips"),
    "not finite": ({"logits": np.where(LOGITS > 8, np.nan, LOGITS)}, "1 clips have logits that are not finite"),
    "words as logits": ({"logits": np.array([["x"] * 3] * 4)}, "logits has the wrong type"),
    "numbers as ids": ({"clip_ids": np.arange(4)}, "clip_ids has the wrong type"),
    "objects": ({"clip_ids": np.array(IDS, dtype=object)}, "npz"),
    "one number": ({"mask": np.array(1.0)}, "mask has the wrong type"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_files_that_are_damaged_are_refused_with_their_path(case: str, tmp_path: Path) -> None:
    changes, message = DAMAGE[case]
    path = tmp_path / "predictions.npz"
    np.savez(path, **{name: values for name, values in {**whole(), **changes}.items() if values is not None})
    with pytest.raises(ValueError, match=message) as refused:
        Predictions.read(path, NAMES)
    assert str(path) in str(refused.value)


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "predictions.npz"
    np.savez(path, **whole())
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(ValueError, match=r"predictions\.npz"):
        Predictions.read(path, NAMES)
