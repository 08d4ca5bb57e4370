"""What the files of a corpus held when `kd pack` read them: tells whether a store, or a finished shard, is still made from them.

Shapes: n clips.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from audio_datasets.pack_plan import LabelledClip
from audio_datasets.stores.waveform_rows import wav_of_row
from audio_datasets.system.command import progress
from audio_datasets.system.paths.contents import (
    DIGEST_BYTES,
    FileContents,
    State,
    content_of,
    is_settled,
    state_of,
)
from audio_datasets.tasks.listing import Clip


def sources_path(store_path: Path) -> Path:
    """``clips.h5`` -> ``clips.sources.npz``: what the files held, and the states by which unchanged files are known."""
    return store_path.with_suffix(".sources.npz")


def reader_of(clip: Clip) -> Callable[[Path], tuple[State, bytes, bool]]:
    """Reads what ``FileContents.take`` needs of a clip: of its file or, for a row, of the row's samples and the state of the file."""
    return content_of if clip.row is None else partial(_content_of_row, row=clip.row)


def _content_of_row(path: Path, row: int) -> tuple[State, bytes, bool]:
    state = state_of(os.stat(path))
    digest = hashlib.blake2b(wav_of_row(path, row), digest_size=DIGEST_BYTES).digest()
    return state, digest, is_settled(state, path)


def contents_now(clips: Sequence[LabelledClip], before: FileContents | None, shown: bool = False) -> FileContents:
    """What the clips' sources hold now. Those whose state is settled in ``before`` are not read."""
    found = FileContents.empty(len(clips))
    before = before if before is not None and len(before) == len(clips) else None
    bar = progress(clips, desc="comparing files", unit="clip", leave=False, delay=2, shown=shown)
    for index, labelled in enumerate(bar):
        found.take(index, labelled.path, before, reader_of(labelled.clip))
    return found


def as_json(contents: FileContents) -> list[list[Any]]:
    """For the report of a shard: state, digest and whether it is settled, for each clip."""
    return [
        [*state.tolist(), digest.tobytes().hex(), bool(settled)]
        for state, digest, settled in zip(contents.states, contents.digests, contents.settled, strict=True)
    ]


def from_json(entries: Sequence[Sequence[Any]]) -> FileContents:
    """The reverse of ``as_json``."""
    found = FileContents.empty(len(entries))
    for index, (*state, digest, settled) in enumerate(entries):
        found.states[index], found.settled[index] = state, settled
        found.digests[index] = np.frombuffer(bytes.fromhex(digest), np.uint8)
    return found


def joined(parts: Sequence[FileContents]) -> FileContents:
    """The contents of several lists of clips, one after the other."""
    return FileContents(*(np.concatenate([getattr(part, name) for part in parts]) for name in FileContents.NAMES))
