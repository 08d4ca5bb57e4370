"""Locks: one holder, named in the message; free when it is gone, whatever its children do."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from audio_datasets.system import locks
from audio_datasets.system.locks import Owner, locked

HOLDER = """
import os, sys, time
from pathlib import Path
from audio_datasets.system.locks import locked
with locked(Path(sys.argv[1]), "it"):
    if not os.fork():  # as a data loader's worker, which outlives a parent that is killed
        print(os.getpid(), flush=True)  # says that it has let go of the lock
    time.sleep(60)
"""


def test_the_second_is_told_who_the_first_is(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "run.lock"
    with locked(path, "runs/a"):
        expected = rf"runs/a is in use by process {os.getpid()} on .* since 20"
        with pytest.raises(ValueError, match=expected), locked(path, "runs/a"):
            pass
        assert path.exists()
    assert not path.exists()
    with locked(path, "runs/a"):
        pass


def test_a_killed_owner_holds_nothing_although_its_child_lives(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(ValueError, match=f"process {holder.pid} on"), locked(path, "it"):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        os.kill(child, 0)  # lives
        with locked(path, "it"):
            assert json.loads(path.read_text())["pid"] == os.getpid()
    finally:
        os.kill(child, signal.SIGKILL)


def test_of_many_at_once_one_gets_in(tmp_path: Path) -> None:
    """They open, lock, release and remove the file in turn; two inside at once would see each other's mark."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom audio_datasets.system.locks import locked\nfolder, entered = Path(sys.argv[1]), 0\n"
        "while entered < 40:\n"
        "    try:\n"
        "        with locked(folder / 'lock', 'it'):\n"
        "            (folder / 'inside').mkdir()\n            (folder / 'inside').rmdir()\n            entered += 1\n"
        "    except ValueError:\n        pass\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("no_flock")
def test_without_flock_a_stale_lock_is_known_by_its_process(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with locked(path, "it"), pytest.raises(ValueError, match=f"process {os.getpid()} on"), locked(path, "it"):
        pass
    assert not any(tmp_path.iterdir())

    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    us = Owner.this_process()
    stale = {"ended": replace(us, pid=ended.pid), "another process by now": replace(us, process_start="boot 1")}
    for owner in stale.values():
        path.write_text(json.dumps(asdict(owner)))
        with locked(path, "it"):
            assert json.loads(path.read_text())["process_start"] == us.process_start
    for elsewhere in (replace(us, host="elsewhere"), replace(us, container="pid:[1]", command="kd elsewhere")):
        path.write_text(json.dumps(asdict(replace(elsewhere, pid=ended.pid))))
        with pytest.raises(ValueError, match="elsewhere"), locked(path, "it"):
            pass
        assert path.exists()


def test_an_owner_is_gone_when_its_process_is(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    time.sleep(0.01)
    us = Owner.this_process()
    assert not us.is_gone()
    process.kill()
    process.wait()
    assert replace(us, pid=process.pid).is_gone()


def test_waiting_for_a_lock(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "WAIT_SECONDS", 0.0)
    path = tmp_path / "lock"
    waited = []
    with ExitStack() as stack:
        stack.enter_context(locked(path, "the cache"))

        def while_busy() -> None:
            waited.append(None)
            if len(waited) == 3:
                stack.close()

        with locked(path, "the cache", while_busy):
            assert len(waited) == 3
    assert capsys.readouterr().err.count("waiting: the cache is in use by process") == 1
    with locked(path, "the cache"), pytest.raises(ZeroDivisionError), locked(path, "the cache", lambda: 1 / 0):
        pass
