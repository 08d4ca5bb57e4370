"""Freed memory is kept: measured in page faults, which do not depend on how busy the machine is."""

import os
import subprocess
import sys

import pytest

from students.kept_memory import keep_freed_memory

FAULTS = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from students.kept_memory import keep_freed_memory
import numpy as np
kept = keep_freed_memory()
def work():
    for _ in range(20):
        np.ones(6_000_000).sum()  # 48 MB, freed at once
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(root: str, **environment: str) -> tuple[bool, int]:
    words = [sys.executable, "-c", FAULTS, root]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **environment}, check=True)
    kept, count = map(int, done.stdout.split())
    return bool(kept), count


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_memory_is_not_taken_from_the_kernel_again_and_again(pytestconfig: pytest.Config) -> None:
    root = str(pytestconfig.rootpath)
    kept, few = faults(root)
    if not kept:
        pytest.skip("the C library is not glibc")
    off, many = faults(root, KD_KEEP_MEMORY="0", THP_MEM_ALLOC_ENABLE="0")
    assert not off
    assert few < 100
    assert many > 5 * few + 100  # 11,700 pages per array, or 23 huge ones


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KD_KEEP_MEMORY", "0")
    assert keep_freed_memory() is False
