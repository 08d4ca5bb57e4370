"""The student of one file that docs/students.md shows, through the commands: train, fine-tune, teach, profile."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kd import finetune, pretrain, profile_students
from students.card import load_student
from teacher_logits import precompute
from teacher_logits.store import LogitStore

MODULE = "commands_outside_toy"
TOY = f"{MODULE}:Toy"

DOCS = Path(__file__).parents[2] / "docs" / "students.md"


def documented_student() -> str:
    """The example of docs/students.md."""
    example = DOCS.read_text(encoding="utf-8").partition("# my_toy.py\n")[2]
    return example.partition("```")[0]


def test_it_goes_through_every_stage(
    tiny_store: Path,
    make_task_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / f"{MODULE}.py").write_text(documented_student())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    student = ["--student", TOY, "--student-options", "channels=4"]

    short = ["--epochs", "1", "--batch-size", "2", "--clip-seconds", "0.4", "--workers", "0"]
    assert pretrain.main(["--clips", str(tiny_store), "--out", "run", "--label-weight", "1", *short, *student]) == 0
    trained = load_student("run")
    card = trained.card
    assert (card.config.name, card.config.options) == (TOY, {"channels": 4})
    assert trained.features[1].num_batches_tracked == 6

    data = str(make_task_folder("folder"))
    options = ["--init", "run", "--student", TOY, "--out", "tuned", "--no-report", *short]
    assert finetune.main(["--task", "folder", "--data", data, *options]) == 0
    assert load_student("tuned").card.config.options == {"channels": 4}

    clips = ["--clips", str(tiny_store), "--out", "logits", "--workers", "0"]
    assert precompute.main([*clips, "--teacher", "run"]) == 0
    assert LogitStore.open("logits/run.h5").class_names == card.class_names

    assert profile_students.main([*student, "--repeats", "0", "--out", "profile.json"]) == 0
    assert json.loads(Path("profile.json").read_text())["students"][0]["family"] == "Toy"

    capsys.readouterr()
    for wrong, message in (("no_such_module:Toy", "there is no module"), (f"{MODULE}:Other", "has no class 'Other'")):
        given = ["--clips", str(tiny_store), "--out", "other", "--label-weight", "1", *short, "--student", wrong]
        assert pretrain.main(given) == 2
        assert message in capsys.readouterr().err
