"""`kd pretrain` on tiny clips: results, resuming after a kill, several processes, and wrong input."""

import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.clip_writer import ClipRecord, write_clip_store
from kd.evaluate import EvaluateConfig, evaluate
from kd.pretrain import main
from kd.run_folder.metrics_log import read_metrics
from kd.training.checkpoint import checkpoints
from students import create_student
from students.card import load_student, save_student
from students.families.dymn import DyMN
from students.frontend import LogMel, LogMelConfig
from teacher_logits.compact import write_compact
from teacher_logits.store import LogitStore, write_logit_store

PRETRAIN = str(Path(__file__).parents[2] / "kd" / "pretrain.py")


def arguments(store: Path, out: Path, *more: str) -> list[str]:
    """A run of 12 steps over the 12 clips: two epochs of six steps of two clips."""
    settings = "--student mn01 --epochs 2 --batch-size 2 --clip-seconds 0.4 --workers 0 --log-every-steps 4"
    return ["--clips", str(store), "--out", str(out), *settings.split(), *more]


def same_result(one: Path, other: Path) -> None:
    """Weights bit for bit, and every logged number."""
    left, right = load_file(one / "student.safetensors"), load_file(other / "student.safetensors")
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
    assert (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()


def test_a_distilled_student_is_all_that_evaluation_needs(tiny_store: Path, tiny_logits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--logits", f"{tiny_logits}:2", "--split", "train", "--valid-split", "valid", "--ema-decay", "0.5"]
    given = arguments(tiny_store, out, *options)
    assert main(given) == 0
    card = load_student(out).card
    assert card.class_names == ClipStore.open(tiny_store).class_names
    assert shlex.split(card.provenance["command"]) == ["kd", "pretrain", *given]
    assert card.provenance["teachers"][0]["teacher"]["name"] == "tiny"
    assert {"loss", "label_loss", "distillation_loss"} <= read_metrics(out / "metrics.jsonl", "train")[0].keys()
    last = read_metrics(out / "metrics.jsonl", "validation")[-1]
    # What was saved is what was validated: the moving average.
    same = {"batch_size": 2, "workers": 0}
    found = evaluate(EvaluateConfig(tagger=str(out), clips=tiny_store, split="valid", **same))
    assert found["mAP"] == pytest.approx(last["mAP"], abs=1e-6)
    newest = checkpoints(out / "checkpoints")[-1]
    saved, averaged = load_file(out / "student.safetensors"), load_file(newest / "ema.safetensors")
    assert all(torch.equal(saved[name], averaged[name]) for name in saved if "running" not in name)
    raw = load_file(newest / "student.safetensors")
    assert any(not torch.equal(saved[name], raw[name]) for name in saved)


def test_the_students_batch_norms_know_its_weights(
    tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """After four steps running statistics are still nearly those of a fresh student: mean 0 and variance 1."""
    options = ["--label-weight", "1", "--split", "train", "--valid-split", "valid", "--epochs", "1", "--no-mel-jitter"]
    assert main(arguments(tiny_store, tmp_path / "renewed", *options)) == 0
    said = capsys.readouterr().out
    assert "batch-norm statistics recomputed from 8 training clips" in said
    assert "steps are too few" not in said
    assert main(arguments(tiny_store, tmp_path / "kept", *options, "--batch-norm-clips", "0")) == 0
    said = capsys.readouterr().out
    assert "4 steps are too few for batch norms with momentum 0.01" in said
    assert "recomputed from 8" not in said
    clips = ClipStore.open(tiny_store)
    mel = LogMel(load_student(tmp_path / "kept").card.frontend)(
        torch.stack([torch.from_numpy(clips.waveform(row, 32000, 0.0, 0.4)) for row in range(8)])
    )
    for name, heard in (("renewed", 8), ("kept", 0)):
        student = load_student(tmp_path / name)
        assert student.card.provenance["batch_norm_clips"] == heard
        norms = [layer for layer in student.eval().modules() if isinstance(layer, torch.nn.BatchNorm2d)]
        saved = [torch.cat([layer.running_mean, layer.running_var]).clone() for layer in norms]
        for layer in norms:
            layer.train().momentum = 1.0  # PyTorch then keeps the statistics of the last batch
        with torch.no_grad():
            student(mel)
        found = [torch.cat([layer.running_mean, layer.running_var]) for layer in norms]
        close = [torch.allclose(one, other, rtol=1e-3, atol=1e-4) for one, other in zip(saved, found, strict=True)]
        assert all(close) if heard else not any(close)
    left, right = (load_file(tmp_path / name / "student.safetensors") for name in ("renewed", "kept"))
    assert all(torch.equal(left[name], right[name]) for name in left if "running" not in name)
    # What was validated last is what was saved.
    last = read_metrics(tmp_path / "renewed" / "metrics.jsonl", "validation")[-1]
    same = {"batch_size": 2, "workers": 0}
    found = evaluate(EvaluateConfig(tagger=str(tmp_path / "renewed"), clips=tiny_store, split="valid", **same))
    assert found["mAP"] == pytest.approx(last["mAP"], abs=1e-6)


def test_teachers_change_what_is_learnt(tiny_store: Path, tiny_logits: Path, tmp_path: Path) -> None:
    main(arguments(tiny_store, tmp_path / "labels", "--label-weight", "1"))
    main(arguments(tiny_store, tmp_path / "distilled", "--logits", str(tiny_logits)))
    left, right = (load_file(tmp_path / name / "student.safetensors") for name in ("labels", "distilled"))
    assert any(not torch.equal(left[name], right[name]) for name in left)


def test_compact_logits_and_means_of_probabilities_reach_the_student(
    tiny_store: Path, tiny_logits: Path, make_tiny_logits: Callable[..., Path], tmp_path: Path
) -> None:
    top = tmp_path / "top.h5"
    write_compact(LogitStore.open(tiny_logits), top, keep=1)
    other = make_tiny_logits("other.h5", tiny_store, scale=-1.0)
    ways = {
        "both": [tiny_logits, other],
        "compact": [top, other],
        "probabilities": [top, other, "--ensemble", "probabilities"],
        "alone": [top, f"{other}:0"],
    }
    results = []
    for name, options in ways.items():
        assert main(arguments(tiny_store, tmp_path / name, "--epochs", "1", "--logits", *map(str, options))) == 0
        results.append(load_file(tmp_path / name / "student.safetensors")["features.0.0.weight"])
    for index, one in enumerate(results):
        assert not any(torch.equal(one, another) for another in results[:index])


@pytest.mark.parametrize(("accumulation", "workers"), [(1, 0), (2, 1)])
def test_a_run_resumed_inside_an_epoch_ends_bit_for_bit_as_one_that_was_not_stopped(
    tiny_store: Path, tiny_logits: Path, tmp_path: Path, accumulation: int, workers: int
) -> None:
    options = [
        "--logits",
        str(tiny_logits),
        "--ema-decay",
        "0.9",
        "--valid-folds",
        "1",
        "--checkpoint-every-steps",
        "1",
    ]
    options += ["--gradient-accumulation-steps", str(accumulation), "--keep-checkpoints", "50"]
    options += ["--workers", str(workers)]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert main(arguments(tiny_store, whole, *options)) == 0
    shutil.copytree(whole, resumed)
    (resumed / "student.safetensors").unlink()
    # As a kill leaves it: checkpoints up to the middle of the second epoch, and log records written after the last one.
    for path in checkpoints(resumed / "checkpoints"):
        if int(path.name.removeprefix("step-")) > 8 // accumulation:
            shutil.rmtree(path)
    assert main(arguments(tiny_store, resumed, *options)) == 0
    same_result(whole, resumed)


def test_a_run_that_is_killed_and_resumed_loses_nothing(
    tiny_store: Path, tiny_logits: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    def command(out: Path) -> list[str]:
        options = ["--logits", str(tiny_logits), "--checkpoint-every-steps", "1", "--epochs", "4"]
        return [sys.executable, PRETRAIN, *arguments(tiny_store, out, *options)]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), check=True, env=environment, capture_output=True)
    process = subprocess.Popen(command(killed), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (killed / "checkpoints" / "step-00000009").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "student.safetensors").exists()
    subprocess.run(command(killed), check=True, env=environment, capture_output=True)
    same_result(whole, killed)


def test_two_processes_draw_the_same_clips_and_count_each_validation_clip_once(
    tiny_store: Path, tiny_logits: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """7 validation clips do not divide by two processes; with batch norm per process the losses differ a little."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", PRETRAIN]
    options = ["--logits", str(tiny_logits), "--valid-folds", "1", "2", "--student-options", "dropout=0"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*arguments(tiny_store, one, *options), "--batch-size", "4"]) == 0
    done = subprocess.run(
        [*launch, *arguments(tiny_store, two, *options)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("student written to") == 1
    left, right = (read_metrics(path / "metrics.jsonl", "train") for path in (one, two))
    assert [record["step"] for record in left] == [record["step"] for record in right]
    np.testing.assert_allclose([r["loss"] for r in left], [r["loss"] for r in right], rtol=0.1)
    assert len(read_metrics(two / "metrics.jsonl", "validation")) == 2


def test_without_arguments_it_says_what_it_needs(environment: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, PRETRAIN], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    for word in ("--clips", "--logits", "--out", "kd demo"):
        assert word in done.stderr


def test_dymn_trains_with_its_temperature_annealed(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    seen = []
    monkeypatch.setattr(DyMN, "temperature", property(lambda student: 1.0, lambda student, value: seen.append(value)))
    options = ["--label-weight", "1", "--student", "dymn04", "--clips-per-epoch", "2", "--epochs", "3"]
    options += ["--student-options", "width=0.1"]
    assert main([*arguments(tiny_store, tmp_path / "run", *options), "temperature_epochs=2"]) == 0
    assert seen == [30.0, 15.5, 1.0]
    student = load_student(tmp_path / "run")
    assert student.options.width == 0.1
    assert main([*arguments(tiny_store, tmp_path / "other", *options), "temperature_epochs=3"]) == 2
    assert "temperature_epochs (3) must be less than epochs (3)" in capsys.readouterr().err


def test_clips_and_logits_in_several_stores_train_as_in_one(
    tiny_store: Path, tiny_logits: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    clips, logits = ClipStore.open(tiny_store), LogitStore.open(tiny_logits)
    names = np.array(clips.class_names)
    clip_parts, logit_parts = [], []
    for rows in (np.arange(5), np.arange(5, 12)):
        targets = clips.targets(rows).astype(bool)
        pcm = [np.round(32768 * clips.waveform(row, 32000)).astype(np.int16) for row in rows]
        records = [
            ClipRecord(clips.clip_id(row), samples, tuple(names[has]))
            for row, samples, has in zip(rows, pcm, targets, strict=True)
        ]
        clip_parts.append(tmp_path / f"clips-{rows[0]}.h5")
        write_clip_store(clip_parts[-1], records, clips.class_names, audio_kind="pcm16", sample_rate_hz=32000)
        logit_parts.append(tmp_path / f"logits-{rows[0]}.h5")
        write_logit_store(
            logit_parts[-1],
            clip_ids=[record.clip_id for record in records],
            audio_digests=clips.audio_digests(rows),
            logit_blocks=[logits.read_rows(rows).astype(np.float16)],
            class_names=clips.class_names,
            teacher=logits.teacher,
            clip_store_fingerprint=ClipStore.open(clip_parts[-1]).fingerprint,
        )
    options = ["--workers", "1", "--clips"]
    assert main(arguments(tiny_store, tmp_path / "one", "--logits", str(tiny_logits), *options, str(tiny_store))) == 0
    joined = "+".join(map(str, logit_parts))
    assert main(arguments(tiny_store, tmp_path / "two", "--logits", joined, *options, *map(str, clip_parts))) == 0
    same_result(tmp_path / "one", tmp_path / "two")
    card = load_student(tmp_path / "two").card
    assert card.provenance["config"]["clips"] == [str(path) for path in clip_parts]
    assert main(arguments(tiny_store, tmp_path / "three", "--logits", joined, *options, *[str(clip_parts[0])] * 2)) == 2
    assert "both contain the clips 'clip-0000'" in capsys.readouterr().err


def test_tracker(tiny_store: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert main(arguments(tiny_store, tmp_path / "run", "--label-weight", "1", "--log-with", "tensorboard")) == 0
    assert list((tmp_path / "run" / "trackers").rglob("events.out.tfevents.*"))


def test_missing_logits(
    make_tiny_store: Callable[..., Path],
    make_tiny_logits: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    store = make_tiny_store("clips.h5")
    logits = make_tiny_logits("logits.h5", store, rows=range(9))
    assert main(arguments(store, tmp_path / "run", "--logits", str(logits))) == 2
    assert "3 of 12 training clips have no teacher logits (such as 'clip-0009'" in capsys.readouterr().err
    assert main(arguments(store, tmp_path / "run", "--logits", str(logits), "--missing-logits", "label-only")) == 0
    assert "trained on their labels only" in capsys.readouterr().out


WRONG = {
    "no such file": (["--clips", "absent.h5", "--label-weight", "1"], "absent.h5"),
    "neither logits nor labels alone": ([], "there are no --logits"),
    "unknown student": (["--label-weight", "1", "--student", "mn99"], "mn99"),
    "unknown option": (["--label-weight", "1", "--student-options", "wdith=0.1"], "wdith"),
    "option without value": (["--label-weight", "1", "--student-options", "width"], "NAME=VALUE"),
    "odd batch": (["--label-weight", "1", "--batch-size", "3"], "batch_size"),
    "no such fold": (["--label-weight", "1", "--folds", "9"], "9"),
    "no such split": (["--label-weight", "1", "--split", "nowhere"], "nowhere"),
    "unknown tracker": (["--label-weight", "1", "--log-with", "nothing"], "nothing"),
    "wrong value": (["--label-weight", "1", "--epochs", "0"], "epochs"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_plain_message(
    case: str, tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options, expected = WRONG[case]
    with pytest.raises(SystemExit) as stopped:
        sys.exit(main(arguments(tiny_store, tmp_path / "run", *options)))
    assert stopped.value.code == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert expected in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "run" / "config.json").exists()


def test_wrong_files(
    tiny_store: Path,
    tiny_logits: Path,
    make_tiny_store: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    def fails(*options: str) -> str:
        assert main(arguments(*options[:1], tmp_path / "run", *map(str, options[1:]))) == 2
        return capsys.readouterr().err

    truncated = tmp_path / "truncated.h5"
    truncated.write_bytes(tiny_store.read_bytes()[:-5000])
    assert "truncated.h5" in fails(truncated, "--label-weight", "1")
    assert "tiny.h5" in fails(tiny_store, "--logits", tiny_store)
    assert "tiny-logits.h5" in fails(tiny_logits, "--label-weight", "1")
    other = make_tiny_store("longer.h5", seconds=0.6)
    assert "is not what the teacher heard" in fails(other, "--logits", tiny_logits)
    renamed = make_tiny_store("renamed.h5", class_names=("hiss", "hum, high", "click"))
    assert "class 1 is 'hum, high' in" in fails(renamed, "--logits", tiny_logits)
    assert "another class list" in fails(tiny_store, "--label-weight", "1", "--valid-clips", renamed)
    assert main(arguments(tiny_store, tmp_path / "mn01", "--label-weight", "1", "--epochs", "1")) == 0
    weights = tmp_path / "mn01" / "student.safetensors"
    message = fails(tiny_store, "--label-weight", "1", "--student", "mn02", "--weights", weights)
    assert "mn01" in message


def test_a_loss_that_is_not_finite_names_the_clips(
    tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(arguments(tiny_store, tmp_path / "run", "--label-weight", "1", "--learning-rate", "1e9")) == 2
    shown = capsys.readouterr().err
    assert "not finite" in shown
    assert "clip-00" in shown


def test_stores_that_do_not_record_their_teachers_link_are_asked_about(
    tiny_store: Path, make_tiny_logits: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    store = make_tiny_logits("old.h5", tiny_store, link=None)
    old = ["--logits", str(store), "--epochs", "1", "--batch-norm-clips", "0"]
    assert main(arguments(tiny_store, tmp_path / "asked", *old)) == 2
    shown = capsys.readouterr().err
    assert "old.h5' does not record whether the teacher was trained with a sigmoid" in shown
    assert "--teacher-link" in shown
    assert not (tmp_path / "asked").exists()
    weights = []
    for link in ("sigmoid", "softmax"):
        assert main(arguments(tiny_store, tmp_path / link, *old, "--teacher-link", link)) == 0
        weights.append(load_file(tmp_path / link / "student.safetensors")["features.0.0.weight"])
    assert not torch.equal(*weights)
    assert load_student(tmp_path / "sigmoid").card.provenance["link"] == "sigmoid"  # of the student, for its own pupils
    assert main(arguments(tiny_store, tmp_path / "softmax", *old, "--teacher-link", "sigmoid")) == 2
    assert "another configuration" in capsys.readouterr().err
    options = ["--label-weight", "1", "--teacher-link", "sigmoid"]
    assert main(arguments(tiny_store, tmp_path / "none", *options)) == 2
    assert "--teacher-link is not used without --logits" in capsys.readouterr().err


WAYS = {
    "soft-targets": ("--teacher-temperature", "2"),
    "pseudo-labels": ("--objective-options", "threshold=0.6"),
    "embedding": ("--objective-options", "teacher=TEACHER", "weight=0.5"),
    "online": ("--objective-options", "teacher=TEACHER", "link=sigmoid"),
    "mean-teacher": ("--objective-options", "decay=0.9"),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_teach_trains_and_resumes(
    way: str, tiny_store: Path, tiny_logits: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    save_student(
        tmp_path / "teacher", create_student("mn01", 3), ClipStore.open(tiny_store).class_names, LogMelConfig()
    )
    options = ["--objective", way, *(word.replace("TEACHER", str(tmp_path / "teacher")) for word in WAYS[way])]
    options += ["--epochs", "1", "--checkpoint-every-steps", "1", "--keep-checkpoints", "9", "--batch-norm-clips", "0"]
    options += ["--logits", str(tiny_logits)] if way in ("soft-targets", "pseudo-labels") else []
    options += ["--ema-decay", "0.5"] if way == "mean-teacher" else []
    assert main(arguments(tiny_store, tmp_path / "whole", *options)) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    (tmp_path / "resumed" / "student.safetensors").unlink()
    for path in checkpoints(tmp_path / "resumed" / "checkpoints")[-3:]:
        shutil.rmtree(path)
    assert main(arguments(tiny_store, tmp_path / "resumed", *options)) == 0
    same_result(tmp_path / "whole", tmp_path / "resumed")
    assert load_student(tmp_path / "whole").card.provenance["objective"] == way
    if way == "online":
        assert main(arguments(tiny_store, tmp_path / "both", *options, "--logits", str(tiny_logits))) == 2
        assert "leave out --logits" in capsys.readouterr().err
