"""Windows of a long MP3: one pass over the clip, against decoding each window from the start of the file.

    python benchmarks/long_clips.py

Prints CPU seconds by length. The first grows with the length, the second with its square.
"""

import time

import numpy as np

from audio_datasets.audio.codec import OpenClip, decode, encode

RATE_HZ = 32000
WINDOW_SECONDS = 10.0
TIMED_WINDOWS = 6


def measure(minutes: int) -> tuple[int, float, float]:
    """The number of windows, and CPU seconds of both ways for all of them; the slow way is extrapolated from some."""
    minute = 0.1 * np.random.default_rng(0).standard_normal(60 * RATE_HZ)
    data = encode(np.tile(minute.astype(np.float32), minutes), RATE_HZ, "mp3")
    starts = np.arange(0, 60.0 * minutes, WINDOW_SECONDS).tolist()

    clip, begin = OpenClip(), time.process_time()
    for start in starts:
        clip.part(0, lambda: data, RATE_HZ, start, WINDOW_SECONDS)
    one_pass = time.process_time() - begin

    some, begin = starts[:: len(starts) // TIMED_WINDOWS], time.process_time()
    for start in some:
        decode(data, RATE_HZ, start, WINDOW_SECONDS)
    return len(starts), one_pass, (time.process_time() - begin) / len(some) * len(starts)


if __name__ == "__main__":
    for minutes in (5, 10, 20):
        windows, one_pass, each = measure(minutes)
        print(
            f"{minutes} min, {windows} windows: one pass {one_pass:.1f} s, each from the start {each:.1f} s", flush=True
        )
