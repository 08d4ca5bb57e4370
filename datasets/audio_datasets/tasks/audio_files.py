"""The files of a corpus on disk: those below a folder, with links followed, and the audio of one folder by name."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from audio_datasets.audio.bad_clips import refuse_system_fault
from audio_datasets.audio.codec import AUDIO_SUFFIXES
from audio_datasets.stores.names import as_on_disk, normal
from audio_datasets.system.messages import by_kind, extension_of, listed
from audio_datasets.system.paths.inputs import special_kind


def is_audio(name: str) -> bool:
    """Whether a file is called like one with audio."""
    return os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES


def passed_over_by_kind(names: Iterable[str]) -> str:
    """How many files of each kind, the most frequent first: "13 .m4a, 1 .txt"."""
    return by_kind(names, _kind)


def _kind(name: str) -> str:
    kind = extension_of(name)
    return f"{kind} (audio, but not where the layout has clips)" if is_audio(name) else kind


@dataclass
class FolderWalk:
    """Looks through the folders below ``root``. Symbolic links are followed, each folder once, so loops end.

    Names are relative to ``root``, with forward slashes. Hidden files and folders are left out.
    """

    root: Path
    unusable: dict[str, str] = field(default_factory=dict)
    """Links that lead nowhere, and folders that cannot be opened: name -> reason."""
    repeated: list[str] = field(default_factory=list)
    """Folders that were not entered, since they are links to one that was read already."""
    hidden: list[str] = field(default_factory=list)
    """Audio files whose names begin with a dot."""
    special: list[str] = field(default_factory=list)
    """What is neither file nor folder nor link, as a pipe."""

    def entries(self, folder: str = "") -> tuple[list[str], list[str]]:
        """The folders and the files directly in a folder, in alphabetical order."""
        folders, files = [], []
        try:
            with os.scandir(self.root / folder) as scanned:
                found = sorted(scanned, key=lambda entry: entry.name)
        except OSError as error:
            refuse_system_fault(error, self.root / folder)
            self.unusable[folder or "."] = f"the folder cannot be opened: {error.strerror}"
            return [], []
        for entry in found:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith("."):
                if is_audio(entry.name) and name not in self.hidden:
                    self.hidden.append(name)
            elif entry.is_dir():
                folders.append(name)
            elif entry.is_file():
                files.append(name)
            elif entry.is_symlink() and (kind := special_kind(Path(entry.path))) is not None:
                self.unusable[name] = f"the symbolic link leads to {kind} ({os.readlink(entry.path)})"
            elif entry.is_symlink():
                self.unusable[name] = f"the symbolic link leads nowhere (to {os.readlink(entry.path)!r})"
            elif name not in self.special:
                self.special.append(name)
        return folders, files

    def files(self, folder: str = "") -> Iterator[str]:
        """All files below a folder. Each real folder is entered once in a call, and none that ``folder`` lies in."""
        above = [self.root, *(self.root / part for part in _parents(folder))]
        seen = {identity for identity in map(_identity, above) if identity}
        waiting = [folder]
        while waiting:
            current = waiting.pop()
            identity = _identity(self.root / current)
            if current and identity in seen:
                self.repeated.append(current)
                continue
            seen.add(identity)
            folders, files = self.entries(current)
            yield from files
            waiting += reversed(folders)

    def notes(self) -> list[str]:
        """What was passed over, as lines to print."""
        passed_over = {
            "not entered, since they are links to folders that were read already": self.repeated,
            "passed over, since they are hidden": self.hidden,
            "passed over, since they are neither files nor folders": self.special,
        }
        return [f"{what}: {listed(names, limit=3)}" for what, names in passed_over.items() if names]


def _parents(folder: str) -> list[str]:
    """``a/b/c`` -> ``a``, ``a/b``."""
    parts = folder.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells that two paths lead to one folder; None if it cannot be asked for."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


@dataclass
class AudioFolder:
    """The audio files of a folder by name without suffix: a copy in another format stands for the original."""

    folder: Path
    _by_stem: dict[str, Path] = field(init=False)

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise ValueError(f"there is no folder {self.folder}")
        files = sorted(self.folder.iterdir(), reverse=True)
        self._by_stem = {normal(file.stem): file for file in files if is_audio(file.name)}

    def find(self, name: str) -> Path:
        """The file with this name or, with another suffix, this stem; the path where it should be if there is none.

        ValueError for what cannot be the name of a file in a folder.
        """
        if not name or "\0" in name or name in (".", "..") or "/" in name:
            raise ValueError(f"{self.folder} can hold no file that is called {name!r}")
        named = as_on_disk(self.folder, name)
        if is_audio(name):
            return named if named.exists() else self._by_stem.get(normal(named.stem), named)
        return self._by_stem.get(normal(name), named.with_name(f"{name}.wav"))
