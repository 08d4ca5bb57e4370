"""Metrics of a run: ``metrics.jsonl`` (one JSON object per line) and any tracker that Accelerate supports.

``metrics.jsonl`` contains nothing that depends on the clock, so that a run that was killed and resumed ends with the same
file as an uninterrupted one. Rates go to the progress bar and to the trackers.
"""

import json
import math
import os
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from audio_datasets.system.files import digest_of, errors_of, finite_values, flush_folder
from audio_datasets.system.messages import brief
from audio_datasets.system.paths.inputs import open_regular
from audio_datasets.system.paths.outputs import no_link


class MetricsLog:
    """Appends records on the main process. On other processes, calls do nothing."""

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path = path
        self.accelerator = accelerator
        self.last_loss = math.nan
        """The mean loss of the last training record, for the progress bar."""

    def write(self, kind: str, step: int, epoch: int, values: dict[str, float], untracked: dict | None = None) -> None:
        """Writes one record. ``values`` also go to the trackers as ``kind/name``; ``untracked`` goes to the file only."""
        if kind == "train":
            self.last_loss = values.get("loss", math.nan)
        if self.accelerator.is_main_process:
            record = {"kind": kind, "step": step, "epoch": epoch, **values, **(untracked or {})}
            with errors_of(self.path), open(self.path, "a", encoding="utf-8", opener=no_link) as file:
                file.write(json.dumps(finite_values(record), allow_nan=False) + "\n")
        self.track(kind, step, values)

    def track(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Sends values to the trackers only. For values that depend on the clock."""
        self.accelerator.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def size(self) -> int:
        """Bytes written so far. Stored in checkpoints; on resuming, the file is truncated to this size."""
        return self.path.stat().st_size if self.path.exists() else 0

    def flush(self) -> None:
        """Makes the log survive a power cut. Called before the checkpoint that relies on it is written."""
        if self.accelerator.is_main_process and self.path.exists():
            with errors_of(self.path), open(self.path, "rb") as file:
                os.fsync(file.fileno())
            flush_folder(self.path.parent)

    def digest(self, size: int | None = None) -> str:
        """Digest of the first ``size`` bytes, or of all, as 32 hexadecimal digits. Stored in checkpoints along with the size."""
        content = self.path.read_bytes() if self.path.exists() else b""
        return digest_of(content[:size])

    def cut_back(self, size: int, digest: str | None = None) -> None:
        """Removes records that were logged after the checkpoint from which the run continues.

        Raises ValueError if earlier records have changed: they are part of the result, and early stopping reads them.
        """
        if not self.accelerator.is_main_process:
            return
        found = self.size()
        if digest is not None and found >= size and self.digest(size) != digest:
            raise ValueError(
                f"{self.path} was changed: its first {size} bytes are not the same as when the checkpoint was written"
            )
        if found < size:
            raise ValueError(
                f"{self.path} was changed: it has {found} bytes, but had {size} when the checkpoint was written"
            )
        if found > size:
            with errors_of(self.path), open(self.path, "r+b", opener=no_link) as file:
                file.truncate(size)


def check_trackers(names: tuple[str, ...]) -> None:
    """Raises ValueError for a tracker that is unknown or not installed (Accelerate would silently leave it out)."""
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in available:
            raise ValueError(
                f"tracker {name!r} is unknown or not installed; available here: {', '.join(available) or 'none'}"
            )


def read_metrics(path: Path, kind: str | None = None) -> list[dict]:
    """The records in a ``metrics.jsonl`` file, optionally of one kind only. ValueError, with the path, for a damaged file."""
    try:
        with errors_of(path), open_regular(path) as file:
            records = [json.loads(line) for line in file]
        for record in records:
            if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
                raise ValueError(f"a record must be a JSON object with a kind; found {brief(record)}")
            if any(type(record.get(name)) is not int or not 0 <= record[name] < 2**53 for name in ("step", "epoch")):
                raise ValueError(f"a record must have a step and an epoch, both at least 0; found {brief(record)}")
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is damaged, or being written to: {error}") from error
    return [record for record in records if kind is None or record["kind"] == kind]
