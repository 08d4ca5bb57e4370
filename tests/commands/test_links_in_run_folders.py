"""Nothing is written, emptied or removed through a symbolic link that lies where a command writes."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from audio_datasets.audio.bad_clips import ClipList
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.system.files import write_json, write_text
from audio_datasets.system.locks import locked
from kd.cli import main
from kd.run_folder.start import enter_run_folder
from students import create_student
from students.card import save_student
from students.frontend import LogMelConfig

DESCRIPTION = {"loop": {"batch_size": 4, "gradient_accumulation_steps": 1}, "seed": 0}


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Another run of the user, and a file, to which links lead."""
    folder = tmp_path / "mine"
    (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    for name in ("student.safetensors", "config.json", "notes.txt"):
        (folder / name).write_text(f"my {name}")
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    paths = (path for path in folder.rglob("*"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in paths}


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def commands(tmp_path: Path, store: Path) -> dict[str, tuple[object, ...]]:
    run = tmp_path / "run"
    return {
        "pretrain": ("pretrain", "--clips", store, "--label-weight", 1, "--out", run),
        "finetune": ("finetune", "--task", "folder", "--data", tmp_path / "sounds", "--out", run),
    }


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "run.lock", "config.json", "checkpoints", "fold1", "fold1/checkpoints"]
)
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
@pytest.mark.parametrize("more", [(), ("--restart",)])
def test_a_run_does_not_go_through_a_link(
    command: str, name: str, more: tuple[str, ...], tmp_path: Path, tiny_store: Path, mine: Path, capsys
) -> None:
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(mine if name in ("fold1", "checkpoints", "fold1/checkpoints") else mine / "notes.txt")
    before = contents(mine)
    error = refused(capsys, *commands(tmp_path, tiny_store)[command], *more)
    assert f"{link} is a symbolic link (to {link.readlink()}); nothing in {link.parent} is written or removed" in error
    assert contents(mine) == before
    assert link.is_symlink()


def test_restarting_does_not_remove_a_linked_run(tmp_path: Path, mine: Path) -> None:
    """A link that appears after the command's first check."""
    run = tmp_path / "run"
    write_json(run / "config.json", DESCRIPTION)
    (run / "fold1").symlink_to(mine)
    before = contents(mine)
    with pytest.raises(ValueError, match="fold1 is a symbolic link"):
        enter_run_folder(run, {**DESCRIPTION, "seed": 1}, changes_nothing=(), restart=True)
    assert contents(mine) == before


def test_the_run_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "scratch")
    assert enter_run_folder(tmp_path / "run", DESCRIPTION, changes_nothing=()).state == "new"
    assert (tmp_path / "scratch" / "config.json").is_file()


def test_pack_does_not_work_in_a_linked_folder(
    tmp_path: Path, mine: Path, make_task_folder: Callable[..., Path], capsys
) -> None:
    before = contents(mine)
    (tmp_path / "clips.h5.partial").symlink_to(mine)
    command = ("pack", make_task_folder("folder"), "--out", tmp_path / "clips.h5", "--workers", 1)
    assert "clips.h5.partial is a symbolic link" in refused(capsys, *command, "--restart")
    (tmp_path / "clips.h5.partial").unlink()
    (tmp_path / "clips.h5.lock").symlink_to(mine / "notes.txt")
    assert "clips.h5.lock is a symbolic link" in refused(capsys, *command)
    assert contents(mine) == before


def test_teach_does_not_work_in_a_linked_folder(tmp_path: Path, tiny_store: Path, mine: Path, capsys) -> None:
    before, out = contents(mine), tmp_path / "logits"
    class_names = ClipStore.open(tiny_store).class_names
    out.mkdir()
    save_student(tmp_path / "small", create_student("mn01", 3), class_names, LogMelConfig(), {"clip_seconds": 0.5})
    command = ("teach", "--clips", tiny_store, "--teacher", tmp_path / "small", "--out", out)
    for name, target in (("small.h5.partial", mine), ("small.h5.lock", mine / "notes.txt")):
        (out / name).symlink_to(target)
        assert f"{out / name} is a symbolic link" in refused(capsys, *command, "--restart")
        (out / name).unlink()
    assert contents(mine) == before


def test_lists_locks_and_temporary_files_are_not_written_through_links(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    link = tmp_path / "link.txt"
    link.symlink_to(mine)
    with pytest.raises(
        ValueError, match=r"link.txt is a symbolic link \(to .*mine.txt\), through which nothing is written"
    ):
        ClipList(link).add("a", "broken")
    with pytest.raises(ValueError, match="link.txt is a symbolic link"), locked(link, "it"):
        pass
    (tmp_path / f".new.txt.{os.getpid()}.tmp").symlink_to(mine)
    write_text(tmp_path / "new.txt", "new")
    assert (tmp_path / "new.txt").read_text() == "new"
    assert not (tmp_path / "new.txt").is_symlink()
    assert mine.read_text() == "mine"
