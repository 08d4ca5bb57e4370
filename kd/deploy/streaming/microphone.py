"""Samples from a microphone, through sounddevice, which is an optional package."""

import sys
from collections.abc import Iterator
from queue import Empty, Full, Queue
from typing import Any

import numpy as np

QUEUE_SECONDS = 10.0
"""How much may wait before samples are lost."""
BLOCK_SECONDS = 0.1
_CHECK_SECONDS = 0.2


class Microphone:
    """Mono samples as they are recorded. Silence takes the place of samples that are lost, so that times stay right."""

    def __init__(self, device: str | None = None, sample_rate_hz: int | None = None) -> None:
        """
        Args:
            device: the number of a device, or a part of its name; the system's default if left out.
            sample_rate_hz: the device's own rate if left out.

        Raises:
            ValueError: sounddevice or PortAudio is missing, or there is no such device.
        """
        try:
            import sounddevice
        except ModuleNotFoundError as error:
            raise ValueError(f"recording needs sounddevice: pip install 'audio-kd[microphone]' ({error})") from error
        except OSError as error:
            raise ValueError(f"recording needs the library PortAudio (Debian: libportaudio2): {error}") from error
        self._sounddevice = sounddevice
        self._device = int(device) if device is not None and device.isdecimal() else device
        try:
            found = sounddevice.query_devices(self._device, "input")
        except (sounddevice.PortAudioError, ValueError) as error:
            raise ValueError(f"no microphone can be used: {error}") from error
        self.sample_rate_hz = sample_rate_hz or round(found["default_samplerate"])
        self._waiting: Queue = Queue(maxsize=round(QUEUE_SECONDS / BLOCK_SECONDS))
        self._lost_now = self.lost_samples = self.overflows = 0

    def chunks(self) -> Iterator[np.ndarray]:
        """float32 (any,), for ever: recording ends when the iterator is closed."""
        try:
            stream = self._sounddevice.InputStream(
                samplerate=self.sample_rate_hz,
                blocksize=round(BLOCK_SECONDS * self.sample_rate_hz),
                device=self._device,
                channels=1,
                dtype="float32",
                callback=self._arrive,
            )
            with stream:
                while stream.active or not self._waiting.empty():
                    try:
                        lost, samples = self._waiting.get(timeout=_CHECK_SECONDS)
                    except Empty:
                        continue
                    if lost:
                        self.lost_samples += lost
                        print(
                            f"lost {lost / self.sample_rate_hz:.1f} s: computing is too slow",
                            file=sys.stderr,
                            flush=True,
                        )
                        yield np.zeros(lost, np.float32)
                    yield samples
        except self._sounddevice.PortAudioError as error:
            raise ValueError(f"the microphone cannot be used: {error}") from error

    def remarks(self) -> list[str]:
        """What is to be said of the recording."""
        found, lost = [], self.lost_samples + self._lost_now  # the last may still wait for a block that follows them
        if lost:
            found.append(
                f"lost {lost:,} samples ({lost / self.sample_rate_hz:.1f} s), since computing was too slow; silence took "
                "the place of those before the end"
            )
        if self.overflows:
            found.append(f"the sound card lost samples {self.overflows:,} times; how many, it does not say")
        return found

    def _arrive(self, samples: np.ndarray, frames: int, time: Any, status: Any) -> None:
        """Called by PortAudio's thread, which must not wait."""
        if status.input_overflow:
            self.overflows += 1
        try:
            self._waiting.put_nowait((self._lost_now, samples[:, 0].copy()))
            self._lost_now = 0
        except Full:
            self._lost_now += frames
