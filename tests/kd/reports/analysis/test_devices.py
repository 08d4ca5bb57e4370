"""Metrics of each device, on predictions small enough to check by hand."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import log_loss

from kd.reports.analysis.devices import device_rows
from kd.reports.run_reader import Part, Predictions

MakePart = Callable[..., tuple[Part, Predictions]]


def test_devices_seen_and_unseen_apart(part: MakePart) -> None:
    targets = np.eye(3)[[0, 1, 2, 0, 1, 2]]
    logits = 5 * np.eye(3)[[0, 1, 2, 0, 0, 0]]
    devices = {
        "devices": np.array(["b", "a", "a", "b", "s5", "s5"]),
        "device_seen": np.array([1, 1, 1, 1, 0, 0], dtype=bool),
    }
    rows = device_rows([part("", logits, targets, **devices)], one_label=True)
    assert [(row.name, row.seen, row.clips) for row in rows] == [
        *(("a", True, 2), ("b", True, 2), ("s5", False, 2)),
        *(("seen devices", True, 4), ("unseen devices", False, 2), ("all devices", None, 6)),
    ]
    assert [row.scores["accuracy"] for row in rows] == [(1.0,), (1.0,), (0.0,), (1.0,), (0.0,), (pytest.approx(4 / 6),)]
    assert rows[-1].scores["macro_accuracy"] == (pytest.approx((1 + 0.5 + 0.5) / 3),)
    assert rows[-1].scores["log_loss"] == (pytest.approx(log_loss(targets, softmax(logits, axis=1))),)
    assert device_rows([part("", logits, targets)], one_label=True) == []
    several = device_rows([part("", logits, targets, **devices)], one_label=False)
    assert [set(row.scores) for row in several] == [{"mAP"}] * 6
