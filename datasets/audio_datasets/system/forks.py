"""Starting data loaders beside threads that come and go in Python.

The threads that exchange tensors with other processes enter Python for a moment when they free what they sent. A process that
is forked in that moment may never get out of the fork, and its parent waits for it for ever
(github.com/python/cpython/issues/112275; fixed in Python 3.11.10 and in 3.12). Rare in training:
``tests/robustness/soak.py --start command`` met it once.
"""

import os
import sys
import threading
import time
from functools import cache
from pathlib import Path

FORKS_MAY_HANG = sys.version_info < (3, 11, 10)
LONGEST_WAIT_SECONDS = 0.5
"""A thread that computes for longer is not one that just leaves an exchange."""
THREADS = Path("/proc/self/task")
"""Where Linux tells of a process's threads; elsewhere processes are not forked by default."""


@cache
def fork_when_threads_rest() -> None:
    """From now on this process forks when no other thread of it is at work; on Linux, and where Python has the fault."""
    if FORKS_MAY_HANG and THREADS.is_dir():
        os.register_at_fork(before=wait_until_threads_rest)


def wait_until_threads_rest(longest_seconds: float = LONGEST_WAIT_SECONDS) -> None:
    """Returns when all other threads sleep, or after so long. Meanwhile they can have Python's lock."""
    end = time.monotonic() + longest_seconds
    while any_other_thread_runs() and time.monotonic() < end:
        time.sleep(0.0005)


def any_other_thread_runs() -> bool:
    """Whether a thread of this process other than the caller computes, or waits for a core to compute on."""
    mine = str(threading.get_native_id())
    return any(thread.name != mine and _state(thread) == "R" for thread in THREADS.iterdir())


def _state(thread: Path) -> str:
    """Linux's letter: R for running, S for sleeping; X for a thread that has ended meanwhile."""
    try:
        return (thread / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "X"
