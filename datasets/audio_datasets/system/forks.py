"""Forking data-loading workers safely while other threads enter and leave Python.

Threads that exchange tensors with other processes enter Python briefly when they free sent tensors. A process that is forked at
that moment may hang in the fork, and its parent then waits forever (github.com/python/cpython/issues/112275; fixed in
Python 3.11.10 and in 3.12). This is rare in training: ``tests/robustness/soak.py --start command`` hit it once.
"""

import os
import sys
import threading
import time
from functools import cache
from pathlib import Path

FORKS_MAY_HANG = sys.version_info < (3, 11, 10)
LONGEST_WAIT_SECONDS = 0.5
"""A thread that runs for longer is not just finishing an exchange."""
THREADS = Path("/proc/self/task")
"""Linux's list of a process's threads. On other systems processes are not forked by default."""


@cache
def fork_when_threads_rest() -> None:
    """Makes this process fork only while none of its other threads is running. Only on Linux, and for Pythons with the bug."""
    if FORKS_MAY_HANG and THREADS.is_dir():
        os.register_at_fork(before=wait_until_threads_rest)


def wait_until_threads_rest(longest_seconds: float = LONGEST_WAIT_SECONDS) -> None:
    """Waits until all other threads sleep, at most ``longest_seconds``. Meanwhile they can acquire Python's lock."""
    end = time.monotonic() + longest_seconds
    while any_other_thread_runs() and time.monotonic() < end:
        time.sleep(0.0005)


def any_other_thread_runs() -> bool:
    """Whether any thread of this process except the caller is running or waiting for a core."""
    mine = str(threading.get_native_id())
    return any(thread.name != mine and _state(thread) == "R" for thread in THREADS.iterdir())


def _state(thread: Path) -> str:
    """Linux's letter for the state of a thread: R for running, S for sleeping; X for a thread that has ended."""
    try:
        return (thread / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "X"
