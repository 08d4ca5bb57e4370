"""The files that a command reads: which ones its options name, and whether they are regular files."""

import dataclasses
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from audio_datasets.system.paths.sizes import require_room

OUTPUT_OPTIONS = frozenset({"out", "cache", "chart", "table", "embeddings"})
"""Options that name what a command writes. All others that name an existing path are inputs."""

STREAMS = frozenset({"--stream"})
"""Options that may name a pipe or a device, because they are read as they come."""

POSITIONAL = {"source": "SOURCE", "run": "RUN", "runs": "RUNS", "files": "FILES"}
"""How messages call the arguments that have no option."""

SPECIAL_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


class NotAFileError(ValueError):
    """A path that leads to a pipe, a device, a socket or a folder, where a regular file is needed."""


def special_kind(path: Path) -> str | None:
    """ "a pipe", "a device" or "a socket"; None for regular files, folders and paths that lead nowhere. Links are followed."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return None
    return None if stat.S_ISDIR(mode) else SPECIAL_KINDS.get(stat.S_IFMT(mode))


def open_regular(path: Path) -> BinaryIO:
    """A regular file, open for reading. The check is made on the open file, so that it cannot be swapped in between.

    A pipe is not waited for: reading from one, or from a device such as /dev/zero, may never end.

    Raises:
        NotAFileError: a pipe, a device, a socket or a folder.
        OSError: there is no such file, or it may not be read.
    """
    if (kind := special_kind(path)) is not None:  # opening a socket fails, and opening a device may have effects
        raise NotAFileError(f"{path} is {kind}, not a regular file")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise NotAFileError(f"{path} is {SPECIAL_KINDS.get(stat.S_IFMT(mode), 'special')}, not a regular file")
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path) -> bytes:
    """The content of a regular file. Raises the same errors as ``open_regular``, and ValueError for one that is sparse and huge."""
    with open_regular(path) as file:
        require_room(path, os.fstat(file.fileno()).st_size, "its content")
        try:
            return file.read()
        except OSError as error:  # of a disk that fails, which does not name the file
            raise OSError(error.errno, error.strerror, str(path)) from error


def require_regular(path: Path) -> None:
    """Raises NotAFileError for a pipe, a device or a socket. For libraries that open a path themselves."""
    if (kind := special_kind(path)) is not None:
        raise NotAFileError(f"{path} is {kind}, not a regular file")


def paths_named_by(config: Any, plain_words: bool = True) -> Iterator[tuple[str, Path]]:
    """(option, path) for each existing path that the options of a command name as input.

    Options that hold text may name a path inside it: ``mn04@FILE``, ``ast:FOLDER``, ``STORE.h5:0.5``, ``A.h5+B.h5``.

    Args:
        plain_words: also text that is a single word, such as the name of a student, where a file or folder of that name exists.
    """
    for item in dataclasses.fields(config):
        if item.name in OUTPUT_OPTIONS:
            continue
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from paths_named_by(value, plain_words)
            continue
        for entry in value if isinstance(value, tuple | list) else (value,):
            if not plain_words and isinstance(entry, str) and not set(entry) & set("/.@:+"):
                continue
            for path in _paths_in(entry):
                yield POSITIONAL.get(item.name, f"--{item.name.replace('_', '-')}"), path


def _paths_in(value: Any) -> Iterator[Path]:
    if not isinstance(value, str | os.PathLike):
        return
    text = os.fspath(value)
    if not text or "\0" in text or len(text) > 4 * 4096:
        return
    candidates = {text}
    if isinstance(value, str):
        for separator in "@:+":
            parts = text.split(separator)
            candidates |= {*parts, text.partition(separator)[2], text.rpartition(separator)[0]}
        for part in text.split("+"):
            candidates.add(part.rpartition(":")[0])
    for candidate in sorted(candidates - {""}):
        try:
            if os.path.exists(candidate):
                yield Path(candidate)
        except (OSError, ValueError):
            continue


def refuse_special_inputs(config: Any) -> None:
    """Raises NotAFileError for an option that names a pipe, a device or a socket as input."""
    for option, path in paths_named_by(config):
        if option not in STREAMS and (kind := special_kind(path)) is not None:
            raise NotAFileError(f"{option}: {path} is {kind}, not a regular file")
