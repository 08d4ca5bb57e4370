"""A short run of tests/robustness/disk_faults.py: single disk operations fail, and the same command ends as it should have."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "robustness"))
from disk_faults import FAULTS, FaultyDisk, Findings, Sweep, compiler


@pytest.mark.skipif(compiler() is None, reason="needs Linux and a C compiler (cc)")
def test_a_failing_disk_is_a_message_and_loses_nothing(tmp_path: Path) -> None:
    findings = Findings()
    with FaultyDisk(tmp_path).running() as disk:
        for stage in ("pack", "compact"):
            sweep = Sweep(disk, stage)
            for fault in FAULTS:
                sweep.run(fault, 2, findings)
    assert findings.failures == []
    assert findings.outcomes["killed"] == 4
    assert findings.outcomes["a message"] >= 8
