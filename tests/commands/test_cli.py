"""The `kd` command and the scripts behind it."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import kd.finetune
from audio_datasets.command_line.help_pages import options_of
from kd.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"kd {command}" in capsys.readouterr().out


def defaults_shown(arguments: list[str], capsys: pytest.CaptureFixture) -> dict[str, str]:
    """What a help page shows as the default of each option."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    blocks = re.split(r"\n\n|\n(?=  --)", capsys.readouterr().out)
    options = [" ".join(block.split()) for block in blocks if block.startswith("  --")]
    return {option.split()[0].rstrip(","): re.findall(r"\(default: ([^()]*)\)$|$", option)[0] for option in options}


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (["--task", "folder", "--weights", "w.pt"], {"--learning-rate": "0.0001", "--batch-size": "16"}),
        (["--task", "folder"], {"--learning-rate": "0.001", "--batch-size": "16", "--out": "runs/folder"}),
        (["--task", "esc50", "--student", "dymn10", "--weights", "w.pt", "--epochs", "40"], {"--warmup-epochs": "5"}),
        (["--task", "esc50", "--student", "mergenet16"], {"--sample-rate-hz": "16000"}),
        (["--task", "fsd50k", "--recipe", "mergenet"], {"--short-clips": "repeat", "--epochs": "30"}),
    ],
)
def test_finetune_help_shows_the_defaults_of_the_task_and_the_student(
    start: list[str], expected: dict[str, str], capsys: pytest.CaptureFixture
) -> None:
    shown = defaults_shown(["finetune", *start, "--help-all"], capsys)
    assert expected.items() <= shown.items()
    config = kd.finetune.configure([*start, "--data", "somewhere"])
    for option in options_of(type(config), config):
        is_number = isinstance(option.default, int | float) and not isinstance(option.default, bool)
        if is_number and option.name != "clip_seconds":  # the task's, which is filled in later
            assert shown[option.flag] == f"{option.default:g}", option.flag


def test_finetune_help_shows_the_main_options_only(
    capsys: pytest.CaptureFixture,
) -> None:
    main_options = defaults_shown(["finetune", "--task", "esc50", "--help"], capsys)
    every_option = defaults_shown(["finetune", "--task", "esc50", "--help-all"], capsys)
    assert main_options["--clip-seconds"] == "5"
    assert {"--task", "--data", "--out", "--epochs"} < main_options.keys() < every_option.keys()
    assert len(main_options) < 25 < 90 < len(every_option)


def test_pretrain_help_shows_the_recipe_and_the_phases_in_epochs(
    capsys: pytest.CaptureFixture,
) -> None:
    shown = defaults_shown(["pretrain", "--recipe", "dymn_m", "--help-all"], capsys)
    assert shown["--clips-per-epoch"] == "100000"
    assert [shown[f"--{name}"] for name in ("warmup-epochs", "ramp-down-start", "ramp-down-epochs")] == [
        "8",
        "80",
        "95",
    ]


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture) -> None:
    for flag in ("--version", "-V"):
        assert main([flag]) == 0
        assert capsys.readouterr().out == f"kd {version('audio-kd')}\n"


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [("tech", "teach"), ("finetun", "finetune"), ("evalute", "evaluate"), ("import_logits", "import-logits")],
)
def test_a_mistyped_command_is_answered_with_the_nearest_one(
    typed: str, nearest: str, capsys: pytest.CaptureFixture
) -> None:
    assert main([typed]) == 2
    assert capsys.readouterr().err.startswith(f"error: no such command: {typed}; did you mean kd {nearest}?\n")


def test_an_unknown_command_lists_the_choices(capsys: pytest.CaptureFixture) -> None:
    assert main(["xyz"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: no such command: xyz\n")
    assert all(name in shown for name in COMMANDS)
    assert main([]) == 2
    assert main(["--help"]) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_flag_is_exit_code_2(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--no-such-flag"])
    assert stopped.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "script",
    [
        "teacher_logits/precompute.py",
        "teacher_logits/verify.py",
        "kd/pretrain.py",
        "kd/finetune.py",
        "kd/evaluate.py",
        "kd/report.py",
        "kd/profile_students.py",
        "kd/inspect_student.py",
    ],
)
def test_scripts_run_by_path(script: str, environment: dict[str, str], tmp_path: Path) -> None:
    """From another folder, as `python path/to/script.py`: what the interpreter puts first on the path must not matter."""
    done = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--" in done.stdout
