"""What the last bits of a result depend on besides settings and data. It is recorded, and said once when work continues with another."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from audio_datasets.audio.codec import LIBSNDFILE_VERSION

COMPUTED_WITH = "computed_with"
"""The entry of ``config.json`` of a run, and of ``plan.json`` of an unfinished logit store."""
PACKAGES = ("torch", "torchaudio", "numpy")


def what_bits_depend_on(device: torch.device, more_packages: Sequence[str] = ()) -> dict[str, str]:
    """Device, threads, vector instructions and versions: with another of them, sums are taken in another order, or audio is decoded
    to slightly other samples."""
    on_cpu = device.type == "cpu"
    return {
        "device": platform.machine() if on_cpu else torch.cuda.get_device_name(device),
        "threads": str(torch.get_num_threads()) if on_cpu else "",
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        **{name: _version(name) for name in (*PACKAGES, *more_packages)},
        "libsndfile": LIBSNDFILE_VERSION,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def note_on_bits(before: Any, now: Mapping[str, str], what: str = "the run") -> list[str]:
    """A message if work continues with other threads, instructions or versions; nothing where there is no record of them."""
    if not isinstance(before, Mapping):
        return []
    changed = [f"{name} {before[name]} → {value}" for name, value in now.items() if before.get(name, value) != value]
    if not changed:
        return []
    return [f"{what} continues with {', '.join(changed)}: its last bits will differ from those of an uninterrupted run"]
