"""The audio files that a command line names: files as they are, and those below folders."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from audio_datasets.system.messages import listed
from audio_datasets.tasks.audio_files import FolderWalk, is_audio, passed_over_by_kind


@dataclass
class FoundFiles:
    """Which files to tag."""

    files: list[Path] = field(default_factory=list)
    """Each once, in the order of the command line; those of a folder in alphabetical order."""
    notes: list[str] = field(default_factory=list)
    """What was passed over, as lines to print."""
    unusable: dict[str, str] = field(default_factory=dict)
    """Links that lead nowhere and folders that cannot be opened: reason by name."""


def audio_files(paths: Sequence[Path]) -> FoundFiles:
    """A file that is named is taken whatever it is called; in a folder, files that are called like audio.

    Raises ValueError for a path that does not exist, and if there is no file at all.
    """
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise ValueError(f"no such file or folder: {listed(missing)}")
    found, seen, repeated = FoundFiles(), set(), 0
    for path in paths:
        for file in _below(path, found) if path.is_dir() else [path]:
            place = os.path.abspath(file)
            if place in seen:
                repeated += 1
                continue
            seen.add(place)
            found.files.append(file)
    if repeated:
        found.notes.append(f"{repeated:,} files are named more than once and tagged once")
    if not found.files and not found.unusable:
        raise ValueError(f"no audio files in {listed([str(path) for path in paths])}")
    return found


def _below(folder: Path, found: FoundFiles) -> list[Path]:
    walk = FolderWalk(folder)
    names = list(walk.files())
    others = [name for name in names if not is_audio(name)]
    if others:
        found.notes.append(f"{folder}: passed over {passed_over_by_kind(others)} (not audio by their names)")
    found.notes += [f"{folder}: {note}" for note in walk.notes()]
    found.unusable |= {str(folder / name): reason for name, reason in walk.unusable.items()}
    return [folder / name for name in names if is_audio(name)]
