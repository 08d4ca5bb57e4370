"""What a recipe of fine-tuning takes from the student's family, and what is said where the family has nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest

from audio_datasets.tasks.catalog import get_task, list_tasks
from kd.finetune import configure, main
from kd.recipes.finetuning import unpublished_settings
from students.catalog import list_families


def test_the_tasks_that_families_have_settings_for_exist() -> None:
    for family in list_families().values():
        assert set(family.fine_tuning) <= set(list_tasks())


@pytest.mark.parametrize(
    ("task", "student", "expected"),
    [
        ("esc50", "mn04", (6e-5, 128)),
        ("fsd50k", "mn10", (7e-5, 64)),
        ("openmic", "mn10", (1e-5, 64)),
        ("dcase20", "mn10", (8e-4, 64)),
        ("folder", "mn10", (1e-4, 16)),
        ("manifest", "dymn10", (1e-4, 16)),
        ("esc50", "dymn04", (4e-5, 64)),
        ("fsd50k", "dymn_m", (4e-5, 32)),
        ("openmic", "dymn10", (2e-5, 32)),
        ("dcase20", "dymn10", (3e-4, 32)),
        ("esc50", "mergenet32", (6e-5, 128)),
    ],
)
def test_a_trained_student_gets_its_familys_settings(task: str, student: str, expected: tuple[float, int]) -> None:
    config = configure(["--task", task, "--student", student, "--weights", "w.pt", "--data", "x", "--out", "y"])
    assert (config.optimizer.learning_rate, config.loop.batch_size) == expected


def test_settings_that_were_not_published_for_a_student_are_named() -> None:
    def told(line: str) -> list[str]:
        config = configure([*line.split(), "--data", "x", "--out", "y"])
        return unpublished_settings(config, get_task(config.task))

    pretrained = "--task esc50 --weights w.pt --student"
    assert told(f"{pretrained} mergenet32") == [
        "no batch size is known for mergenet32 on esc50: using 128, as for MN",
        "no learning rate is known for mergenet32 on esc50: using 6e-05, as for MN",
    ]
    assert told(f"{pretrained} passt_s --batch-size 12") == [
        "no learning rate is known for passt_s on esc50: using 6e-05, as for MN"
    ]
    assert told("--task folder --student mergenet32") == [
        "no batch size is known for mergenet32 on folder: using 16, as for MN"
    ]
    assert told(f"{pretrained} mergenet32 --learning-rate 1e-5 --batch-size 12") == []
    assert told(f"{pretrained} mergenet32 --recipe mergenet") == []
    assert told(f"{pretrained} mn04") == told(f"{pretrained} dymn_s") == []


def test_what_was_not_published_is_said_aloud(
    make_task_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    small = ["--student", "passt_tiny", "--student-options", "width=64", "depth=1", "heads=1"]
    data = make_task_folder("folder")
    short = ["--epochs", "1", "--workers", "0", "--clip-seconds", "0.4", "--eval-batch-size", "4", "--no-report"]
    assert main(["--task", "folder", "--data", str(data), "--out", str(tmp_path / "run"), *short, *small]) == 0
    assert "no batch size is known for passt_tiny on folder: using 16, as for MN" in capsys.readouterr().out
