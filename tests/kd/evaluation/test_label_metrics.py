"""Accuracy, log loss and mAP by class, device and group."""

import numpy as np
import pytest

from kd.evaluation.label_metrics import device_metrics, single_label_metrics

NAMES = ("a", "b", "c")


def test_accuracy_and_log_loss_by_class_and_device() -> None:
    classes = np.array([0, 0, 0, 1])
    probabilities = np.array([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1], [0.1, 0.8, 0.1]])
    found = single_label_metrics(classes, np.log(probabilities), NAMES)
    assert found["accuracy"] == 0.75
    assert found["macro_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    per_clip = -np.log([0.7, 0.2, 0.5, 0.8])
    assert found["log_loss"] == pytest.approx(per_clip.mean())
    assert found["macro_log_loss"] == pytest.approx((per_clip[:3].mean() + per_clip[3]) / 2)
    assert found["absent"] == ["c"]
    tables = device_metrics(["a", "s4", "a", "s4"], ["a"], classes, np.log(probabilities), NAMES)
    assert tables["devices"]["a"]["accuracy"] == 1.0
    assert tables["unseen_devices"] == {key: tables["devices"]["s4"][key] for key in tables["unseen_devices"]}
    assert tables["unseen_devices"]["accuracy"] == 0.5
