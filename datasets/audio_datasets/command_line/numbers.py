"""How large the numbers on a command line may be.

Python reads "inf", "nan" and "1e308" as numbers, and whole numbers of any length. Each option checks what makes sense for it; here
is what makes sense for none, so that no command has to compute with it.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

LARGEST_FLOAT = 1e9
SMALLEST_FLOAT = 1e-30
"""Smaller ones, other than 0, become 0 or infinite in float32."""
LARGEST_WHOLE = 10**12
LARGEST = {
    "seed": 2**63 - 1,
    "seeds": 2**63 - 1,
    "seconds": 3_600,
    "hz": 1_000_000,
    "db": 200,
    "samples": 2**20,
    "n_fft": 2**20,
    "n_mels": 4_096,
    "num_classes": 10**6,
    "channels": 1_024,
    "batch_size": 2**16,
    "workers": 1_024,
    "threads": 1_024,
    "epochs": 10**6,
    "clips": 10**9,
    "views": 10**6,
}
"""By an option's name, or by how it ends: clip_seconds, eval_batch_size, label_seed."""


def check_numbers(config: Any) -> None:
    """Raises ValueError, naming the option, for a number that is not finite, or larger than any that makes sense."""
    for option, number in _numbers_in(config):
        shown = f"--{option.replace('_', '-')}"
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError(f"{shown} must be a finite number; found {number}")
        largest = _largest(option, number)
        if abs(number) > largest:
            found = f"{number:g}" if isinstance(number, float) else _brief(number)
            raise ValueError(f"{shown} must be at most {largest:,.0f}; found {found}")
        if isinstance(number, float) and 0 < abs(number) < SMALLEST_FLOAT:
            raise ValueError(f"{shown} must be 0, or at least {SMALLEST_FLOAT:g}; found {number:g}")


def _numbers_in(config: Any) -> Iterator[tuple[str, int | float]]:
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from _numbers_in(value)
            continue
        for entry in value if isinstance(value, tuple | list) else (value,):
            if isinstance(entry, int | float) and not isinstance(entry, bool):
                yield item.name, entry


def _largest(option: str, number: int | float) -> int | float:
    for name, largest in LARGEST.items():
        if option == name or option.endswith(f"_{name}"):
            return largest
    return LARGEST_FLOAT if isinstance(number, float) else LARGEST_WHOLE


def _brief(number: int) -> str:
    digits = int(number.bit_length() * math.log10(2)) + 1  # Python does not write out those of more than 4,300 digits
    return f"{number:,}" if digits <= 20 else f"a number of about {digits:,} digits"
