"""The `kd` command and the scripts behind it."""

import subprocess
import sys
from pathlib import Path

import pytest

from kd.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"kd {command}" in capsys.readouterr().out


def test_an_unknown_command_lists_the_choices(capsys: pytest.CaptureFixture) -> None:
    assert main(["tech"]) == 2
    shown = capsys.readouterr().err
    assert "no such command: tech" in shown
    assert all(name in shown for name in COMMANDS)
    assert main([]) == 2
    assert main(["--help"]) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_flag_is_exit_code_2(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--no-such-flag"])
    assert stopped.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "script",
    [
        "teacher_logits/precompute.py",
        "teacher_logits/verify.py",
        "kd/pretrain.py",
        "kd/finetune.py",
        "kd/evaluate.py",
        "kd/report.py",
        "kd/profile_students.py",
        "kd/inspect_student.py",
    ],
)
def test_scripts_run_by_path(script: str, environment: dict[str, str], tmp_path: Path) -> None:
    """From another folder, as `python path/to/script.py`: what the interpreter puts first on the path must not matter."""
    done = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--" in done.stdout
