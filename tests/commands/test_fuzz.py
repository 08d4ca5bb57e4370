"""A short run of tests/robustness/fuzz.py: damaged and generated files through every reader."""

import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).parents[1] / "robustness" / "fuzz.py"


def test_no_damaged_file_ends_in_a_traceback_a_crash_or_a_wrong_result(environment: dict[str, str]) -> None:
    run = subprocess.run(
        [sys.executable, str(FUZZ), "--inputs", "250", "--seed", "7", "--seconds", "120"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    tried, refused, accepted, failed = (int(cell) for cell in run.stdout.splitlines()[-1].split("|")[2:6])
    assert tried == refused + accepted >= 240
    assert failed == 0
    assert min(refused, accepted) > 30
