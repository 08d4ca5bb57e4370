"""Whole commands in tight places: little shared memory, few open files, and signals while workers load data.

    python -m pytest -n 0 tests/robustness/tight_places.py

Takes a minute, since every case starts Python anew. The short form is tests/commands/test_workers.py.
"""

# ruff: noqa: F811 (fixtures of the other file)
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND_TESTS = Path(__file__).parents[1] / "commands"
sys.path.insert(0, str(COMMAND_TESTS))
from test_workers import commands, place, results  # noqa: E402, F401

CROWDED = """
import os, resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_workers import commands
place, out = Path({place!r}), Path({out!r})
for name, (main, arguments) in commands(place, out / "small", 2).items():
    assert main(arguments) == 0, name
files = len(os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (files + 56, files + 56))
for name, (main, arguments) in commands(place, out / "few", 2).items():
    assert main(arguments) == 0, name
resource.setrlimit(resource.RLIMIT_NOFILE, (files + 20, files + 20))
for name, (main, arguments) in commands(place, out / "none", 2).items():
    assert main(arguments) == 2, name
"""


def test_little_shared_memory_and_few_open_files(place: Path, tmp_path: Path) -> None:
    """Batches go through pipes, with the same results; where workers cannot even start, the message says what they need."""
    private = ["unshare", "--user", "--map-root-user", "--mount"]
    small = "mount -t tmpfs -o size=1300k none /dev/shm"
    if not shutil.which("unshare") or subprocess.run([*private, "sh", "-c", small], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a small /dev/shm")
    program = CROWDED.format(tests=str(COMMAND_TESTS), place=str(place), out=str(tmp_path))
    done = subprocess.run(
        [*private, "sh", "-c", f'{small} && exec "$0" -c "$1"', sys.executable, program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert done.stderr.count("has no room for a batch; such batches go through a pipe") == 1  # not once a worker
    assert done.stderr.count("2 worker processes need about 32 open files, but this process may open only") == 3
    for name, (main, arguments) in commands(place, tmp_path / "roomy", 0).items():
        assert main(arguments) == 0, name
    assert results(tmp_path / "small") == results(tmp_path / "few") == results(tmp_path / "roomy")


# -- Signals to the main process ---------------------------------------------------------------------------------------


LONG = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from audio_datasets.stores.clip_store import ClipStore
from test_workers import commands
read = ClipStore.waveform
def slowly(self, row, *args, **options):
    print("worker", __import__("os").getpid(), flush=True)
    time.sleep({pause})
    return read(self, row, *args, **options)
ClipStore.waveform = slowly
main, arguments = commands(Path({place!r}), Path({out!r}), 2)[{command!r}]
sys.exit(main(arguments))
"""


def start(command: str, place: Path, out: Path, pause: float = 0.5) -> tuple[subprocess.Popen, set[int]]:
    """Starts a command in a group of its own and waits for its two workers, whose process ids it returns."""
    program = LONG.format(tests=str(COMMAND_TESTS), place=str(place), out=str(out), command=command, pause=pause)
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    workers = set()
    while len(workers) < 2:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        if line.startswith("worker "):
            workers.add(int(line.split()[1]))
    return process, workers


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("command", "number", "code"),
    [
        ("teach", signal.SIGHUP, 75),
        ("pretrain", signal.SIGQUIT, -signal.SIGQUIT),
        ("evaluate", signal.SIGALRM, -signal.SIGALRM),
        ("pretrain", signal.SIGINT, 130),
    ],
)
def test_no_worker_outlives_its_command(
    command: str, number: signal.Signals, code: int, place: Path, tmp_path: Path
) -> None:
    process, workers = start(command, place, tmp_path)
    for _ in range(10 if number == signal.SIGINT else 1):  # Ctrl-C, ten times, to the whole group
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        time.sleep(0.05)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == code, error
    assert "Traceback" not in error
    assert number != signal.SIGINT or error.endswith("interrupted\n")
    end = time.monotonic() + 60
    while any(map(alive, workers)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(alive, workers))
