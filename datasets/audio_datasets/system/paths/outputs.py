"""What a command may write over: never its own inputs, and a file of another kind only if the user says so.

Paths are compared by device and inode, so that links, ``..`` and other spellings of a path do not hide an input.
"""

import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audio_datasets.system.paths.inputs import paths_named_by, special_kind

Identity = tuple[int, int]
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
LARGEST_JSON_BYTES = 2**28
BEGINNING_BYTES = 65_536

COMPANIONS = {
    **dict.fromkeys((".h5", ".hdf5"), (".parquet", ".skipped.txt", ".missing.txt", ".suspicious.txt", ".sources.npz")),
    ".onnx": (".onnx.data", ".onnx_data"),
}
"""What may lie beside a file and belong to it, by the file's suffix."""


@dataclass(frozen=True)
class Output:
    """A file that a command will write."""

    path: Path
    is_ours: Callable[[Path], bool]
    """Whether an existing file is of the kind that the command writes, so that replacing it loses nothing else."""
    what: str
    """For the message: "the results of kd evaluate"."""


def check_outputs(
    config: Any, outputs: Sequence[Output], overwrite: bool = False, advice: str = "replace it with --overwrite"
) -> None:
    """Checks what a command will write against its inputs. Called before the command opens anything.

    Args:
        config: the command's options; its inputs are the existing paths that they name, and what lies beside those.
        overwrite: a file of another kind may be replaced, unless it is an input.
        advice: how to allow that, for the message.

    Raises:
        ValueError: an output is an input, lies in an input folder as a file of another kind, is named twice, is no regular
            file, or is of another kind.
    """
    inputs = dict(_inputs(config))
    folders = [(option, path) for option, path in paths_named_by(config) if path.is_dir()]
    seen: dict[str, Path] = {}
    for output in outputs:
        path = output.path
        place = os.path.realpath(path)
        if place in seen:
            raise ValueError(f"{path} and {seen[place]} are one file, and cannot both be written")
        seen[place] = path
        if (identity := _identity(path)) is None:
            continue
        if identity in inputs:
            raise ValueError(f"{path} would be overwritten with {output.what}, but it is an input ({inputs[identity]})")
        if path.is_dir() or special_kind(path) is not None:
            raise ValueError(f"{path} is {special_kind(path) or 'a folder'}; {output.what} need a regular file")
        if output.is_ours(path):
            continue
        for option, folder in folders:
            if Path(place).is_relative_to(os.path.realpath(folder)):
                raise ValueError(
                    f"{path} would be overwritten with {output.what}, but it is part of an input ({option})"
                )
        if not overwrite:
            raise ValueError(
                f"{path} exists and holds something else than {output.what}; {advice}, or choose another file"
            )


def check_output_folder(config: Any, folder: Path, is_part: Callable[[str], bool]) -> None:
    """Checks a run folder, or another folder that a command writes, against the command's inputs.

    Args:
        is_part: whether a name directly inside the folder is one that the command writes.

    Raises:
        ValueError: the folder is an input itself, or an input is one of the files in it that the command writes.
    """
    if (identity := _identity(folder)) is None:
        return
    real = os.path.realpath(folder)
    inputs = dict(_inputs(config, plain_words=False))
    if identity in inputs:
        raise ValueError(f"--out {folder} is an input ({inputs[identity]}); choose another --out")
    for option, path in paths_named_by(config, plain_words=False):
        place = Path(os.path.realpath(path))
        if place.is_relative_to(real) and is_part(place.relative_to(real).parts[0]):
            raise ValueError(f"{path} ({option}) is part of what is written to {folder}; choose another --out")
    for entry in os.scandir(folder):  # other names of an input
        if is_part(entry.name) and (option := inputs.get(_identity(Path(entry.path)))):
            raise ValueError(f"{entry.path} would be overwritten, but it is an input ({option}); choose another --out")


def refuse_links(folder: Path, is_part: Callable[[str], bool]) -> None:
    """Raises ValueError if something that a command writes in ``folder`` is a symbolic link.

    The folder itself may be a link. Links inside it would be written through, and what they lead to belongs to someone else.
    """
    if not folder.is_dir():
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_symlink() and is_part(entry.name):
            raise ValueError(
                f"{entry.path} is a symbolic link (to {os.readlink(entry.path)}); nothing in {folder} is written or removed "
                "through a link. Remove the link, or choose another --out"
            )


def no_link(path: str | Path, flags: int) -> int:
    """An opener for ``open`` that refuses a symbolic link in the last part of the path, with an OSError that says so."""
    if os.path.islink(path):
        raise ValueError(f"{path} is a symbolic link (to {os.readlink(path)}), through which nothing is written")
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


# -- Kinds of files ----------------------------------------------------------------------------------------------------


def json_with(*names: str) -> Callable[[Path], bool]:
    """Recognises a JSON object that has all of these names."""

    def recognise(path: Path) -> bool:
        try:
            if path.stat().st_size > LARGEST_JSON_BYTES:
                return False
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(content, dict) and set(names) <= content.keys()

    return recognise


def npz_with(*names: str) -> Callable[[Path], bool]:
    """Recognises an .npz file that has arrays of all these names."""

    def recognise(path: Path) -> bool:
        try:
            with zipfile.ZipFile(path) as members:
                return {f"{name}.npy" for name in names} <= set(members.namelist())
        except (OSError, ValueError, zipfile.BadZipFile):
            return False

    return recognise


def beginning_with(*signatures: bytes) -> Callable[[Path], bool]:
    """Recognises a file by its first bytes."""
    return lambda path: any(_beginning(path).startswith(signature) for signature in signatures)


def containing(pattern: re.Pattern[bytes]) -> Callable[[Path], bool]:
    """Recognises a file in whose beginning the pattern is found."""
    return lambda path: pattern.search(_beginning(path)) is not None


is_hdf5 = beginning_with(HDF5_SIGNATURE)
is_chart = containing(re.compile(rb"[Mm]atplotlib"))


def _beginning(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(BEGINNING_BYTES)
    except OSError:
        return b""


# -- Identities --------------------------------------------------------------------------------------------------------


def _inputs(config: Any, plain_words: bool = True) -> Iterator[tuple[Identity, str]]:
    """(device and inode, option) of each input, and of the files that belong to one."""
    for option, path in paths_named_by(config, plain_words):
        suffix = path.suffix.lower()
        for belonging in (path, *(path.with_suffix(ending) for ending in COMPANIONS.get(suffix, ()))):
            if (identity := _identity(belonging)) is not None:
                yield identity, option if belonging == path else f"{belonging.name} belongs to {option}"


def _identity(path: Path) -> Identity | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino
