"""Files that are complete or absent: what processes leave when they are killed, and what errors of the disk name."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from audio_datasets.system.files import ASIDE, folder_written_aside, remove_asides, write_text, written_aside

KILLED = """
import os, signal, sys
from pathlib import Path
from audio_datasets.system.files import written_aside
with written_aside(Path(sys.argv[1])) as aside:
    aside.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def asides(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if ASIDE.fullmatch(path.name)]


def test_the_next_process_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", KILLED, path], env=environment).returncode == -9
    assert [left.read_text() for left in asides(tmp_path)] == ["half"]
    assert path.read_text() == "old"
    write_text(path, "new")
    assert asides(tmp_path) == []
    assert path.read_text() == "new"


def test_what_another_process_is_writing_stays(tmp_path: Path) -> None:
    """So do temporary files of other names, and files that only look like ours."""
    names = (".a.txt.0123456789ab.tmp", ".b.txt.0123456789ab.tmp", ".a.txt.more.0123456789ab.tmp", ".a.txt.mine.tmp")
    for name in names:
        (tmp_path / name).write_text("half")
    with open(tmp_path / names[0], "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_text(tmp_path / "a.txt", "new")
        assert {path.name for path in tmp_path.iterdir()} == {*names, "a.txt"}
    write_text(tmp_path / "a.txt", "newer")
    assert {path.name for path in tmp_path.iterdir()} == {*names[1:], "a.txt"}


def test_temporary_names_do_not_depend_on_the_process_id(tmp_path: Path) -> None:
    """Two containers that share a folder may have processes of the same id."""
    path = tmp_path / "clips.h5"
    with written_aside(path) as first:
        first.write_text("first")
        with written_aside(path) as second:
            assert first != second
            second.write_text("second")
        assert path.read_text() == "second"
        assert first.read_text() == "first"
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("named", [None, "the temporary file"])
def test_an_error_names_the_file_that_was_to_be_written(named: str | None, tmp_path: Path) -> None:
    path = tmp_path / "clips.h5"
    with pytest.raises(OSError, match="Input/output error") as raised, written_aside(path) as aside:
        raise OSError(errno.EIO, "Input/output error", *([] if named is None else [str(aside)]))
    assert raised.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_replaces_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "export"
    for content in ("old", "new"):
        (tmp_path / ".export.0123456789ab.tmp").mkdir()
        (tmp_path / ".export.0123456789ab.tmp" / "half").touch()
        with folder_written_aside(path) as aside:
            (aside / content).touch()
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_the_leftovers_of_a_folder(tmp_path: Path) -> None:
    for name in (".a.h5.0123456789ab.tmp", ".a.h5.4711.tmp", ".mine.tmp", "a.h5"):
        (tmp_path / name).touch()
    remove_asides(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".mine.tmp", "a.h5"}
