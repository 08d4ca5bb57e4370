"""Settings from outside a command: a launcher's, the working folder's, the umask, the file system's."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from audio_datasets.system import files
from kd.cli import main
from kd.reports.figures import Lines, learning_curves
from students.weights import read_state_dict


@pytest.fixture
def commands(tiny_store: Path, run_folder: Path, tmp_path: Path, make_task_folder) -> dict[str, list[str]]:
    """Commands that compute with Accelerate, each a few steps long."""
    small = ["--batch-size", "4", "--epochs", "1", "--clip-seconds", "0.5", "--workers", "0", "--n-mels", "16"]
    small += ["--fmin-jitter-hz", "0", "--fmax-jitter-hz", "0", "--student", "mn01"]
    pretrain = ["pretrain", "--clips", str(tiny_store), "--label-weight", "1", "--out", str(tmp_path / "pretrained")]
    finetune = ["finetune", "--task", "folder", "--data", str(make_task_folder("folder"))]
    teach = ["teach", "--clips", str(tiny_store), "--teacher", str(run_folder), "--workers", "0"]
    sounds = finetune[4]
    return {
        "pack": ["pack", sounds, "--out", str(tmp_path / "packed.h5"), "--workers", "1"],
        "pretrain": [*pretrain, *small],
        "finetune": [*finetune, "--out", str(tmp_path / "finetuned"), *small],
        "teach": [*teach, "--out", str(tmp_path / "taught")],
    }


@pytest.mark.parametrize("command", ["pretrain", "finetune", "teach"])
def test_a_compiler_of_the_launcher(command: str, commands, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    assert main(commands[command]) == 2
    assert "accelerate launch --dynamo_backend eager" in capsys.readouterr().err
    assert not (Path(commands[command][commands[command].index("--out") + 1]) / "student.safetensors").exists()


@pytest.mark.parametrize("command", ["pretrain", "finetune", "teach"])
def test_half_precision_on_a_cpu(command: str, commands, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert main([*commands[command], "--mixed-precision", "fp16"]) == 2
    assert "--mixed-precision fp16 needs a GPU; on a CPU choose bf16 or no" in capsys.readouterr().err


def test_permissions_and_the_precision_of_the_launcher(
    commands, monkeypatch: pytest.MonkeyPatch, capsys, tmp_path
) -> None:
    """What is written follows the umask, and a launcher's precision is said to have no effect."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    before = os.umask(0o027)
    try:
        for name in ("pack", "pretrain", "teach"):
            assert main(commands[name]) == 0
    finally:
        os.umask(before)
    assert "the launcher's mixed precision bf16 has no effect" in capsys.readouterr().err
    written = [path for name in ("pretrained", "taught") for path in (tmp_path / name).rglob("*")]
    written += list(tmp_path.glob("packed*"))
    assert any(path.name == "student.safetensors" for path in written)
    assert any(path.suffix == ".pt" for path in written)
    for path in written:
        wanted = 0o750 if path.is_dir() else 0o640
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path
    names = read_state_dict(tmp_path / "pretrained" / "student.safetensors")
    assert not any(name.startswith("_orig_mod") for name in names)


@pytest.mark.parametrize("command", ["pack", "pretrain", "teach"])
def test_a_file_system_that_does_not_flush_folders(
    command: str, commands, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    flush = os.fsync

    def only_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    monkeypatch.setattr(files, "_noted_unflushed", False)
    assert main(commands[command]) == 0
    assert capsys.readouterr().err.count("cannot flush folders (Invalid argument)") == 1


CHART = """
import sys
from pathlib import Path
import numpy as np
from kd.reports.figures import Lines, learning_curves
Path(sys.argv[1]).write_text(learning_curves([Lines("loss", {"a": [(np.arange(3), np.array([0.1, 0.2, 0.5]))]})]))
"""


def test_a_matplotlibrc(tmp_path: Path, environment: dict[str, str]) -> None:
    """The user's settings change no chart, and a ``matplotlibrc`` in the working folder, here a pipe, is not even opened."""
    panels = [Lines("loss", {"a": [(np.arange(3), np.array([0.1, 0.2, 0.5]))]})]
    plain = learning_curves(panels)
    with matplotlib.rc_context({"font.family": "monospace", "lines.linewidth": 9, "axes.labelsize": 40}):
        assert learning_curves(panels) == plain
    os.mkfifo(tmp_path / "matplotlibrc")
    done = subprocess.run(
        [sys.executable, "-c", CHART, str(tmp_path / "chart.svg")],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "chart.svg").read_text() == plain
