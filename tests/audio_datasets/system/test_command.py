from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
import tyro
from torch import distributed
from torch.utils.data import DataLoader, Dataset

from audio_datasets.system.command import STOPPED, parse, run_command
from audio_datasets.system.stop_signals import Stopped


class Broken(Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        raise ValueError(f"clip {index} is empty\n  (see the list)")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_is_told_in_its_own_words(workers: int, capsys: pytest.CaptureFixture) -> None:
    assert run_command(lambda: list(DataLoader(Broken(), num_workers=workers))) == 2
    assert capsys.readouterr().err == "error: clip 0 is empty\n  (see the list)\n"


def test_our_own_bugs_keep_their_traceback() -> None:
    def bug() -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        run_command(bug)


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def missing() -> None:
        raise FileNotFoundError(2, "No such file or directory", "clips.h5")

    assert run_command(missing) == 2
    assert "clips.h5" in capsys.readouterr().err
    assert run_command(lambda: None) == 0
    assert run_command(lambda: 3) == 3
    monkeypatch.setenv("KD_TRACEBACK", "1")
    assert run_command(missing) == 2
    assert "Traceback" in capsys.readouterr().err


@dataclass(frozen=True)
class Settings:
    """Some settings."""

    clips: int = 3
    """How many clips."""

    def __post_init__(self) -> None:
        if self.clips < 1:
            raise ValueError(f"clips must be at least 1; found {self.clips}")


@pytest.mark.parametrize("wrong", [["--clips", "0"], ["--clips", "many"], ["--clisp", "1"]])
def test_wrong_arguments_are_explained(wrong: list[str], capsys: pytest.CaptureFixture) -> None:
    assert parse(Settings, ["--clips", "5"], "kd test").clips == 5
    with pytest.raises(SystemExit) as stopped:
        parse(Settings, wrong, "kd test")
    assert stopped.value.code == 2
    assert "clis" in capsys.readouterr().err.replace("clip", "clis")


@dataclass(frozen=True)
class Oven:
    """Settings with others inside."""

    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)
    top_heat: float | None = None
    seconds: float = 1.0


@pytest.mark.parametrize(("option", "value"), [("--top-heat", "inf"), ("--seconds", "nan"), ("--seconds", "-inf")])
def test_numbers_are_finite(option: str, value: str) -> None:
    """JSON has no word for others, and comparisons with nan are all false."""
    assert parse(Oven, ["--clips", "5", option, "2"], "kd test").settings.clips == 5
    with pytest.raises(ValueError, match=f"^{option} must be a finite number; found {value}$"):
        parse(Oven, [f"{option}={value}"], "kd test")


def test_a_refused_value_is_reported_in_one_line(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")  # the report is wrapped
    with pytest.raises(SystemExit):
        parse(Settings, ["--clips", "-1"], "kd test")
    assert capsys.readouterr().err == "error: clips must be at least 1; found -1\n"
    with pytest.raises(SystemExit):
        parse(Settings, ["--clips", "many"], "kd test")
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert "--clips" in shown
    assert "many" in shown
    assert "\n" not in shown[:-1]


def gloo_threads() -> list[str]:
    """Names of the threads that exchange tensors with other processes; Linux tells them."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def test_a_command_leaves_its_process_group(tmp_path: Path) -> None:
    """Also one that was stopped; a process that exits while the group's threads are at work may be aborted."""

    def enter(stopped: bool) -> None:
        distributed.init_process_group("gloo", init_method=f"file://{tmp_path / str(stopped)}", rank=0, world_size=1)
        held = distributed.group.WORLD  # as by a wrapped student, for as long as this frame lives
        assert held is not None
        if stopped:
            raise Stopped("now")

    for stopped, code in ((False, 0), (True, STOPPED)):
        assert run_command(lambda stopped=stopped: enter(stopped)) == code
        assert not distributed.is_initialized()
        assert gloo_threads() == []
