"""What a benchmark ran on, for the first line of its output."""

import os
import platform
from pathlib import Path


def processor_name() -> str:
    """The processor's model name where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine() -> str:
    """Processor and number of cores."""
    return f"{processor_name()}, {os.cpu_count()} cores"
