"""Weights by name: found in the folder of weights, or told where to get."""

import shutil
from pathlib import Path

import pytest
import torch

from kd.finetune import configure
from students import create_student, load_weights
from students.catalog import list_families, list_students
from students.public_weights import PUBLIC_WEIGHTS, find_weights


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KD_WEIGHTS_DIR", str(tmp_path))
    for name in ("mn10_as_mAP_471.pt", "mn10_as_hop_15_mAP_463.pt", "mn20_as.pt", "notes.txt", "own.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def test_a_name_finds_its_file(folder: Path) -> None:
    assert find_weights("mn10_as") == folder / "mn10_as_mAP_471.pt"
    assert find_weights("mn10_as_hop_15") == folder / "mn10_as_hop_15_mAP_463.pt"
    assert find_weights("mn20_as") == folder / "mn20_as.pt"
    assert find_weights("mn20_as.pt") == folder / "mn20_as.pt"
    assert find_weights("own") == folder / "own.safetensors"
    assert find_weights(folder / "notes.txt") == folder / "notes.txt"  # a path is taken as it is


def test_what_is_not_there_is_named_with_where_to_get_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"no such weights file: mn40_as_ext; .*github\.com/fschmid56/EfficientAT/releases"
    ):
        find_weights("mn40_as_ext")
    with pytest.raises(ValueError, match="no such weights file: mn99_as; .* public weights: mn04_as, mn05_as"):
        find_weights("mn99_as")
    with pytest.raises(ValueError, match="no such weights file: elsewhere/mn20_as.pt$"):
        find_weights("elsewhere/mn20_as.pt")
    (folder / "mn10_as.pt").write_bytes(b"another")
    with pytest.raises(ValueError, match="several files for the weights mn10_as: mn10_as.pt, mn10_as_mAP_471.pt"):
        find_weights("mn10_as")
    monkeypatch.delenv("KD_WEIGHTS_DIR")
    with pytest.raises(ValueError, match=r"KD_WEIGHTS_DIR is not set\. mn20_as are public weights \(MIT licence\)"):
        find_weights("mn20_as")


def test_a_file_that_is_not_the_published_one_is_refused(folder: Path) -> None:
    (folder / "mn04_as_mAP_432.pt").write_bytes(b"half a download")
    with pytest.raises(ValueError, match="is not the published mn04_as: its SHA-256 is"):
        find_weights("mn04_as")
    assert find_weights("mn04_as_mAP_432.pt") == folder / "mn04_as_mAP_432.pt"


def test_the_public_student_loads_by_its_name(reference_dir: Path, folder: Path) -> None:
    file = reference_dir / "data" / "checkpoints" / "mn04_as_mAP_432.pt"
    shutil.copy(file, folder)
    student = create_student("mn04", 527)
    load_weights(student, "mn04_as")
    expected = torch.load(file, weights_only=True)
    assert all(torch.equal(value, expected[name]) for name, value in student.state_dict().items())


def test_every_entry_names_a_student_of_ours() -> None:
    for name, known in PUBLIC_WEIGHTS.items():
        assert known.student in list_students() or known.student in list_families(), name


def test_public_weights_tell_the_student_to_fine_tune() -> None:
    line = "--task folder --data x --out y --weights"
    assert configure([*line.split(), "mn04_as"]).student == "mn04"
    assert configure([*line.split(), "dymn10_as"]).student == "dymn10"
    assert configure([*line.split(), "some/where/mn04_as_mAP_432.pt"]).student == "mn04"
    assert configure([*line.split(), "some.pt"]).student == "mn10"
    assert configure([*line.split(), "mn04_as", "--student", "mn05"]).student == "mn05"
