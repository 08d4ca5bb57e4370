"""A fine-tuning run that stops at a loss which is not finite, and `python -m kd.training.non_finite` on what it leaves."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from audio_datasets.tasks.catalog import get_task
from audio_datasets.tasks.task import read_task
from kd import finetune
from kd.objectives.distillation import DistillationObjective
from kd.training import non_finite
from kd.training.batch_dump import run_dump
from students import create_student
from students.card import save_student
from students.frontend import LogMelConfig
from teacher_logits.store import write_logit_store

COMMAND = [sys.executable, "-m", "kd.training.non_finite"]
SHORT = "--student mn01 --epochs 2 --batch-size 2 --workers 0 --clip-seconds 0.4 --eval-batch-size 4 --no-report"
BROKEN_BATCH = 3

CASES: dict[str, tuple[str, str]] = {
    "bce": ("fsd50k", "--time-masks 1"),
    "bce of known labels, weighted": ("openmic", "--class-weights balanced --waveform-mixup 0 --mixup-alpha 0"),
    "cross entropy, weighted and smoothed": (
        "esc50",
        "--fold 2 --class-weights balanced --label-smoothing 0.2 --freq-mixstyle 0.7 --ema-decay 0.5",
    ),
    "cross entropy with teachers": (
        "folder",
        "--logits LOGITS --label-weight 0.3 --teacher-temperature 2 --label-smoothing 0.1 --waveform-mixup 1",
    ),
    "bce for exclusive classes with mixed logits": (
        "folder",
        "--logits LOGITS --loss bce --mixup-of-teacher logits --mixup-alpha 1",
    ),
    "a frozen backbone, from trained weights": ("folder", "--init TRAINED --freeze backbone --layer-decay 0.5"),
}


@pytest.fixture
def declare_broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, float]]]:
    """Multiplies the loss of one batch by nan after it was computed; returns what the losses were, batch by batch."""

    def declare() -> list[dict[str, float]]:
        original, seen = DistillationObjective.forward, []

        def declared(self: DistillationObjective, student: object, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            losses = original(self, student, batch)
            seen.append({name: value.item() for name, value in losses.items()})
            return {**losses, "loss": losses["loss"] * (torch.nan if len(seen) == BROKEN_BATCH else 1.0)}

        monkeypatch.setattr(DistillationObjective, "forward", declared)
        return seen

    return declare


def write_logits(path: Path, data: Path) -> Path:
    clips, _ = read_task(get_task("folder"), data)
    rng = np.random.default_rng(0)
    write_logit_store(
        path,
        clip_ids=clips.clip_ids,
        audio_digests=np.zeros((len(clips), 16), dtype=np.uint8),
        logit_blocks=[rng.standard_normal((len(clips), len(clips.class_names))).astype(np.float16)],
        class_names=clips.class_names,
        teacher={"name": "own", "fingerprint": "0" * 32, "link": "sigmoid"},
        clip_store_fingerprint="0" * 32,
    )
    return path


def write_trained(folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        student = create_student("mn01", 4)
    save_student(folder, student, ("p", "q", "r", "s"), LogMelConfig(fmax_hz=14000.0))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_dump_run_again_gives_the_loss_that_the_run_had(
    case: str,
    make_task_folder: Callable[..., Path],
    tmp_path: Path,
    declare_broken: Callable[[], list[dict[str, float]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    task, options = CASES[case]
    data, out = make_task_folder(task, **({"per_fold": 4} if task == "esc50" else {})), tmp_path / "run"
    given = options.split()
    if "LOGITS" in given:
        given[given.index("LOGITS")] = str(write_logits(tmp_path / "logits.h5", data))
    if "TRAINED" in given:
        given[given.index("TRAINED")] = str(write_trained(tmp_path / "trained"))
    losses = declare_broken()
    assert finetune.main(["--task", task, "--data", str(data), "--out", str(out), *SHORT.split(), *given]) == 2
    message = capsys.readouterr().err
    monkeypatch.undo()
    dump = Path(re.search(r"python -m kd\.training\.non_finite (\S+)", message)[1])
    assert dump.is_relative_to(out)
    assert "Clips of the batch: " in message

    findings = run_dump(dump)
    assert findings.losses == losses[BROKEN_BATCH - 1]
    assert findings.first is None
    assert len({found["loss"] for found in losses}) == BROKEN_BATCH  # each batch has a loss of its own
    assert non_finite.main([str(dump)]) == 0
    shown = capsys.readouterr().out
    assert f"loss: {losses[-1]['loss']} (in the run: nan)" in shown
    assert "nothing: this time the step was finite" in shown


def test_the_script_names_the_input_that_is_not_finite(
    make_task_folder: Callable[..., Path], tmp_path: Path, environment: dict[str, str], capsys: pytest.CaptureFixture
) -> None:
    """As a process of its own, of a batch that really was broken."""
    data, out = make_task_folder("folder"), tmp_path / "run"
    original, calls = DistillationObjective.forward, []

    def broken(self: DistillationObjective, student: object, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        calls.append(None)
        if len(calls) == BROKEN_BATCH:
            batch["waveform"][1, 100] = torch.inf
        return original(self, student, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillationObjective, "forward", broken)
        assert finetune.main(["--task", "folder", "--data", str(data), "--out", str(out), *SHORT.split()]) == 2
    dump = out / "non_finite" / f"step-{BROKEN_BATCH - 1:08d}-process-0"
    assert str(dump) in capsys.readouterr().err
    done = subprocess.run([*COMMAND, str(dump)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "first that is not finite: input waveform" in done.stdout
    done = subprocess.run([*COMMAND, str(out)], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    # Without the fault the same command goes on to its end.
    assert finetune.main(["--task", "folder", "--data", str(data), "--out", str(out), *SHORT.split()]) == 0


ONLY_WITH_LOGITS = {
    "--label-weight": "0.5",
    "--teacher-temperature": "2",
    "--mixup-of-teacher": "logits",
    "--ensemble": "probabilities",
    "--missing-logits": "leave-out",
}


@pytest.mark.parametrize("spelling", ["{option} {value}", "{option}={value}"])
@pytest.mark.parametrize("option", ONLY_WITH_LOGITS)
def test_settings_of_teachers_are_refused_without_teachers(
    option: str, spelling: str, make_task_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data, out = make_task_folder("folder"), tmp_path / "run"
    given = spelling.format(option=option, value=ONLY_WITH_LOGITS[option]).split()
    with pytest.raises(SystemExit) as stopped:
        sys.exit(finetune.main(["--task", "folder", "--data", str(data), "--out", str(out), *SHORT.split(), *given]))
    assert stopped.value.code == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert option in shown
    assert "no effect without --logits" in shown
    assert not out.exists()
