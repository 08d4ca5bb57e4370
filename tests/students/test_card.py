"""Saved students come back as they were; damaged folders are refused."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from students import create_student
from students.card import load_student, read_card, save_student
from students.frontend import LogMelConfig
from students.weights import weights_fingerprint

CLASSES = ["rain", "dog", "crow"]


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return weights_fingerprint(one) == weights_fingerprint(other)


def test_the_card_can_be_read_alone(tmp_path: Path) -> None:
    student = create_student("mn01", num_classes=3, strides=(2, 2, 2, 1), n_mels=64)
    save_student(tmp_path / "run", student, CLASSES, LogMelConfig(n_mels=64), {"teacher": "Ünïcode"})
    card = read_card(tmp_path / "run")
    assert card == load_student(tmp_path / "run").card
    assert card.config == student.config
    assert card.config.options["strides"] == [2, 2, 2, 1]
    assert card.provenance == {"teacher": "Ünïcode"}
    content = json.loads((tmp_path / "run" / "student.json").read_text(encoding="utf-8"))
    assert (content["format"], content["version"]) == ("kd-student", 1)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["student.json", "student.safetensors"]


def test_a_loaded_student_is_one_object_in_evaluation_mode(tmp_path: Path) -> None:
    student = create_student("mn01", num_classes=3).train()
    assert student.card is None
    save_student(tmp_path, student, CLASSES, LogMelConfig(), {"steps": 7})
    loaded = load_student(tmp_path)
    assert not any(module.training for module in loaded.modules())
    assert loaded.card.class_names == tuple(CLASSES)
    assert loaded.card.provenance == {"steps": 7}
    mel = torch.randn(2, 1, 128, 50)
    torch.testing.assert_close(loaded(mel).logits, student.eval()(mel).logits)


def test_a_card_that_asks_for_what_its_weights_are_not_takes_no_memory(tmp_path: Path) -> None:
    save_student(tmp_path, create_student("mn01", num_classes=3), CLASSES, LogMelConfig())
    good = (tmp_path / "student.json").read_text(encoding="utf-8")
    for old, new, message in (
        ('"width": 0.1', '"width": 20000.0', "does not contain the weights of mn01"),
        ('"width": 0.1', '"width": 1e300', "student.json"),
        ('"n_mels": 128', '"n_mels": 64', "takes 64 mel bands, but its front end makes 128"),
    ):
        (tmp_path / "student.json").write_text(good.replace(old, new, 1), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            load_student(tmp_path)


def test_saving_needs_a_name_for_every_class(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected 3, found 2"):
        save_student(tmp_path, create_student("mn01", num_classes=3), CLASSES[:2], LogMelConfig())


def test_the_same_student_gives_the_same_files(tmp_path: Path) -> None:
    student = create_student("mn01", num_classes=3)
    for folder in ("one", "two"):
        save_student(tmp_path / folder, student, CLASSES, LogMelConfig())
    for name in ("student.json", "student.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_failed_save_leaves_the_old_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = create_student("mn01", num_classes=3)
    save_student(tmp_path, old, CLASSES, LogMelConfig())

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_student(tmp_path, create_student("mn01", num_classes=3), CLASSES, LogMelConfig())
    assert same_weights(load_student(tmp_path), old)
    assert len(list(tmp_path.iterdir())) == 2


def test_weights_that_the_card_was_not_written_for_are_refused(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        save_student(tmp_path / folder, create_student("mn01", num_classes=3), CLASSES, LogMelConfig())
    os.replace(tmp_path / "one" / "student.safetensors", tmp_path / "two" / "student.safetensors")
    with pytest.raises(ValueError, match="do not belong together"):
        load_student(tmp_path / "two")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "does not describe a student"),
        ({"version": 2}, "has format version 2; only 1 can be read"),
        ({"class_names": ["a"]}, "has 1 class names for 3 outputs"),
        ({"student": {"name": "mn99", "num_classes": 3, "options": {}}}, "unknown student 'mn99'"),
        ({"student": {"name": "mn02", "num_classes": 3, "options": {}}}, "it fits mn01 with 3 classes"),
        ({"student": {"title": "mn01"}}, "incomplete or damaged"),
        ({"frontend": {"hop": 3}}, "unknown front-end setting hop"),
        ({"frontend": None}, "incomplete or damaged"),
    ],
)
def test_a_damaged_card_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    save_student(tmp_path, create_student("mn01", num_classes=3), CLASSES, LogMelConfig())
    path = tmp_path / "student.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_student(tmp_path)


def test_a_folder_without_a_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"contains no student: there is no student\.json"):
        load_student(tmp_path / "nowhere")
    (tmp_path / "student.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_student(tmp_path)
    (tmp_path / "student.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="does not describe a student"):
        load_student(tmp_path)
