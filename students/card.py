"""A student on disk: a folder with ``student.safetensors`` (weights) and ``student.json`` (the card).

The card contains name and options, class names, front end and provenance. Tagging, fine-tuning and export need nothing but these
two files. Format "kd-student", version 1; this module has both writer and reader.
"""

import dataclasses
import errno
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from students.catalog import create_student
from students.frontend import LogMelConfig
from students.interface import Student, StudentCard, StudentConfig
from students.outside import check_allowed
from students.weight_files import read_bytes, read_state_dict, require_room, save_tensors
from students.weights import config_of, refuse_other_shapes, weights_fingerprint

FORMAT = "kd-student"
FORMAT_VERSION = 1
WEIGHTS_FILE = "student.safetensors"
CARD_FILE = "student.json"
LONGEST_CLIP_SECONDS = 3_600


def save_student(
    folder: str | Path,
    student: Student,
    class_names: Sequence[str],
    frontend: LogMelConfig,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Writes ``student.safetensors`` and ``student.json`` into ``folder``, each under a temporary name that is then renamed.

    Raises ValueError unless there is one class name per output.
    """
    config = config_of(student)
    if len(class_names) != config.num_classes:
        raise ValueError(
            f"one class name per output is needed: expected {config.num_classes}, found {len(class_names)}"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in student.state_dict().items()}
    card = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "student": dataclasses.asdict(config),
        "class_names": list(class_names),
        "frontend": frontend.to_dict(),
        "provenance": dict(provenance or {}),
        "weights_fingerprint": weights_fingerprint(student),
    }
    text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
    _replace(folder / WEIGHTS_FILE, lambda aside: save_tensors(state, aside))
    _replace(folder / CARD_FILE, lambda aside: aside.write_text(text, "utf-8", "backslashreplace"))


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Replaces a file. A killed process leaves either the old file or the new one, never half of one."""
    # Random, because process ids may be the same where containers share a folder.
    aside = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        write(aside)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        _flush_folder(path.parent)
    except OSError as error:  # whose file is the temporary one, or none
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # The file system cannot flush folders. The file is complete; a power cut may bring back the one before.
    finally:
        os.close(descriptor)


def read_card(folder: str | Path, allow: Sequence[str] = ()) -> StudentCard:
    """The card of a saved student, without loading weights.

    ``allow``: names of the form ``module:Class`` that the card may ask for (see ``students.outside``).

    Raises ValueError if the folder contains no student, or one from outside this package that is not allowed.
    """
    path, content = _read_card_file(folder)
    return _card(path, content, allow)


def load_student(folder: str | Path, allow: Sequence[str] = ()) -> Student:
    """A saved student on the CPU in evaluation mode; ``student.card`` has its class names, front end and provenance.

    ``allow``: names of the form ``module:Class`` that the card may ask for (see ``students.outside``).

    Raises ValueError if the folder contains no student, or one from outside this package that is not allowed, or if weights and
    card do not belong together.
    """
    path, content = _read_card_file(folder)
    card = _card(path, content, allow)
    weights = path.with_name(WEIGHTS_FILE)
    state = read_state_dict(weights)
    refuse_other_shapes(outline(folder, card), state, str(weights))
    student = create_student(card.config.name, card.config.num_classes, **card.config.options)
    student.load_state_dict(state)
    if weights_fingerprint(student) != content.get("weights_fingerprint"):
        raise ValueError(
            f"{path} and the {WEIGHTS_FILE} beside it do not belong together: the card was written for other weights"
            " (was saving interrupted, or one of the files replaced?)"
        )
    student.card = card
    return student.eval()


def outline(folder: str | Path, card: StudentCard) -> Student:
    """The student of a card on the device "meta": shapes without memory, because a damaged card could ask for any amount of it.

    Raises ValueError that names the card in ``folder`` if there is no such student.
    """
    try:
        with torch.device("meta"):
            return create_student(card.config.name, card.config.num_classes, **card.config.options)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{Path(folder) / CARD_FILE}: {error}") from error


def _read_card_file(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    path = Path(folder) / CARD_FILE
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path} is not a regular file")
    try:
        require_room(path, path.stat().st_size, "its content")
        content = json.loads(read_bytes(path).decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: it is nested too deeply") from None
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder} contains no student: there is no {CARD_FILE}") from None
    except ValueError as error:  # not JSON or not UTF-8
        raise ValueError(str(error) if str(path) in str(error) else f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} does not describe a student (its format is not {FORMAT!r})")
    if content.get("version") != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {content.get('version')!r}; only {FORMAT_VERSION} can be read")
    return path, content


def _check_clip_seconds(path: Path, seconds: Any) -> None:
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not is_number or not 0 < seconds <= LONGEST_CLIP_SECONDS:
        raise ValueError(
            f"{path}: clip_seconds must be a number above 0 and at most {LONGEST_CLIP_SECONDS:,}; found {repr(seconds)[:60]}"
        )


def _card(path: Path, content: Mapping[str, Any], allow: Sequence[str]) -> StudentCard:
    try:
        config = StudentConfig(**content["student"])
        class_names = tuple(content["class_names"])
        card = StudentCard(config, class_names, LogMelConfig.from_dict(content["frontend"]), content["provenance"])
        if not all(isinstance(part, dict) for part in (config.options, card.provenance)):
            raise TypeError("options and provenance must be objects")
        if not all(isinstance(name, str) and name.strip() for name in class_names) or len({*class_names}) < len(
            class_names
        ):
            raise TypeError("class names must be unique, nonempty strings")
        if not isinstance(config.name, str):
            raise TypeError("the student's name must be a string")
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} is incomplete or damaged: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if "clip_seconds" in card.provenance:
        _check_clip_seconds(path, card.provenance["clip_seconds"])
    check_allowed(config.name, path, allow)
    bands = config.options.get("n_mels", card.frontend.n_mels)
    if bands != card.frontend.n_mels:
        raise ValueError(
            f"{path}: the student takes {bands!r} mel bands, but its front end makes {card.frontend.n_mels}"
        )
    if len(class_names) != config.num_classes:
        raise ValueError(f"{path} has {len(class_names)} class names for {config.num_classes} outputs")
    return card
