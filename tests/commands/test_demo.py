"""The demo at its smallest: every stage runs, and a second call finds everything done."""

import json
from pathlib import Path

import pytest

from kd.demo import main

SMALL = "--train-clips 36 --test-clips 24 --clip-seconds 0.5 --teacher mn01 --teacher-epochs 1 --student-epochs 1 --workers 0"


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "demo"
    assert main(["--out", str(out), *SMALL.split()]) == 0
    shown = capsys.readouterr().out
    for command in ("kd pack", "kd pretrain", "kd teach", "kd verify", "kd evaluate"):
        assert f"$ {command}" in shown
    rows = json.loads((out / "results.json").read_text())
    assert [row["model"] for row in rows] == [
        "teacher 1",
        "teacher 2",
        "ensemble of both",
        "student, labels only",
        "student, distilled",
    ]
    assert all(0 < row["mAP"] <= 1 for row in rows)
    assert rows[3]["mAP"] != rows[4]["mAP"]
    written = {path: path.stat().st_mtime_ns for path in out.glob("logits/*.h5")}
    assert len(written) == 2

    assert main(["--out", str(out), *SMALL.split()]) == 0
    assert json.loads((out / "results.json").read_text()) == rows
    assert {path: path.stat().st_mtime_ns for path in out.glob("logits/*.h5")} == written
