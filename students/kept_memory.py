"""Keeps memory that was freed, instead of giving it back to the kernel and asking for it again in each step.

By default glibc maps each block above 128 KiB to 32 MiB anew and unmaps it when it is freed. A network on a CPU allocates
and frees hundreds of such blocks per batch, and the kernel has to clear every page of them: freshly mapped memory was
written at 2.4 GB/s, kept memory at 37. Results do not change. Blocks of other sizes leave gaps, so the peak can grow by a tenth
(docs/results.md, "Freed memory").
"""

import ctypes
import os
import sys

OFF = "KD_KEEP_MEMORY"
"""Environment variable: 0 leaves the allocator as it is."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of ``mallopt`` (glibc's malloc.h)."""
NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Sets glibc's allocator to keep freed memory, for this process and those that it forks. Whether it is set.

    Without glibc (other systems, musl) nothing happens.
    """
    if os.environ.get(OFF) == "0" or not sys.platform.startswith("linux"):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - AttributeError if it is not glibc
        mallopt = library.mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
