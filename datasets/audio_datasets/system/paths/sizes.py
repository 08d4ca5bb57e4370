"""How much memory an input may ask for. Files that are small outside and huge inside are refused before memory is taken.

A sparse file, a deflated archive or an array that was never written costs its author a few kilobytes and its reader any amount
of memory. So content may always take twice what its file takes on the disk, and beyond that ``LARGEST_VARIABLE`` in all.
"""

import math
import os
import zipfile
from pathlib import Path

LARGEST_VARIABLE = "KD_LARGEST_INPUT_GB"
"""Environment variable: how much one input may take in memory (10^9 bytes) if its file takes less than half of it on the disk."""
LARGEST_GB = 0.25
BLOCK_BYTES = 512  # the unit of st_blocks


def largest_bytes() -> int:
    """The bound in force. ValueError for a value of the variable that is not a positive number."""
    text = os.environ.get(LARGEST_VARIABLE, "")
    if not text.strip():
        return round(LARGEST_GB * 1e9)
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 0 < limit < 1e9:
        raise ValueError(f"{LARGEST_VARIABLE} must be a positive number of gigabytes; found {text!r}")
    return round(limit * 1e9)


def require_room(path: str | Path, needed_bytes: float, what: str) -> None:
    """Raises ValueError if ``what`` would take far more memory than ``path`` takes on the disk, and more than the bound."""
    allowed = largest_bytes()
    if needed_bytes <= allowed:
        return
    on_disk = _bytes_on_disk(path)
    if needed_bytes <= 2 * on_disk:
        return
    raise ValueError(
        f"{path}: {what} would take {needed_bytes / 1e9:,.1f} GB of memory, but the file takes {on_disk / 1e9:.3f} GB on the disk; "
        f"at most {allowed / 1e9:g} GB are allowed for such a file (if you trust it, set {LARGEST_VARIABLE}="
        f"{math.ceil(needed_bytes / 1e9)})"
    )


def require_room_for_archive(path: str | Path) -> None:
    """Raises ValueError if the members of a zip archive (.npz, .pt) would take too much memory. Other files are not looked at."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    require_room(path, size, "what the archive holds")


def _bytes_on_disk(path: str | Path) -> int:
    status = os.stat(path)
    blocks = getattr(status, "st_blocks", None)
    return status.st_size if blocks is None else min(status.st_size, blocks * BLOCK_BYTES)
