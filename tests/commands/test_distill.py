"""`kd distill`: from a few labels to a student, through all steps."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from kd import distill as script
from kd import finetune
from kd.distill import main
from kd.distilling import arms
from kd.distilling.clip_lists import divisions, draw_labels, everything, read_clips
from kd.distilling.config import DistillConfig
from kd.distilling.given_teacher import check_given_teacher
from kd.distilling.teacher_weights import TeacherStart, teacher_start
from kd.run_folder.predictions import Predictions
from students import create_student
from students.card import load_student, save_student
from students.catalog import family_of
from students.frontend import LogMelConfig
from teacher_logits.store import LogitStore

Make = Callable[..., Path]


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    """A run folder with a small student to make teachers of."""
    folder = tmp_path / "pretrained"
    folder.mkdir()
    save_student(folder, create_student("mn01", 2), ["x", "y"], LogMelConfig(), {"clip_seconds": 0.4})
    return folder


def few_labels(folder: Path, labelled: int) -> Path:
    """Of each class only so many clips stay in its folder; the others move to ``unlabelled``."""
    for sub in list(folder.iterdir()):
        for file in sorted(sub.iterdir())[labelled:]:
            target = folder / "unlabelled" / f"{sub.name} {file.name}"
            target.parent.mkdir(exist_ok=True)
            shutil.move(file, target)
    return folder


def arguments(data: Path, out: Path, pretrained: Path, *more: object) -> list[str]:
    words = ["--data", data, "--out", out, "--teacher-weights", pretrained, *more]
    small = "--steps 2 --batch-size 4 --workers 0 --clip-seconds 0.4 --n-mels 32"
    return [str(word) for word in (*words, *small.split())]


def test_few_labels_are_cross_validated_and_the_kept_student_learns_from_all(
    make_task_folder: Make, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data, out = few_labels(make_task_folder("folder"), 2), tmp_path / "run"
    assert main(arguments(data, out, pretrained)) == 0
    shown = capsys.readouterr().out
    assert "training clips with + without labels: '2 + 6', '2 + 6', '4 + 6'" in shown
    found = json.loads((out / "results.json").read_text())
    assert set(found) == {"teacher", "labels_alone", "distilled", "gain"}
    assert len(found["distilled"]["values"]) == 2
    assert found["gain"]["mean"] == pytest.approx(found["distilled"]["mean"] - found["labels_alone"]["mean"])
    tested = [
        set(Predictions.read(out / "held_out" / "distilled" / fold / "predictions.npz", None).clip_ids)
        for fold in ("fold1", "fold2")
    ]
    assert tested[0] | tested[1] == {f"{name}/take {take}" for name in ("fan", "pump") for take in ("0.wav", "1.mp3")}
    assert not tested[0] & tested[1]
    assert "Differences and chance" in (out / "report.html").read_text()
    assert not (out / "labels_alone").exists()
    student = load_student(out / "distilled")
    assert student.card.provenance["training_clips"] == {"labelled": 4, "unlabelled": 6}
    assert not (out / "distilled" / "results.json").exists()

    before = (out / "distilled" / "student.safetensors").read_bytes()
    assert main(arguments(data, out, pretrained)) == 0  # nothing is left to do
    assert (out / "distilled" / "student.safetensors").read_bytes() == before
    assert main(arguments(data, out, pretrained, "--label-weight", 0.5)) == 2
    assert "label_weight: 0.1 -> 0.5" in capsys.readouterr().err


def test_an_interrupted_distillation_ends_in_the_same_student(
    make_task_folder: Make, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = few_labels(make_task_folder("folder", clips=7), 5)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(arguments(data, whole, pretrained)) == 0
    run = arms.run
    for step in ("teach", "finetune"):

        def stop_after(command: str, *inputs: object, at: str = step) -> None:
            run(command, *inputs)
            if command == at:
                raise KeyboardInterrupt

        monkeypatch.setattr(arms, "run", stop_after)
        assert main(arguments(data, stopped, pretrained)) == 130
    monkeypatch.setattr(arms, "run", run)
    assert main(arguments(data, stopped, pretrained)) == 0
    for name in ("teacher/probe", "labels_alone", "distilled"):
        first, second = (folder / name / "student.safetensors" for folder in (whole, stopped))
        assert first.read_bytes() == second.read_bytes()


def config(data: Path, **settings: object) -> DistillConfig:
    return DistillConfig(data=data, teacher_weights="w", **settings)  # type: ignore[arg-type]


def test_labels_that_are_not_drawn_are_unknown_in_training(make_task_folder: Make, tmp_path: Path) -> None:
    clips, _ = read_clips(config(make_task_folder("esc50", per_fold=4)))
    settings = config(tmp_path, labels_per_class=2, label_seed=3, fold=(1,))
    (first,), _ = divisions(clips, settings)
    assert (first.name, len(first.part.train), len(first.part.unlabelled)) == ("fold1", 6, 18)
    assert clips.targets(first.part.train).sum(axis=0).tolist() == [2, 2, 2]
    first.write(tmp_path / "clips.parquet")
    rows = pq.read_table(tmp_path / "clips.parquet").to_pylist()
    known = [row["clip_id"] for row in rows if row["split"] == "train" and row["labels"] != ["(unknown)"]]
    assert known == [clips.clip_id(int(row)) for row in first.part.train]
    assert sum(row["split"] == "test" for row in rows) == 12
    other = draw_labels(clips, np.arange(len(clips)), 2, seed=4)
    assert not np.array_equal(other, draw_labels(clips, np.arange(len(clips)), 2, seed=3))
    with pytest.raises(ValueError, match="class 'dog' has 12 training clips"):
        draw_labels(clips, np.arange(len(clips)), 13, seed=0)


def test_a_single_label_leaves_nothing_to_test(make_task_folder: Make) -> None:
    clips, _ = read_clips(config(few_labels(make_task_folder("folder"), 1)))
    lists, told = divisions(clips, config(clips.path))
    assert lists == []
    assert "not tested" in told
    whole = everything(clips, config(clips.path))
    assert (len(whole.part.train), len(whole.part.unlabelled), len(whole.part.test)) == (2, 8, 0)


def test_a_second_folder_of_sounds_without_labels(make_task_folder: Make, tmp_path: Path) -> None:
    data = make_task_folder("folder")
    shutil.copytree(data / "fan", tmp_path / "more" / "deep")
    clips, notes = read_clips(config(data, unlabelled=tmp_path / "more"))
    assert len(clips) == 15
    assert clips.clip_id(10) == "(unknown)/deep/take 0.wav"
    assert not clips.mask(range(10, 15)).any()
    assert "5 clips without labels" in notes[-1]


def test_a_fine_tuned_teacher_in_place_of_a_probe(
    make_task_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    monkeypatch.setattr(arms, "run", lambda *words: ran.append(" ".join(map(str, words))))
    settings = config(make_task_folder("folder"), out=tmp_path, teacher="finetune", teacher_epochs=7)
    whole = everything(read_clips(settings)[0], settings)
    (tmp_path / "w.pt").write_bytes(b"weights")
    arms.Distillation(settings, teacher_start(f"mn04@{tmp_path / 'w.pt'}"), whole, 600).run(
        tmp_path / "clips.h5", labels_alone=False
    )
    assert [words.split()[0] for words in ran] == ["finetune", "teach", "finetune"]
    assert f"--student mn04 --weights {tmp_path / 'w.pt'} --no-probe --epochs 7" in ran[0]
    assert "--teacher-temperature" not in ran[2]
    assert f"--teacher {tmp_path / 'teacher'} --name" in ran[1]


def test_a_given_teacher_speaks_for_itself(
    make_task_folder: Make, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The network as it is, its classes mapped to ours: no label reaches it, and its row is its stored logits' on the test clips."""
    network, classes = tmp_path / "network", ["Wind", "Fan", "Pump", "Water pump"]
    save_student(network, create_student("mn01", 4), classes, LogMelConfig(), {"clip_seconds": 0.4})
    mapping = tmp_path / "map.csv"
    mapping.write_text("teacher_class,class\nFan,fan\nPump,pump\nWater pump,pump\n")
    data, out = make_task_folder("folder", clips=7), tmp_path / "run"
    assert main(arguments(data, out, network, "--teacher", "given")) == 2
    assert "does not know 2 of 2 classes by these names: 'fan', 'pump'; map its 4 classes" in capsys.readouterr().err
    how = ("--teacher", "given", "--class-map", mapping, "--teacher-link", "sigmoid", "--labels-per-class", 2)
    assert main(arguments(data, out, network, *how)) == 0
    shown = capsys.readouterr().out
    assert not (out / "teacher").exists()
    assert [line for line in shown.splitlines() if line.startswith("teacher ")]
    found = json.loads((out / "results.json").read_text())
    predictions = Predictions.read(out / "distilled" / "predictions.npz", None)
    store = LogitStore.open(out / "logits" / "teacher.h5")
    assert store.link.to_json() == "sigmoid"
    ids = list(predictions.clip_ids)
    right = store.read(ids).argmax(1) == predictions.targets.argmax(1)
    assert found["teacher"]["mean"] == pytest.approx(right.mean())
    with pytest.raises(SystemExit, match="2"):
        main(arguments(data, tmp_path / "other", network, "--class-map", mapping))
    assert "--class-map is for --teacher given" in capsys.readouterr().err
    assert main(arguments(data, tmp_path / "other", network, "--teacher", "given", "--class-map", "gone.csv")) == 2
    assert "gone.csv" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_classes_of_a_given_teacher_are_found_by_name(make_task_folder: Make, tmp_path: Path) -> None:
    clips, _ = read_clips(config(make_task_folder("folder")))
    settings = config(clips.path, teacher="given")
    for names, wanted in (
        (("fan", "pump"), None),
        (("pump", "fan", "wind"), "teacher_class,class\nfan,fan\npump,pump\n"),
    ):
        (tmp_path / "names.txt").write_text("\n".join(names))
        settings = replace(settings, teacher_class_names=tmp_path / "names.txt")
        assert check_given_teacher(settings, TeacherStart("mn04", (), "mn04@w.pt"), clips.class_names) == wanted


def test_which_network_weights_are_of(pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mn04_own.pt", "best.pt", "mn041.pt", "w.pt", "mn10_as_mAP_471.pt"):
        (tmp_path / name).write_bytes(b"weights")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KD_WEIGHTS_DIR", str(tmp_path))
    assert teacher_start("mn04_own.pt").arguments == ("--student", "mn04", "--weights", "mn04_own.pt")
    assert teacher_start("mn10_as").arguments == ("--student", "mn10", "--weights", "mn10_as")  # public, by name
    assert teacher_start("passt@w.pt").arguments == ("--student", "passt", "--weights", "w.pt")
    assert teacher_start(str(pretrained)).arguments == ("--init", str(pretrained))
    assert teacher_start(str(pretrained)).name == "mn01"
    spoken = [teacher_start(given).teacher for given in ("mn04_own.pt", "mn10_as", "passt@w.pt", str(pretrained))]
    assert spoken == ["mn04@mn04_own.pt", "mn10@mn10_as", "passt@w.pt", str(pretrained)]
    for given, message in {
        "best.pt": r"Write NAME@best\.pt",
        "mn041.pt": "Write NAME@mn041",
        "mn04_gone.pt": "no such weights file: mn04_gone.pt",
        "mn04@gone.pt": "no such weights file: gone.pt",
        "mn20_as": "mn20_as are public weights",
    }.items():
        with pytest.raises(ValueError, match=message):
            teacher_start(given)


def test_every_setting_of_the_front_end_reaches_the_student() -> None:
    """What is not the student's default is passed on, as options that kd finetune reads."""
    for student in ("mn01", "mergenet16"):
        default = family_of(student).published_frontend()
        assert arms.frontend_options(default, default) == ()
        wanted = replace(
            default, n_mels=64, fmin_hz=20.0, remove_mean=not default.remove_mean, logarithm="db", sample_rate_hz=44100
        )
        options = [str(word) for word in arms.frontend_options(wanted, default)]
        given = ["--task", "folder", "--data", "sounds", "--student", student, *options]
        assert finetune.configure(given).frontend == wanted
        words = ["--data", "sounds", "--teacher-weights", "w.pt", "--student", student, *options]
        assert script.configure(words).frontend == wanted


def test_a_dry_run_writes_nothing(
    make_task_folder: Make, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data, out = few_labels(make_task_folder("folder"), 2), tmp_path / "run"
    assert main(arguments(data, out, pretrained, "--dry-run")) == 0
    shown = capsys.readouterr().out
    lines = [line.split()[:6] for line in shown.splitlines() if line.startswith(("fold", "use"))]
    assert lines == [
        ["fold1", "2", "6", "2", "2", "2"],
        ["fold2", "2", "6", "2", "2", "2"],
        ["use", "4", "6", "0", "2", "1"],
    ]
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nowhere"], "no such folder or file: nowhere"),
        (["--labels-per-class", "0"], "labels_per_class must be at least 1"),
        (["--labels-per-class", "9"], "--labels-per-class 9: class 'fan' has"),
        (["--label-weight", "1"], "label_weight must be at least 0 and below 1"),
        (["--unlabelled", "nowhere"], "nowhere is not a folder"),
        (["--teacher-weights", "best.pt"], "no such weights file: best.pt"),
        (["--student", "mn99"], "unknown student 'mn99'"),
    ],
)
def test_mistakes_get_one_message(
    more: list[str],
    message: str,
    make_task_folder: Make,
    pretrained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    data = make_task_folder("folder")
    try:
        code = script.main([*arguments(data, tmp_path / "run", pretrained), *more])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
