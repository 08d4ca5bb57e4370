"""`kd pretrain` under signals, changed commands, broken losses and a second run in its folder."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.system.command import STOPPED
from audio_datasets.system.files import read_json
from audio_datasets.system.locks import locked
from kd.data.windows import EvaluationWindows
from kd.objectives.distillation import DistillationObjective
from kd.pretrain import main
from kd.run_folder.metrics_log import read_metrics
from kd.training import batch_dump, non_finite
from kd.training.checkpoint import checkpoints

STEPS = 12


def arguments(store: Path, logits: Path, out: Path, *more: str) -> list[str]:
    """Two epochs of six steps of two clips, with validation, a moving average and a checkpoint after every step."""
    settings = "--student mn01 --n-mels 64 --hop-samples 640 --epochs 2 --batch-size 2 --clip-seconds 0.4 --workers 0"
    settings += " --log-every-steps 4 --checkpoint-every-steps 1 --ema-decay 0.9 --valid-folds 1"
    return ["--clips", str(store), "--logits", str(logits), "--out", str(out), *settings.split(), *more]


@pytest.fixture(scope="module")
def whole(tiny_store: Path, tiny_logits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed; tests only read it."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(arguments(tiny_store, tiny_logits, out)) == 0
    return out


def assert_same_result(one: Path, other: Path) -> None:
    """Weights, log, and everything in the newest checkpoint, byte for byte."""
    newest = checkpoints(one / "checkpoints")[-1].relative_to(one)
    files = ["student.safetensors", "metrics.jsonl", *(newest / item.name for item in (one / newest).iterdir())]
    for name in files:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


# --- Signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "kind", "call", "step", "workers"),
    [
        (signal.SIGTERM, DistillationObjective, 3, 3, 1),  # the data-loading worker gets it as well
        (signal.SIGUSR1, DistillationObjective, 6, 6, 0),  # an epoch's last step: its validation is still to come
        (signal.SIGTERM, EvaluationWindows, 2, 6, 0),  # in the first epoch's validation
        (signal.SIGTERM, DistillationObjective, 12, 12, 0),
    ],
)
def test_a_signal_finishes_the_step_saves_and_the_same_command_goes_on(
    whole: Path,
    tiny_store: Path,
    tiny_logits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    number: signal.Signals,
    kind: type,
    call: int,
    step: int,
    workers: int,
) -> None:
    out = tmp_path / "run"
    method = "__call__" if kind is DistillationObjective else "__getitem__"
    original, calls = getattr(kind, method), []

    def signalled(*inputs: object) -> object:
        calls.append(None)
        if len(calls) == call:
            for process in [*psutil.Process().children(), psutil.Process()]:
                subprocess.run(["kill", f"-{number:d}", str(process.pid)], check=True)
        return original(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(kind, method, signalled)
        assert main(arguments(tiny_store, tiny_logits, out, "--workers", str(workers))) == STOPPED
    assert f"received {number.name}; {out} is saved at step {step}" in capsys.readouterr().err
    assert checkpoints(out / "checkpoints")[-1].name == f"step-{step:08d}"
    assert not (out / "student.safetensors").exists()
    assert not (out / "run.lock").exists()

    assert main(arguments(tiny_store, tiny_logits, out)) == 0
    assert_same_result(whole, out)
    assert main(arguments(tiny_store, tiny_logits, out)) == 0
    assert "already finished" in capsys.readouterr().out


# --- Changed commands --------------------------------------------------------------------------------------------------


def test_another_command_in_the_same_folder(
    whole: Path, tiny_store: Path, tiny_logits: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    assert main(arguments(tiny_store, tiny_logits, out, "--epochs", "3")) == 2
    assert "loop.epochs: 2 -> 3" in capsys.readouterr().err
    assert main(arguments(tiny_store, tiny_logits, out, "--epochs", "3", "--accept-changes")) == 0
    shown = capsys.readouterr().out
    assert "continues with changes: loop.epochs: 2 -> 3" in shown
    assert "continuing the run" in shown
    card = read_json(out / "student.json")
    assert card["provenance"]["steps"] == 18
    assert card["provenance"]["accepted_changes"] == [{"at": "step-00000012", "changes": ["loop.epochs: 2 -> 3"]}]
    # The 12 steps before were not done again.
    assert (out / "metrics.jsonl").read_text().startswith((whole / "metrics.jsonl").read_text())

    assert main(arguments(tiny_store, tiny_logits, out, "--restart")) == 0
    assert_same_result(whole, out)


def test_data_may_move_but_not_change(
    whole: Path,
    tiny_store: Path,
    tiny_logits: Path,
    make_tiny_logits: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for path in tiny_store.parent.glob("tiny*"):
        shutil.copy(path, tmp_path)
    assert main(arguments(tmp_path / tiny_store.name, tmp_path / tiny_logits.name, out)) == 0
    assert "already finished" in capsys.readouterr().out
    other = make_tiny_logits("others.h5", tiny_store, scale=2.0)
    assert main(arguments(tiny_store, other, out)) == 2
    assert "inputs.teachers" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patched:  # another label: the audio, and the store's fingerprint, are the same
        targets = ClipStore.targets
        patched.setattr(ClipStore, "targets", lambda store, rows: np.roll(targets(store, rows), 1, axis=1))
        assert main(arguments(tiny_store, tiny_logits, out)) == 2
    assert "inputs.labels" in capsys.readouterr().err
    config = json.loads((out / "config.json").read_text())
    assert len(config["inputs"].pop("labels")) == 32
    (out / "config.json").write_text(json.dumps(config))  # as an older version wrote it
    assert main(arguments(tiny_store, tiny_logits, out)) == 0
    assert "already finished" in capsys.readouterr().out


def test_two_runs_do_not_write_into_one_folder(
    tiny_store: Path, tiny_logits: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    with locked(out / "run.lock", str(out)):
        assert main(arguments(tiny_store, tiny_logits, out)) == 2
    assert f"{out} is in use by process {os.getpid()} on " in capsys.readouterr().err
    assert not (out / "config.json").exists()


# --- Losses that are not finite ----------------------------------------------------------------------------------------


@pytest.fixture
def break_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The waveforms of the given calls of the objective, counted from 1, hold a nan."""
    original = DistillationObjective.forward

    def break_(*which: int) -> None:
        calls = []

        def broken(self: DistillationObjective, student: torch.nn.Module, batch: dict) -> dict:
            calls.append(None)
            if len(calls) in which:
                batch["waveform"][0, 100] = torch.nan
            return original(self, student, batch)

        monkeypatch.setattr(DistillationObjective, "forward", broken)

    return break_


def test_a_loss_that_is_not_finite_stops_the_run_with_a_dump_that_shows_it_again(
    tiny_store: Path,
    tiny_logits: Path,
    tmp_path: Path,
    break_steps: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    out = tmp_path / "run"
    break_steps(4)
    assert main(arguments(tiny_store, tiny_logits, out)) == 2
    message = capsys.readouterr().err
    assert "the loss is not finite in epoch 0, step 3. Clips of the batch: clip-00" in message
    dump = out / "non_finite" / "step-00000003-process-0"
    assert f"python -m kd.training.non_finite {dump}" in message
    assert checkpoints(out / "checkpoints")[-1].name == "step-00000003"
    monkeypatch.undo()

    findings = batch_dump.run_dump(dump)
    assert findings.first == "input waveform"
    assert not torch.isfinite(torch.tensor(findings.losses["loss"]))
    assert non_finite.main([str(dump)]) == 0
    assert "first that is not finite: input waveform" in capsys.readouterr().out
    # Without the fault the run goes on, as if nothing had been.
    assert main(arguments(tiny_store, tiny_logits, out)) == 0


def test_a_dump_is_the_step_again(
    tiny_store: Path, tiny_logits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that is declared not finite after it was computed: looking into the dump gives exactly that loss."""
    original, losses = DistillationObjective.forward, []

    def declared(self: DistillationObjective, student: torch.nn.Module, batch: dict) -> dict:
        result = original(self, student, batch)
        losses.append(float(result["loss"].detach()))
        return {**result, "loss": result["loss"] * (torch.nan if len(losses) == 4 else 1.0)}

    with monkeypatch.context() as patch:
        patch.setattr(DistillationObjective, "forward", declared)
        assert main(arguments(tiny_store, tiny_logits, tmp_path / "run")) == 2
    findings = batch_dump.run_dump(tmp_path / "run" / "non_finite" / "step-00000003-process-0")
    assert findings == batch_dump.Findings({**findings.losses, "loss": losses[3]}, None)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_may_be_left_out_up_to_a_limit(
    tiny_store: Path,
    tiny_logits: Path,
    tmp_path: Path,
    break_steps: Callable[..., None],
    accumulation: int,
    capsys: pytest.CaptureFixture,
) -> None:
    options = ["--skip-non-finite", "2", "--gradient-accumulation-steps", str(accumulation), "--keep-checkpoints", "20"]
    out = tmp_path / "run"
    break_steps(3, 7)
    assert main(arguments(tiny_store, tiny_logits, out, *options)) == 0
    steps = [(call - 1) // accumulation + 1 for call in (3, 7)]
    skipped = read_metrics(out / "metrics.jsonl", "skipped")
    assert [(record["step"] + 1, record["skipped_steps"]) for record in skipped] == [(steps[0], 1.0), (steps[1], 2.0)]
    assert "clip-00" in skipped[0]["clips"][0]
    assert read_json(out / "student.json")["provenance"]["skipped_steps"] == 2
    # A step that is left out changes no weight and leaves no trace in the running statistics.
    before, after = (
        load_file(out / "checkpoints" / f"step-{step:08d}" / "student.safetensors") for step in (steps[0] - 1, steps[0])
    )
    parameters = [name for name in before if "running" not in name and "num_batches" not in name]
    assert all(torch.equal(before[name], after[name]) for name in parameters)
    assert all(torch.isfinite(value).all() for value in load_file(out / "student.safetensors").values())

    break_steps(2, 4, 6)
    again = tmp_path / "again"
    assert main(arguments(tiny_store, tiny_logits, again, *options)) == 2
    assert "(2 such steps were skipped before)" in capsys.readouterr().err
    assert "non_finite" in {path.name for path in again.iterdir()}
