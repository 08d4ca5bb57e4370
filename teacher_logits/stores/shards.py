"""Unfinished work on a logit store: a folder beside it with finished shards and the plan that they follow.

A shard is a range of rows of the clip store. Each is written under a temporary name and renamed, so it is either complete or
absent, and a killed run continues with the missing shards. All shards together make up the store.
"""

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from audio_datasets.system.files import (
    digest_of,
    flush_folder,
    read_json,
    remove_asides,
    remove_path,
    write_json,
    written_aside,
)
from teacher_logits.computed_with import COMPUTED_WITH

PLAN_FILE = "plan.json"


def shard_rows(num_clips: int, shard_clips: int) -> list[range]:
    """The rows of every shard; the last one may be shorter."""
    return [range(start, min(start + shard_clips, num_clips)) for start in range(0, num_clips, shard_clips)]


def batches_of(rows: range, batch_size: int) -> list[range]:
    """The batches of a shard. No batch crosses a shard boundary, so batches are the same whichever process computes them."""
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


class ShardBatches(Sequence[range]):
    """The batches of several shards, concatenated and created on demand.

    A list would keep a Python object for every few clips in each data-loading worker.
    """

    def __init__(self, shards: Sequence[range], batch_size: int) -> None:
        self.shards = shards
        self.batch_size = batch_size
        self._first = np.cumsum([0, *(-(-len(shard) // batch_size) for shard in shards)])  # (shards + 1,)

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> range:
        index = range(len(self))[index]  # IndexError beyond the end
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        start = (index - int(self._first[shard])) * self.batch_size
        return self.shards[shard][start : start + self.batch_size]


class ShardFolder:
    """``<store>.partial/``: ``plan.json`` and one NumPy file, float16 (rows, classes), for each finished shard.

    A shard of k clips has ``views`` times k rows. Skipped clips have no rows; ``shard-….skipped.json`` beside the shard lists
    them with reasons.

    The plan contains everything that determines the shards' content, as JSON. Its digest is part of their names, so that even
    two runs at the same time cannot mix the work of two plans.
    """

    def __init__(
        self, store_path: Path, plan: dict[str, Any], shards: list[range], num_classes: int, views: int = 1
    ) -> None:
        self.store_path = store_path
        self.folder = store_path.with_name(f"{store_path.name}.partial")
        self.plan = json.loads(json.dumps(plan))  # as it is read back: lists for tuples
        self.shards = shards
        self.num_classes = num_classes
        self.views = views
        self._digest = digest_of(json.dumps(self.plan, sort_keys=True))[:12]

    def begin(self, restart: bool = False, computed_with: Mapping[str, str] | None = None) -> Any:
        """Creates the folder, or continues the work in it if that follows the same plan.

        ``computed_with`` is recorded in the plan and may differ. Returns what was recorded before; None for new work.

        Raises ValueError for work with another plan, unless ``restart`` allows discarding it.
        """
        remove_asides(self.folder)
        found, before = self._found_plan(), self._found().get(COMPUTED_WITH)
        if found == self.plan:
            if before != computed_with:
                self._write_plan(computed_with)
            return before
        if found is not None and not restart:
            raise ValueError(
                f"{self.folder} contains unfinished work with other settings: {_differences(found, self.plan)}. "
                "Use those settings to continue it, or --restart to discard it"
            )
        self.remove()
        self._write_plan(computed_with)
        return None

    def _write_plan(self, computed_with: Mapping[str, str] | None) -> None:
        more = {} if computed_with is None else {COMPUTED_WITH: dict(computed_with)}
        write_json(self.folder / PLAN_FILE, {**self.plan, **more})

    def unfinished(self) -> list[int]:
        """Numbers of the shards that are still to be computed."""
        return [index for index in range(len(self.shards)) if not self._path(index).exists()]

    def write(self, index: int, logits: np.ndarray, skipped: Mapping[str, str] | None = None) -> None:
        """Saves a finished shard, float16 (rows, C), without the skipped clips (reason by clip id)."""
        self._skipped_path(index).unlink(missing_ok=True)
        if skipped:
            write_json(self._skipped_path(index), dict(skipped))
        self._check(index, logits)
        content = io.BytesIO()
        np.save(content, logits)
        with written_aside(self._path(index)) as aside:
            # np.save into the file itself would not report why it could not write.
            aside.write_bytes(content.getbuffer())

    def skipped(self) -> dict[str, str]:
        """The skipped clips of finished shards: reason by clip id, in the order of the clips."""
        return {
            clip_id: reason
            for index in range(len(self.shards))
            if self._skipped_path(index).exists() and self._path(index).exists()
            for clip_id, reason in read_json(self._skipped_path(index)).items()
        }

    def blocks(self) -> Iterator[np.ndarray]:
        """The logits of all shards in order, float16 (rows, C) each."""
        for index in range(len(self.shards)):
            logits = self._read(index)
            self._check(index, logits)
            yield logits

    def publish(self, merged: Path) -> None:
        """Renames the merged file to the store's path and removes the folder."""
        os.replace(merged, self.store_path)
        flush_folder(self.store_path.parent)
        self.remove()

    def clean_up(self) -> None:
        """Removes what a run that was killed after ``publish`` left behind; keeps work with another plan."""
        if self._found_plan() in (None, self.plan):
            self.remove()

    def remove(self) -> None:
        """Removes the folder and all work in it."""
        if self.folder.exists():
            (self.folder / PLAN_FILE).unlink(missing_ok=True)
            remove_path(self.folder)

    def _found(self) -> dict[str, Any]:
        """The content of the plan's file; empty if there is none."""
        path = self.folder / PLAN_FILE
        content = read_json(path) if path.exists() else {}
        return content if isinstance(content, dict) else {"found": content}

    def _found_plan(self) -> dict[str, Any] | None:
        """The plan of the work that is there; None if there is none."""
        if not (self.folder / PLAN_FILE).exists():
            return None
        return {name: value for name, value in self._found().items() if name != COMPUTED_WITH}

    def _path(self, index: int) -> Path:
        return self.folder / f"shard-{index:06d}-{self._digest}.npy"

    def _read(self, index: int) -> np.ndarray:
        try:
            # Not np.load, which would read other content as a zip archive or a pickle, whatever the file is called.
            with open(self._path(index), "rb") as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(
                f"{self._path(index)} is damaged ({error}). Remove this file to have the shard recomputed"
            ) from error

    def _skipped_path(self, index: int) -> Path:
        return self._path(index).with_suffix(".skipped.json")

    def _check(self, index: int, logits: np.ndarray) -> None:
        skipped = len(read_json(self._skipped_path(index))) if self._skipped_path(index).exists() else 0
        expected = ((len(self.shards[index]) - skipped) * self.views, self.num_classes)
        if logits.dtype != np.float16 or logits.shape != expected:
            raise ValueError(
                f"{self._path(index)} must contain float16 {expected}; found {logits.dtype} {logits.shape}. "
                "Remove this file to have the shard recomputed"
            )


def _differences(found: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> str:
    """The settings in which two plans differ, for a message."""
    parts = []
    for key in sorted(found.keys() | wanted.keys()):
        old, new = found.get(key), wanted.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            parts.append(_differences(old, new, f"{prefix}{key}."))
        else:
            parts.append(f"{prefix}{key} was {old}, now {new}")
    return "; ".join(parts)
