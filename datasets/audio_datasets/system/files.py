"""Files that are either complete or absent: written under a temporary name, flushed to disk, renamed into place."""

import errno
import hashlib
import json
import math
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from audio_datasets.system.paths.inputs import read_regular
from audio_datasets.system.paths.sizes import require_room_for_archive

ASIDE = re.compile(r"\..+\.\d+\.tmp")
"""Temporary names of files that are being written: ".NAME.PROCESS.tmp"."""


CANNOT_FLUSH = frozenset((errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS))
"""Errors of a file system that does not know how to flush a folder."""
_noted_unflushed = False


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on success it is flushed to disk and renamed to ``path``.

    On an exception the temporary file is removed and ``path`` is left unchanged. The temporary name contains the process
    id, so that two processes that write the same file do not write into each other's temporary file.
    """
    make_folder(path.parent)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside.unlink(missing_ok=True)  # a link of this name would be written through
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        flush_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def remove_asides(folder: Path) -> None:
    """Removes temporary files of killed processes. Only for a folder into which no other process is writing."""
    for file in folder.iterdir() if folder.is_dir() else ():
        if ASIDE.fullmatch(file.name):
            file.unlink()


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
