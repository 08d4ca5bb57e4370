"""`kd finetune` on small data sets in their official layouts: results, folds, resuming, options and wrong input."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from sklearn import linear_model

from audio_datasets.audio.bad_clips import ClipList
from audio_datasets.pack import main as pack
from audio_datasets.system.command import STOPPED
from audio_datasets.system.locks import locked
from audio_datasets.tasks.catalog import get_task
from audio_datasets.tasks.task import TaskClips, read_task
from kd.data.splits import partitions
from kd.data.windows import EvaluationWindows
from kd.finetune import configure, main
from kd.objectives.distillation import DistillationObjective
from kd.run_folder.metrics_log import read_metrics
from kd.training.checkpoint import checkpoints
from students import create_student
from students.card import load_student, save_student
from students.families.dymn import DyMN
from students.frontend import LogMel, LogMelConfig
from teacher_logits.precompute import main as teach
from teacher_logits.store import LogitStore, write_logit_store

FINETUNE = str(Path(__file__).parents[2] / "kd" / "finetune.py")

# Two steps for each run: one epoch for one step each.
SHORT = ["--student", "mn01", "--epochs", "2", "--workers", "0", "--clip-seconds", "0.4", "--eval-batch-size", "4"]
SHORT.append("--no-report")


def arguments(task: str, data: Path, out: Path, *more: str) -> list[str]:
    return ["--task", task, "--data", str(data), "--out", str(out), *SHORT, *more]


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


HEADLINES = {
    "audioset": "mAP",
    "dcase20": "macro_accuracy",
    "esc50": "accuracy",
    "folder": "accuracy",
    "fsd50k": "mAP",
    "manifest": "mAP",
    "openmic": "mAP",
    "panns": "mAP",
}


@pytest.mark.parametrize("task", HEADLINES)
def test_every_task_trains_two_steps_and_evaluates(
    task: str, make_task_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data, out = make_task_folder(task), tmp_path / "run"
    assert main(arguments(task, data, out, *(["--fold", "2"] if task == "esc50" else []))) == 0
    found = results(out)
    assert found["headline"]["metric"] == HEADLINES[task]
    assert 0.0 <= found["headline"]["mean"] <= 1.0
    (run,) = found["runs"]
    folder = out / run["folder"]
    assert len(read_metrics(folder / "metrics.jsonl", "train")) == 2
    with np.load(folder / "predictions.npz", allow_pickle=False) as arrays:
        predictions = dict(arrays)
    assert predictions["logits"].shape == predictions["targets"].shape == predictions["mask"].shape
    assert np.isfinite(predictions["logits"]).all()
    student = load_student(folder)
    card = student.card
    assert list(card.class_names) == predictions["class_names"].tolist() == found["class_names"]
    assert student.config.name == "mn01"
    shown = capsys.readouterr().out
    if task == "fsd50k":  # "Rain" occurs only in the evaluation clips
        assert "1 classes have no training clips: 'Rain'" in shown
        assert len(predictions["clip_ids"]) == 3  # that of 30 s counts once
        assert (folder / "validation_predictions.npz").exists()
    if task == "openmic":
        assert not predictions["mask"].all()
    if task == "dcase20":
        assert set(run["metrics"]["devices"]) == {"a", "s1", "s4"}
        assert not run["metrics"]["devices"]["s4"]["seen"]
        np.testing.assert_array_equal(predictions["device_seen"], predictions["device"] != "s4")
        assert run["metrics"]["unseen_devices"]["clips"] == 2
    if task == "folder":
        assert "single-label" in shown
        assert run["folder"] == "."


def test_a_student_from_scratch_gets_the_batch_norm_statistics_of_its_training_clips(
    make_task_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data, out = make_task_folder("esc50"), tmp_path / "run"
    options = ["--fold", "2", "--valid-share", "0.34", "--early-stopping", "accuracy", "--gain-db", "0"]
    assert main(arguments("esc50", data, out, *options)) == 0
    said = capsys.readouterr().out
    clips, _ = read_task(get_task("esc50"), data)
    (part,), _ = partitions(clips, folds=(2,), valid_share=0.34)
    assert f"batch-norm statistics recomputed from {len(part.train)} training clips" in said
    student = load_student(out / "fold2")
    norms = [layer for layer in student.eval().modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    saved = [torch.cat([layer.running_mean, layer.running_var]).clone() for layer in norms]
    for layer in norms:
        layer.train().momentum = 1.0  # PyTorch then keeps the statistics of the last batch
    heard = [clips.waveform(int(row), 32000, 0.0, 0.4) for row in part.train]
    with torch.no_grad():
        student(LogMel(student.card.frontend)(torch.stack([torch.from_numpy(waveform) for waveform in heard])))
    for layer, values in zip(norms[:1], saved[:1], strict=True):  # which part of a clip is heard is drawn
        torch.testing.assert_close(torch.cat([layer.running_mean, layer.running_var]), values, rtol=0.1, atol=0.1)
    assert float(saved[0].sub(torch.tensor([0.0] * 8 + [1.0] * 8)).abs().max()) > 0.5
    assert main(arguments("esc50", data, tmp_path / "kept", "--fold", "2", "--batch-norm-clips", "0")) == 0
    assert "2 steps are too few for batch norms" in capsys.readouterr().out


OWN_TASK = """
from dataclasses import replace
from audio_datasets.tasks.catalog import get_task

MINE = replace(get_task("folder"), name="mine", clip_seconds=0.3)
"""


def test_a_task_from_a_module_of_the_user(
    make_task_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    data = make_task_folder("folder", clips=3)
    (tmp_path / "tasks_of_mine.py").write_text(OWN_TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    command = ["--task", "tasks_of_mine:MINE", "--data", str(data), "--probe-only", "--workers", "0"]
    assert main([*command, "--student", "mn01"]) == 0
    assert "0.3 s each" in capsys.readouterr().out
    assert (tmp_path / "runs" / "mine" / "probe" / "results.json").exists()
    assert main([*command[:1], "tasks_of_mine:YOURS", *command[2:]]) == 2
    assert "YOURS must be a Task; tasks_of_mine has nothing of that name" in capsys.readouterr().err


def test_folds_start_alike_and_test_on_other_recordings(
    make_task_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is carried over: the weights before the first step are the same in every fold."""
    starts = []

    def remember(*arguments: Any, **settings: Any) -> None:
        student = arguments[1].learner.student
        starts.append({name: value.clone() for name, value in student.state_dict().items()})

    monkeypatch.setattr("kd.stages.build_run.fit", remember)
    data, out = make_task_folder("esc50"), tmp_path / "run"
    assert main(arguments("esc50", data, out)) == 0
    assert len(starts) == 3
    for other in starts[1:]:
        assert all(torch.equal(starts[0][name], other[name]) for name in starts[0])

    clips, _ = read_task(get_task("esc50"), data)
    tested = []
    for part in partitions(clips)[0]:
        sides = [{clips.clip_id(row) for row in rows} for rows in (part.train, part.test)]
        groups = [{clips.clips[row].group for row in rows} for rows in (part.train, part.test)]
        assert not sides[0] & sides[1]
        assert not groups[0] & groups[1]
        tested += sorted(sides[1])
    assert sorted(tested) == sorted(clips.clip_ids)
    found = results(out)
    assert [run["folder"] for run in found["runs"]] == ["fold1", "fold2", "fold3"]
    assert found["headline"]["spread_over"] == "folds"
    assert found["headline"]["values"] == [run["metrics"]["accuracy"] for run in found["runs"]]


def test_the_same_command_keeps_finished_folds_and_ends_bit_for_bit(
    make_task_folder: Callable[..., Path], tmp_path: Path
) -> None:
    data, whole, resumed = make_task_folder("esc50"), tmp_path / "whole", tmp_path / "resumed"
    options = ["--batch-size", "4", "--keep-checkpoints", "9", "--checkpoint-every-steps", "1"]
    assert main(arguments("esc50", data, whole, "--fold", "1", "2", *options)) == 0
    assert main(arguments("esc50", data, resumed, "--fold", "1", *options)) == 0
    first = (resumed / "fold1" / "student.safetensors").stat().st_mtime_ns
    # Fold 2 as a kill leaves it: inside the first epoch, with nothing finished.
    assert main(arguments("esc50", data, resumed, "--fold", "2", *options)) == 0
    for name in ("result.json", "predictions.npz", "student.safetensors", "student.json"):
        (resumed / "fold2" / name).unlink()
    for path in checkpoints(resumed / "fold2" / "checkpoints")[1:]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    assert main(arguments("esc50", data, resumed, "--fold", "1", "2", *options)) == 0
    assert (resumed / "fold1" / "student.safetensors").stat().st_mtime_ns == first
    left, right = (load_file(out / "fold2" / "student.safetensors") for out in (whole, resumed))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert (whole / "fold2" / "metrics.jsonl").read_text() == (resumed / "fold2" / "metrics.jsonl").read_text()
    assert results(whole)["runs"] == results(resumed)["runs"]
    assert results(whole)["headline"] == results(resumed)["headline"]


def test_a_student_of_another_task_is_carried_over(make_task_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Its name, options and front end come with it; only the layer that gives the classes is new."""
    source = tmp_path / "pretrained"
    with torch.random.fork_rng():
        student = create_student("mn01", 7, dropout=0.1)
    save_student(source, student, [f"class {index}" for index in range(7)], LogMelConfig(fmax_hz=14000.0))
    data, out = make_task_folder("folder"), tmp_path / "run"
    options = ["--init", str(source), "--freeze", "backbone", "--probe"]
    assert main([*arguments("folder", data, out, *options)]) == 0
    tuned = load_student(out)
    card = tuned.card
    assert card.frontend.fmax_hz == 14000.0
    assert tuned.config.options["dropout"] == 0.1
    before, after = student.state_dict(), tuned.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("features."))
    assert not torch.equal(before["classifier.2.weight"], after["classifier.2.weight"])
    probe = json.loads((out / "probe" / "results.json").read_text())
    assert probe["runs"][0]["metrics"]["accuracy"] >= 0.0
    assert (out / "probe" / probe["runs"][0]["folder"] / "predictions.npz").exists()


def test_the_probe_of_a_trained_student_is_a_student_too(
    make_task_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Fitted without being asked for; its folder is evaluated, is a start, and teaches; all alike, whatever the clips' lengths."""
    source, data, out = tmp_path / "pretrained", make_task_folder("folder", clips=6), tmp_path / "run"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_student(source, create_student("mn01", 7), [f"class {index}" for index in range(7)], LogMelConfig())
    given = ["--task", "folder", "--data", str(data), "--workers", "0", "--no-report", "--init", str(source)]
    assert main([*given, "--out", str(out), "--epochs", "1"]) == 0
    shown = capsys.readouterr().out
    assert "linear probe: accuracy" in shown
    assert "chance 0.5000, most frequent class 0.5000" in shown
    config = json.loads((out / "config.json").read_text())
    assert (config["clip_seconds"], config["short_clips"]) == (1.87, "repeat")

    probe = load_student(out / "probe")
    assert probe.card.class_names == ("fan", "pump")
    assert probe.card.provenance["made_by"] == "linear probe"
    trained_on = json.loads((out / "probe" / "trained_on.json").read_text())["clips_with_labels"]
    with np.load(out / "probe" / "predictions.npz", allow_pickle=False) as arrays:
        predicted = dict(zip(arrays["clip_ids"], arrays["logits"], strict=True))
    assert len(trained_on) + len(predicted) == 12
    assert not predicted.keys() & set(trained_on)
    assert pack([str(data), "--task", "folder", "--out", str(tmp_path / "clips.h5"), "--workers", "1"]) == 0
    assert teach(["--clips", str(tmp_path / "clips.h5"), "--teacher", str(out / "probe"), "--out", str(tmp_path)]) == 0
    taught = LogitStore.open(tmp_path / "probe.h5").read(list(predicted))
    np.testing.assert_allclose(taught, np.stack(list(predicted.values())), atol=0.05, rtol=1e-2)
    again = [
        *given[:-1],
        str(out / "probe"),
        "--out",
        str(tmp_path / "again"),
        "--epochs",
        "1",
        "--learning-rate",
        "1e-9",
    ]
    assert main(again) == 0
    started = load_student(tmp_path / "again")
    assert load_student(out).config.options["head"] == "linear"  # trained on from the probe
    torch.testing.assert_close(started.classifier[-1].weight, probe.classifier[-1].weight, atol=1e-5, rtol=1e-5)


def test_a_run_near_chance_and_below_its_probe_says_so_and_keeps_it(
    make_task_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    data, out = make_task_folder("folder"), tmp_path / "run"
    with torch.random.fork_rng():
        save_student(tmp_path / "old", create_student("mn01", 2), ("x", "y"), LogMelConfig())
    # All test clips are called "fan" by the trained student; the probe is right on all.
    monkeypatch.setattr(
        "kd.stages.cross_validation.train_fold",
        lambda setup, folder, part, *rest: np.tile(np.float32([1, 0]), (len(part.test), 1)),
    )
    monkeypatch.setattr(
        "kd.evaluation.probe.LinearProbe.logits", lambda probe, values: 9 * np.eye(2, dtype=np.float32)[[0, 1]]
    )
    given = arguments("folder", data, out, "--init", str(tmp_path / "old"))
    assert main([option for option in given if option not in ("--student", "mn01", "--no-report")]) == 0
    found = results(out)
    assert found["headline"]["mean"] == 0.5
    assert (found["headline"]["chance"], found["headline"]["majority"]) == (0.5, 0.5)
    assert found["runs"][0]["baselines"]["accuracy"] == {"chance": 0.5, "majority": 0.5}
    shown = capsys.readouterr().out
    near, below = found["warnings"]
    assert "on 2 test clips is not clearly better than guessing" in near
    assert "accuracy 0.5000 is worse than the linear probe's 1.0000" in below
    assert f"warning: {near}" in shown
    assert f"warning: {below}" in shown
    page = (out / "report.md").read_text()
    assert near in page.replace("\\", "")
    assert "chance 50.0%, always the most frequent class 50.0%" in page


def test_a_dymn_anneals_its_temperature_if_it_starts_from_scratch(
    make_task_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is validated at the temperature that it will have at the end. A trained one stays at its own."""
    seen: list[float] = []
    monkeypatch.setattr(DyMN, "temperature", property(lambda student: 1.0, lambda student, value: seen.append(value)))
    data, out = make_task_folder("folder"), tmp_path / "run"
    given = ["--epochs", "3", "--valid-share", "0.2", "--validate-every-epochs", "1"]
    options = ["--student", "dymn04", "--student-options", "width=0.1", "temperature_epochs=2"]
    assert main([*arguments("folder", data, out, *given, *options)]) == 0
    assert seen == [30.0, 1.0, 15.5, 1.0, 1.0, 1.0, 1.0]
    seen.clear()
    assert (
        main([*arguments("folder", data, tmp_path / "tuned", *given, "--init", str(out), "--student", "dymn04")]) == 0
    )
    assert seen == []


def test_passt_is_fine_tuned_like_a_student(make_task_folder: Callable[..., Path], tmp_path: Path) -> None:
    """With patchout in training; its run folder is a start again."""
    data, first, second = make_task_folder("folder"), tmp_path / "first", tmp_path / "second"
    small = ["--student", "passt_tiny", "--student-options", "width=64", "depth=2", "heads=1", "patchout_patches=4"]
    assert main([*arguments("folder", data, first), *small]) == 0
    network = load_student(first)
    card = network.card
    assert card.class_names == ("fan", "pump")
    options = ["--init", str(first), "--freeze", "backbone", "--layer-decay", "0.5", "--probe"]
    again = [option for option in arguments("folder", data, second, *options) if option not in ("--student", "mn01")]
    assert main(again) == 0
    tuned = load_student(second).state_dict()
    before = network.state_dict()
    changed = {name.split(".")[0] for name in tuned if not torch.equal(before[name], tuned[name])}
    assert changed == {"head"}


def test_options_for_small_data(make_task_folder: Callable[..., Path], tmp_path: Path) -> None:
    """All of them at once, and several seeds."""
    data, out = make_task_folder("esc50", per_fold=4), tmp_path / "run"
    responses = tmp_path / "responses"
    from_esc50 = data / "audio" / "2-2000-A-0.wav"
    responses.mkdir()
    (responses / "phone.wav").write_bytes(from_esc50.read_bytes())
    options = (
        "--fold 1 --seeds 0 5 --valid-share 0.34 --early-stopping accuracy --patience 1 --layer-decay 0.5 "
        "--class-weights balanced --label-smoothing 0.1 --sampler balanced --time-masks 1 --frequency-masks 2 "
        f"--freq-mixstyle 0.5 --impulse-responses {responses} --freeze batch-norm --ema-decay 0.5 "
        f"--cache {tmp_path / 'cache'}"
    )
    assert main(arguments("esc50", data, out, *options.split())) == 0
    found = results(out)
    assert [run["folder"] for run in found["runs"]] == ["seed0/fold1", "seed5/fold1"]
    assert found["headline"]["spread_over"] == "seeds"
    assert len(found["headline"]["values"]) == 2
    assert found["headline"]["std"] is not None
    validations = read_metrics(out / "seed0" / "fold1" / "metrics.jsonl", "validation")
    best = max(validations, key=lambda record: record["accuracy"])
    assert best["accuracy"] >= validations[-1]["accuracy"]
    assert (out / "seed0" / "fold1" / "best.safetensors").exists()


def write_own_logits(path: Path, ids: list[str], class_names: tuple[str, ...]) -> Path:
    write_logit_store(
        path,
        clip_ids=ids,
        audio_digests=np.zeros((len(ids), 16), dtype=np.uint8),
        logit_blocks=[np.eye(len(class_names), dtype=np.float16)[[len(clip_id) % 2 for clip_id in ids]]],
        class_names=class_names,
        teacher={"name": "own", "fingerprint": "0" * 32},
        clip_store_fingerprint="0" * 32,
    )
    return path


def test_own_teacher_logits(
    make_task_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = make_task_folder("folder")
    clips, _ = read_task(get_task("folder"), data)
    whole = write_own_logits(tmp_path / "whole.h5", clips.clip_ids, clips.class_names)
    assert main(arguments("folder", data, tmp_path / "run", "--logits", str(whole))) == 0
    assert "distillation_loss" in read_metrics(tmp_path / "run" / "metrics.jsonl", "train")[0]
    part = write_own_logits(tmp_path / "part.h5", clips.clip_ids[:3], clips.class_names)
    capsys.readouterr()
    assert main(arguments("folder", data, tmp_path / "other", "--logits", str(part))) == 2
    assert "training clips have no teacher logits" in capsys.readouterr().err
    other = write_own_logits(tmp_path / "other.h5", clips.clip_ids, ("fan", "tap"))
    assert main(arguments("folder", data, tmp_path / "other", "--logits", str(other))) == 2
    assert "'pump'" in capsys.readouterr().err


def test_defaults_are_the_published_ones() -> None:
    def chosen(line: str) -> tuple[float, int, int]:
        config = configure([*line.split(), "--data", "x", "--out", "y"])
        return config.optimizer.learning_rate, config.loop.batch_size, config.loop.epochs

    pretrained = "--weights w.pt --student"
    assert chosen(f"--task esc50 {pretrained} mn04") == (6e-5, 128, 80)
    assert chosen(f"--task esc50 {pretrained} dymn04") == (4e-5, 64, 80)
    assert chosen(f"--task fsd50k {pretrained} mn10") == (7e-5, 64, 80)
    assert chosen(f"--task fsd50k {pretrained} dymn_m") == (4e-5, 32, 80)
    assert chosen(f"--task openmic {pretrained} mn10") == (1e-5, 64, 80)
    assert chosen(f"--task openmic {pretrained} dymn10") == (2e-5, 32, 80)
    assert chosen(f"--task dcase20 {pretrained} mn10") == (8e-4, 64, 80)
    assert chosen(f"--task dcase20 {pretrained} dymn10") == (3e-4, 32, 80)
    assert chosen("--task fsd50k --student mergenet32 --recipe mergenet") == (1e-3, 8, 30)
    assert chosen("--task esc50 --student mergenet32 --recipe mergenet") == (1e-3, 8, 10)
    assert chosen(f"--task esc50 {pretrained} mergenet32 --recipe mergenet") == (1e-3, 8, 5)
    assert chosen(f"--task esc50 {pretrained} mn04 --epochs 8 --batch-size 16 --learning-rate 1e-4") == (1e-4, 16, 8)
    shared = configure(["--task", "esc50", "--data", "x", "--out", "y", "--epochs", "40"])
    assert (shared.schedule.warmup_epochs, shared.schedule.ramp_down_epochs) == (5.0, 32.5)
    assert (shared.augment.gain_db, shared.augment.roll_seconds, shared.optimizer.weight_decay) == (7.0, 0.125, 0.0)
    heard = configure(["--task", "fsd50k", "--student", "mergenet32", "--data", "x", "--out", "y"])
    assert heard.frontend.sample_rate_hz == 16000


WRONG = {
    "unknown task": ("--task esc500 --data x", "esc500"),
    "no task": ("--data x", "--task"),
    "no such data": ("--task esc50 --data absent", "meta/esc50.csv"),
    "unknown student": ("--task esc50 --data esc50 --student mn99", "mn99"),
    "unknown recipe": ("--task esc50 --data esc50 --recipe cake", "dymn, mergenet"),
    "no such fold": ("--task esc50 --data esc50 --fold 9", "folds are [1, 2, 3]"),
    "no such run": ("--task esc50 --data esc50 --init absent", "student.json"),
    "no such weights": ("--task esc50 --data esc50 --student mn01 --weights absent.pt", "absent.pt"),
    "both starts": ("--task esc50 --data esc50 --weights a.pt --init b", "leave out one"),
    "going on and giving up": ("--task esc50 --data esc50 --accept-changes --restart", "choose one"),
    "no validation clips": ("--task esc50 --data esc50 --early-stopping accuracy", "--valid-share"),
    "unknown metric": ("--task esc50 --data esc50 --valid-share 0.2 --early-stopping mAP", "accuracy"),
    "wrong loss": ("--task openmic --data openmic --loss cross-entropy", "bce"),
    "wrong value": ("--task esc50 --data esc50 --epochs 0", "epochs"),
    "annealing what is trained": (
        "--task esc50 --data esc50 --student dymn04 --weights a.pt --student-options temperature_epochs=1",
        "would not be used",
    ),
    "folds where there are none": ("--task dcase20 --data dcase20 --fold 1", "fold"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_plain_message(
    case: str,
    make_task_folder: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line, expected = WRONG[case]
    options = line.split()
    name = options[options.index("--data") + 1]
    if name in HEADLINES:
        make_task_folder(name)
    (tmp_path / "data").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "data")
    with pytest.raises(SystemExit) as stopped:
        sys.exit(main([*options, "--out", "run", "--workers", "0"]))
    assert stopped.value.code == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert expected in shown
    assert "Traceback" not in shown
    assert not Path("run").exists()


def test_another_command_in_the_same_folder(
    make_task_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data, out = make_task_folder("esc50"), tmp_path / "run"
    command = arguments("esc50", data, out, "--fold", "1")
    assert main(command) == 0
    student = out / "fold1" / "student.safetensors"
    written = student.stat().st_mtime_ns
    capsys.readouterr()
    assert main([*command, "--workers", "1"]) == 0
    assert "already finished" in capsys.readouterr().out
    # Another fold is more to do; then the results are those of the folds that are asked for.
    assert main([*command[:-1], "2"]) == 0
    assert [run["fold"] for run in results(out)["runs"]] == [2]
    assert main(command) == 0
    assert [run["fold"] for run in results(out)["runs"]] == [1]
    assert student.stat().st_mtime_ns == written

    other = [*command, "--learning-rate", "0.5"]
    assert main(other) == 2
    assert "optimizer.learning_rate: " in capsys.readouterr().err
    # Accepted: finished folds go on as well, and what was accepted is on record.
    assert main([*command, "--epochs", "3", "--accept-changes"]) == 0
    assert student.stat().st_mtime_ns > written
    assert len(read_metrics(out / "fold1" / "metrics.jsonl", "train")) == 3
    (accepted,) = json.loads((out / "fold1" / "student.json").read_text())["provenance"]["accepted_changes"]
    assert any(change.startswith("loop.epochs: 2 -> 3") for change in accepted["changes"])
    assert "fold1/step-" in accepted["at"]
    # Given up: nothing of it is left, in no fold; files of somebody else are.
    (out / "fold2" / "notes.txt").write_text("mine")
    assert main([*other, "--restart"]) == 0
    assert len(read_metrics(out / "fold1" / "metrics.jsonl", "train")) == 2
    assert [item.name for item in (out / "fold2").iterdir()] == ["notes.txt"]

    (data / "audio").rename(data / "elsewhere")
    moved = data.rename(data.with_name("moved"))
    (moved / "elsewhere").rename(moved / "audio")
    assert main([*arguments("esc50", moved, out, "--fold", "1"), "--learning-rate", "0.5"]) == 0
    assert "already finished" in capsys.readouterr().out
    table = moved / "meta" / "esc50.csv"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(lines[:-1]))
    assert main([*arguments("esc50", moved, out, "--fold", "1"), "--learning-rate", "0.5"]) == 2
    assert "inputs.clips: " in capsys.readouterr().err


def test_two_runs_do_not_write_into_one_folder(
    make_task_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data, out = make_task_folder("folder"), tmp_path / "run"
    with locked(out / "run.lock", "the run"):
        assert main(arguments("folder", data, out)) == 2
    assert f"is in use by process {os.getpid()}" in capsys.readouterr().err
    assert not (out / "config.json").exists()


@pytest.mark.parametrize(
    ("number", "kind", "call", "told"),
    [
        (signal.SIGTERM, DistillationObjective, 2, "fold1 is saved at step 2"),
        (signal.SIGUSR1, EvaluationWindows, 6, "fold1 is saved at step 6"),  # in the test of fold 1
        (signal.SIGTERM, DistillationObjective, 7, "fold2 is saved at step 1"),
        (signal.SIGUSR1, EvaluationWindows, 1, " during the linear probe"),
    ],
)
def test_a_signal_finishes_the_step_saves_and_the_same_command_goes_on(
    make_task_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    number: signal.Signals,
    kind: type,
    call: int,
    told: str,
) -> None:
    data = make_task_folder("esc50")
    options = ["--fold", "1", "2", "--batch-size", "4", "--log-every-steps", "1"]
    options += ["--probe"] if "probe" in told else []
    method = "forward" if kind is DistillationObjective else "__getitem__"
    original, calls = getattr(kind, method), []

    def signalled(*inputs: object) -> object:
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(kind, method, signalled)
        assert main(arguments("esc50", data, tmp_path / "run", *options)) == STOPPED
    shown = capsys.readouterr().err
    assert f"stopped: received {number.name}" in shown
    assert told in shown
    assert not (tmp_path / "run" / "run.lock").exists()
    assert main(arguments("esc50", data, tmp_path / "run", *options)) == 0
    assert main(arguments("esc50", data, tmp_path / "whole", *options)) == 0
    for name in ("metrics.jsonl", "student.safetensors", "result.json"):
        for fold in ("fold1", "fold2"):
            assert (tmp_path / "run" / fold / name).read_bytes() == (tmp_path / "whole" / fold / name).read_bytes()


@pytest.mark.parametrize(
    ("task", "module", "step", "call", "told"),
    [
        ("folder", TaskClips, "duration_seconds", 5, "received SIGTERM; the same command starts from the beginning"),
        ("folder", TaskClips, "duration_seconds", 35, "the same command decodes the clips into"),
        ("folder", TaskClips, "waveform", 4, "the same command decodes the clips into"),
        ("esc50", linear_model, "LogisticRegression", 1, " during the linear probe"),  # the first of three
    ],
)
def test_a_signal_before_training_begins(
    make_task_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    task: str,
    module: Any,
    step: str,
    call: int,
    told: str,
) -> None:
    data, out, cache = make_task_folder(task), tmp_path / "run", tmp_path / "cache"
    command = [
        "--task",
        task,
        "--data",
        str(data),
        "--out",
        str(out),
        "--cache",
        str(cache),
        *SHORT[:6],
        "--probe-only",
    ]
    original, calls = getattr(module, step), []

    def signalled(*values: Any, **settings: Any) -> Any:
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*values, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(module, step, signalled)
        assert main(command) == STOPPED
    assert told in capsys.readouterr().err
    assert not (out / "run.lock").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    assert len(list(cache.glob("*"))) == (1 if module is linear_model else 0)
    assert main(command) == 0
    assert results(out / "probe")["headline"]["mean"] >= 0.0


@pytest.mark.parametrize("cached", [False, True])
def test_bad_clips_are_refused_or_skipped(
    make_task_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture, cached: bool
) -> None:
    """One to train on and one to test on in each fold: one of no format, one whose header is whole and samples are NaN."""
    data, out = make_task_folder("esc50", per_fold=4), tmp_path / "run"
    clips, _ = read_task(get_task("esc50"), data)
    of_fold = {fold: [clip for clip in clips.clips if clip.fold == fold] for fold in (1, 2)}
    damaged, spoilt = of_fold[1][0], of_fold[2][1]
    damaged.path.write_bytes(b"no audio at all")
    soundfile.write(spoilt.path, np.full(32000, np.nan), 32000, format="WAV", subtype="FLOAT")
    # With every clip mixed with another, bad ones are met as partners too.
    command = arguments("esc50", data, out, "--fold", "1", "2", "--waveform-mixup", "1", "--batch-size", "4", "--probe")
    command += ["--cache", str(tmp_path / "cache")] if cached else []
    assert main(command) == 2
    assert f"clip {damaged.clip_id!r}" in capsys.readouterr().err
    # The same run, since what is done with bad clips is not what it is.
    assert main([*command, "--on-bad-clip", "skip"]) == 0
    assert f"2 of {len(clips)} clips skipped" in capsys.readouterr().out
    skipped = ClipList(out / "skipped_clips.txt").read()
    assert list(skipped) == sorted([damaged.clip_id, spoilt.clip_id])
    assert "in no format" in skipped[damaged.clip_id]
    assert "NaN" in skipped[spoilt.clip_id]
    for place in (out, out / "probe"):
        assert [run["skipped_clips"] for run in results(place)["runs"]] == [1, 1]
        for fold, bad in ((1, damaged), (2, spoilt)):
            with np.load(place / f"fold{fold}" / "predictions.npz", allow_pickle=False) as arrays:
                assert set(arrays["clip_ids"]) == {clip.clip_id for clip in of_fold[fold]} - {bad.clip_id}
                assert np.isfinite(arrays["logits"]).all()
    if not cached:
        other = [option if option != str(out) else str(tmp_path / "other") for option in command]
        assert main([*other, "--on-bad-clip", "skip", "--workers", "2"]) == 0
        left, right = (load_file(run / "fold1" / "student.safetensors") for run in (out, tmp_path / "other"))
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_as_a_script_with_a_worker(
    make_task_folder: Callable[..., Path], tmp_path: Path, environment: dict[str, str]
) -> None:
    data, out = make_task_folder("folder", clips=3), tmp_path / "run"
    more = ["--workers", "1", "--epochs", "1", "--report"]
    command = [sys.executable, FINETUNE, *arguments("folder", data, out, *more)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "accuracy" in done.stdout
    assert "<html" in (out / "report.html").read_text()


def test_without_test_clips_a_student_learns_from_all_and_says_so(
    make_task_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data, out = make_task_folder("folder"), tmp_path / "run"
    assert main(arguments("folder", data, out, "--test-share", "0")) == 0
    shown = capsys.readouterr().out
    assert "all clips are for training; there is no test" in shown
    assert "trained; there are no test clips" in shown
    assert load_student(out).card.provenance["training_clips"]["labelled"] == 10
    assert json.loads((out / "result.json").read_text())["metrics"] == {}
    assert not (out / "results.json").exists()
    assert not (out / "predictions.npz").exists()
    before = (out / "student.safetensors").stat().st_mtime_ns
    assert main(arguments("folder", data, out, "--test-share", "0")) == 0  # finished: nothing is left to do
    assert (out / "student.safetensors").stat().st_mtime_ns == before
