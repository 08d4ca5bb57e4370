import hashlib
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from audio_datasets.system.forks import FORKS_MAY_HANG, THREADS, wait_until_threads_rest

needs_linux = pytest.mark.skipif(not THREADS.is_dir(), reason="processes are forked by default on Linux only")

FORKS = """
import ctypes, os, sys, time
from audio_datasets.system.forks import fork_when_threads_rest

fork_when_threads_rest()
libc = ctypes.CDLL(None)
enter_python = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(lambda argument: None)
for _ in range(1500):
    threads = [ctypes.c_ulong() for _ in range(4)]
    for thread in threads:
        libc.pthread_create(ctypes.byref(thread), None, enter_python, None)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    for thread in threads:
        libc.pthread_join(thread, None)
print("done")
"""


@needs_linux
def test_a_fork_waits_for_threads_at_work_but_not_for_ever() -> None:
    # One call, without Python's lock from its beginning to its end, for a second or more.
    work = ("sha256", b"password", b"salt", 3_000_000)
    thread = threading.Thread(target=hashlib.pbkdf2_hmac, args=work)
    thread.start()
    time.sleep(0.1)
    begun = time.monotonic()
    wait_until_threads_rest(longest_seconds=0.05)
    assert time.monotonic() - begun >= 0.05
    assert thread.is_alive()
    wait_until_threads_rest(longest_seconds=60)
    thread.join(timeout=1)
    assert not thread.is_alive()


@needs_linux
@pytest.mark.skipif(not FORKS_MAY_HANG, reason="no fork hangs from Python 3.11.10 on, with the wait or without it")
def test_no_fork_hangs_beside_threads_that_enter_python() -> None:
    """Without the wait, about one in two thousand does: half of the runs of this script on Python 3.11.7."""
    environment = {"PYTHONPATH": str(Path(__file__).parents[3] / "datasets")}
    done = subprocess.run([sys.executable, "-c", FORKS], env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
