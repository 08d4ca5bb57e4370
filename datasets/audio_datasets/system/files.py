"""Files that are either complete or absent: written under a temporary name, flushed to disk, renamed into place."""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from audio_datasets.system.paths.inputs import read_regular
from audio_datasets.system.paths.sizes import require_room_for_archive

ASIDE = re.compile(r"\..+\.([0-9a-f]{12}|\d+)\.tmp")
"""Temporary names of files that are being written: ".NAME.TOKEN.tmp", in versions before ".NAME.PROCESS.tmp"."""
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What ``flock`` raises on file systems that do not have it."""


CANNOT_FLUSH = frozenset((errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS))
"""Errors of a file system that does not know how to flush a folder."""
_noted_unflushed = False


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields an empty temporary file beside ``path``; on success it is flushed to disk and renamed to ``path``.

    On an exception the temporary file is removed and ``path`` is left unchanged. What a killed process left of an earlier
    attempt is removed first.

    Raises OSError, which names ``path`` and not the temporary file.
    """
    make_folder(path.parent)
    with errors_of(path), _aside(path, _create_file) as aside:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        flush_folder(path.parent)


@contextmanager
def folder_written_aside(path: Path) -> Iterator[Path]:
    """The same for a folder. It replaces a folder ``path`` that is there."""
    make_folder(path.parent)
    with errors_of(path), _aside(path, _create_folder) as aside:
        yield aside
        remove_path(path)
        os.replace(aside, path)
        flush_folder(path.parent)


@contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Lets errors name the file that was to be written, where they name none or a temporary one."""
    try:
        yield
    except OSError as error:
        named = None if error.filename is None else os.path.basename(str(error.filename))
        if error.errno is None or (named is not None and not ASIDE.fullmatch(named)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def _aside(path: Path, create: Callable[[Path], int]) -> Iterator[Path]:
    """A new temporary file or folder beside ``path``, removed at the end if it is still there.

    Its name is random: process ids are not unique where containers share a folder. It is locked (``flock``) as long as it is being
    written, so that the next process that writes ``path`` can tell what a killed one has left.
    """
    _remove_abandoned(path)
    while True:
        aside = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        descriptor = create(aside)
        with suppress(OSError):  # without flock, nobody removes what others have left
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if aside.exists():
            break
        os.close(descriptor)  # taken for abandoned before it was locked
    try:
        yield aside
    finally:
        with suppress(OSError):  # the next attempt removes it; what went wrong before says more
            remove_path(aside)
        with suppress(OSError):
            os.close(descriptor)


def _create_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)  # O_EXCL: never through a link of this name


def _create_folder(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY)


def _remove_abandoned(path: Path) -> None:
    """Removes temporary files of ``path`` whose process has ended."""
    start = f".{path.name}."
    for name in os.listdir(path.parent):
        if name.startswith(start) and (found := ASIDE.fullmatch(name)) and name == f"{start}{found[1]}.tmp":
            with suppress(OSError):  # in use, removed by another process, or not ours to remove
                _remove_if_unlocked(path.with_name(name))


def _remove_if_unlocked(aside: Path) -> None:
    """Raises OSError if another process has locked it, or the file system has no locks."""
    descriptor = os.open(aside, os.O_NOFOLLOW | (os.O_RDONLY if aside.is_dir() else os.O_RDWR))
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove_path(aside)
    finally:
        os.close(descriptor)


def remove_path(path: Path) -> None:
    """Removes a file, or a folder with all that is in it, if it is there. OSError that names ``path``."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    try:
        shutil.rmtree(path)
    except OSError as error:  # which names a file without its folder
        raise OSError(error.errno, error.strerror, str(path)) from error


def remove_asides(folder: Path) -> None:
    """Removes temporary files of killed processes. Only for a folder into which no other process is writing."""
    for file in folder.iterdir() if folder.is_dir() else ():
        if ASIDE.fullmatch(file.name):
            remove_path(file)


def make_folder(folder: Path) -> None:
    """Creates a folder and its parents, so that they survive a power cut."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Flushes a folder's entries to disk, so that a rename inside it survives a power cut.

    Some file systems cannot flush a folder. A note says so once, and what follows goes on.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with errors_of(folder):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_FLUSH:
            raise
        _note_unflushed(folder, error)
    finally:
        os.close(descriptor)


def _note_unflushed(folder: Path, error: OSError) -> None:
    global _noted_unflushed
    if not _noted_unflushed:
        _noted_unflushed = True
        print(
            f"note: the file system of {folder} cannot flush folders ({error.strerror}); after a power cut, the newest files may "
            "be missing",
            file=sys.stderr,
        )


def write_text(path: Path, text: str) -> None:
    """Writes text in UTF-8 under a temporary name that is then renamed.

    Bytes of paths that are not UTF-8 become escapes (``\\udce9``), from which JSON gives back the same path.
    """
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: Any) -> None:
    """Writes ``content`` as indented JSON, under a temporary name that is then renamed. Non-finite numbers become null."""
    write_text(path, json_text(content, indent=2) + "\n")


def json_text(content: Any, indent: int | None = None) -> str:
    """``content`` as JSON. Non-finite numbers, which JSON cannot represent, become null."""
    return json.dumps(finite_values(content), indent=indent, ensure_ascii=False, allow_nan=False)


def finite_values(content: Any) -> Any:
    """A copy of JSON-like content, with None for each number that is not finite."""
    if isinstance(content, Mapping):
        return {key: finite_values(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite_values(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def read_json(path: Path) -> Any:
    """Reads a JSON file; ValueError with the path if it is missing or not JSON."""
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def parse_json(text: str | bytes, **options: Any) -> Any:
    """``json.loads``. Raises ValueError also for what is nested too deeply, for which Python has an error of its own."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_text(path: Path) -> str:
    """Reads a text file in UTF-8, with or without a byte order mark; ValueError with the path if it is missing or not UTF-8."""
    try:
        return read_regular(path).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError:
        raise ValueError(f"no such file: {path}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def read_arrays(path: Path, object_arrays: Callable[[bytes], Any] | None = None) -> dict[str, np.ndarray]:
    """The arrays in an .npz file by name.

    ``object_arrays`` converts the pickle that NumPy writes for Python objects into an array's content; without it such arrays
    are refused.

    Raises ValueError with the path for a file that is missing, damaged or of another kind.
    """
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    try:
        require_room_for_archive(path)
        with np.load(path, allow_pickle=False) as file, zipfile.ZipFile(path) as members:
            return {
                name: np.asarray(object_arrays(pickled), dtype=object)
                if object_arrays is not None and (pickled := _pickle_of(members, f"{name}.npy")) is not None
                else file[name]
                for name in file.files
            }
    except Exception as error:  # zipfile, zlib and NumPy have no common error for a damaged file
        if isinstance(error, ValueError) and str(path) in str(error):
            raise  # one of our own
        raise ValueError(f"{path} is damaged, or contains more than plain arrays: {str(error)[:300]}") from error


def _pickle_of(members: zipfile.ZipFile, name: str) -> bytes | None:
    """The pickle in an array of Python objects; None for an array of plain values."""
    if name not in members.namelist():
        return None
    with members.open(name) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
        return file.read() if read_header(file)[2].hasobject else None


def digest_of(*parts: bytes | str) -> str:
    """Digest (BLAKE2b-128) of the parts and their boundaries, 32 hexadecimal digits."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def digest_of_pieces(pieces: Callable[[], Iterable[bytes]]) -> str:
    """``digest_of`` a part that does not fit into memory. ``pieces`` is called twice, because the digest starts with the length."""
    state = hashlib.blake2b(digest_size=16)
    state.update(sum(len(piece) for piece in pieces()).to_bytes(8, "little"))
    for piece in pieces():
        state.update(piece)
    return state.hexdigest()
