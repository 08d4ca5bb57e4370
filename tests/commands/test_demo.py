"""The demo at its smallest: every stage runs, and a second call finds everything done."""

import json
from pathlib import Path

import pytest

from kd.demo import main

SMALL = (
    "--scenes 36 --recordings 64 --test-recordings 24 --labels-per-class 1 --clip-seconds 0.5 --teacher mn01 --teacher-epochs 1 "
    "--steps 2 --workers 0"
)


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "demo"
    assert main(["--out", str(out), *SMALL.split()]) == 0
    shown = capsys.readouterr().out
    for command in ("pack", "pretrain", "distill", "finetune", "teach", "tag"):
        assert f"$ kd {command}" in shown
    results = json.loads((out / "distill" / "results.json").read_text())
    assert set(results) == {"teacher", "labels_alone", "distilled", "gain"}
    assert results["gain"]["mean"] == results["distilled"]["mean"] - results["labels_alone"]["mean"]
    assert f"{results['distilled']['mean']:.1%}" in shown.splitlines()[-3]
    assert (out / "distill" / "distilled" / "report.html").exists()
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.h5")}
    assert len(written) >= 3

    assert main(["--out", str(out), *SMALL.split()]) == 0
    assert json.loads((out / "distill" / "results.json").read_text()) == results
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.h5")} == written
