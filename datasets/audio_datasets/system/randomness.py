"""Counter-based random numbers: every draw is recreated from its key alone.

A generator is keyed by (seed, purpose, epoch, position), never advanced from one use to the next. A resumed run, another
number of worker processes and a single clip looked at alone therefore all see the same numbers.
"""

import hashlib

import numpy as np


def purpose_code(purpose: str) -> int:
    """64-bit code of a purpose such as ``"mixup"``; the same on every machine and in every Python process."""
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")


def generator(seed: int, purpose: str, epoch: int = 0, position: int = 0) -> np.random.Generator:
    """Philox generator for one use: ``seed`` and ``purpose`` form the key, ``epoch`` and ``position`` the counter.

    Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) counts in the lowest of its four 64-bit
    counter words, so streams with different epochs or positions never overlap.

    Raises ValueError for a negative number.
    """
    if min(seed, epoch, position) < 0:
        raise ValueError(f"seed, epoch and position must not be negative; found {seed}, {epoch}, {position}")
    return np.random.Generator(np.random.Philox(key=[seed, purpose_code(purpose)], counter=[0, position, epoch, 0]))
