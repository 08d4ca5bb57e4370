"""Metrics of a run: ``metrics.jsonl`` (one JSON object a line) and any tracker that Accelerate knows.

``metrics.jsonl`` holds nothing that depends on the clock, so that a run that was killed and resumed ends with the same
file as one that was not; rates go to the progress bar and to the trackers.
"""

import json
import math
import os
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from audio_datasets.system.files import digest_of, finite_values, flush_folder
from audio_datasets.system.messages import brief


class MetricsLog:
    """Appends records on the main process; the other processes' calls do nothing."""

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path = path
        self.accelerator = accelerator
        self.last_loss = math.nan
        """The mean loss of the last training record of this process's log, for the progress bar."""

    def write(self, kind: str, step: int, epoch: int, values: dict[str, float], untracked: dict | None = None) -> None:
        """One record; ``values`` also go to the trackers as ``kind/name``, ``untracked`` to the file only."""
        if kind == "train":
            self.last_loss = values.get("loss", math.nan)
        if self.accelerator.is_main_process:
            record = {"kind": kind, "step": step, "epoch": epoch, **values, **(untracked or {})}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(finite_values(record), allow_nan=False) + "\n")
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

    def digest(self, size: int | None = None) -> str:
        """32 hexadecimal digits over the first ``size`` bytes, or all; stored in a checkpoint besides the size."""
        content = self.path.read_bytes() if self.path.exists() else b""
        return digest_of(content[:size])

    def cut_back(self, size: int, digest: str | None = None) -> None:
        """Drops what was logged after the checkpoint that the run goes on from.

        Raises ValueError if what was logged before is not what it was: it is part of the result, and early stopping reads it.
        """
        if not self.accelerator.is_main_process:
            return
        found = self.size()
        if digest is not None and found >= size and self.digest(size) != digest:
            raise ValueError(
                f"{self.path} was changed: its first {size} bytes are not those of when the checkpoint was taken"
            )
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
    """Records of a ``metrics.jsonl``, of one kind if given. ValueError, with the path, for a damaged file."""
    try:
        with open(path, encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
        for record in records:
            if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
                raise ValueError(f"a record is a JSON object with its kind; found {brief(record)}")
            if any(type(record.get(name)) is not int or not 0 <= record[name] < 2**53 for name in ("step", "epoch")):
                raise ValueError(f"a record has the step and the epoch, from 0 on; found {brief(record)}")
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is damaged, or being written to: {error}") from error
    return [record for record in records if kind is None or record["kind"] == kind]
