"""Metrics of a run: ``metrics.jsonl`` (one JSON object a line) and any tracker that Accelerate knows.

``metrics.jsonl`` holds nothing that depends on the clock, so that a run that was killed and resumed ends with the same
file as one that was not; rates go to the progress bar and to the trackers.
"""

import json
import os
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from audio_datasets.files import flush_folder


class RunLog:
    """Appends records on the main process; the other processes' calls do nothing."""

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path = path
        self.accelerator = accelerator

    def write(self, kind: str, step: int, epoch: int, values: dict[str, float], untracked: dict | None = None) -> None:
        """One record; ``values`` also go to the trackers as ``kind/name``, ``untracked`` to the file only."""
        if self.accelerator.is_main_process:
            record = {"kind": kind, "step": step, "epoch": epoch, **values, **(untracked or {})}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        self.track(kind, step, values)

    def track(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Sends values to the trackers only (for what depends on the clock)."""
        self.accelerator.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def size(self) -> int:
        """Bytes written so far; stored in a checkpoint, to cut the file back to on resuming."""
        return self.path.stat().st_size if self.path.exists() else 0

    def flush(self) -> None:
        """Makes what was written survive a power cut; a checkpoint that counts on it comes after."""
        if self.accelerator.is_main_process and self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())
            flush_folder(self.path.parent)

    def cut_back(self, size: int) -> None:
        """Drops what was logged after the checkpoint that the run goes on from."""
        if not self.accelerator.is_main_process:
            return
        found = self.size()
        if found < size:
            raise ValueError(f"{self.path} has {found} bytes, but the checkpoint was taken at {size}: it was changed")
        if found > size:
            os.truncate(self.path, size)


def check_trackers(names: tuple[str, ...]) -> None:
    """ValueError for a tracker that is unknown or not installed (Accelerate itself would leave it out in silence)."""
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in available:
            raise ValueError(
                f"tracker {name!r} is unknown or not installed; available here: {', '.join(available) or 'none'}"
            )


def read_metrics(path: Path, kind: str | None = None) -> list[dict]:
    """Records of a ``metrics.jsonl``, of one kind if given."""
    with open(path, encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return [record for record in records if kind is None or record["kind"] == kind]
