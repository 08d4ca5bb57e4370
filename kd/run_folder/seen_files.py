"""``seen_files.npz``: what the audio files of a run held, and the states by which files are known that have not changed since.

A run that continues reads a file again only where its state is another one. The file is a saving of time and nothing else: without
it, or if it does not fit, all files are read.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from audio_datasets.system.paths.contents import FileContents
from audio_datasets.tasks.task import TaskClips
from teacher_logits.processes import on_main_process

SEEN_FILES = "seen_files.npz"


def take_down_contents(accelerator: Accelerator, sources: Iterable[object], folder: Path) -> list[TaskClips]:
    """Takes down what the files of each ``TaskClips`` hold, on the main process, for all processes. Returns these sources.

    Raises:
        ValueError: a file that is being written.
    """
    files = [source for source in sources if isinstance(source, TaskClips)]

    def read() -> list[FileContents]:
        path = folder / SEEN_FILES
        before = None if path.is_symlink() or not path.is_file() else FileContents.load(path)
        found = []
        for clips in files:
            found.append(clips.take_down_contents(before))
            before = None if before is None else before.part(len(found[-1]))
        return found

    for clips, contents in zip(files, on_main_process(accelerator, read) if files else [], strict=True):
        clips.know_contents(contents)
    return files


def remember_contents(files: Iterable[TaskClips], folder: Path) -> None:
    """Writes ``seen_files.npz`` into a run folder that was entered. Called by the main process."""
    contents = [clips.contents for clips in files]
    if contents:
        joined = (np.concatenate([getattr(one, name) for one in contents]) for name in FileContents.NAMES)
        FileContents(*joined).save(folder / SEEN_FILES)
