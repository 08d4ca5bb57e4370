"""Reading, writing and naming a student's weights. Nothing is ever loaded that could run code.

A saved student is a folder with two files: ``student.safetensors`` (the weights) and ``student.json`` (name and options,
class names, front end, provenance), which together are all that tagging, fine-tuning and export need.
"""

import dataclasses
import functools
import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from students.catalog import create_student, family_of, list_families, list_students
from students.frontend import LogMelConfig
from students.interface import StateDict, Student, StudentConfig
from students.outside import check_allowed

FORMAT = "kd-student"
FORMAT_VERSION = 1
WEIGHTS_FILE = "student.safetensors"
CARD_FILE = "student.json"

_log = logging.getLogger(__name__)

Shapes = dict[str, tuple[int, ...]]


# --- Weights into a student --------------------------------------------------------------------------------------------


def read_state_dict(path: str | Path) -> StateDict:
    """The tensors by name in a .safetensors file or in a PyTorch checkpoint that holds a plain state dict.

    A checkpoint that holds one under the name "state_dict", beside a training loop's other state, gives that one.

    Raises ValueError for a missing file and for one that is something else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such weights file: {path}")
    content = path.read_bytes()  # so that a failure below can only mean that the content is damaged
    if path.suffix == ".safetensors":
        try:
            return load(content)
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a text file, taken for a pickle, fails with an IndexError, and others in other ways
        # Not torch's own message: it advises to load the file in a way that can run code.
        raise ValueError(f"{path} is truncated, no PyTorch checkpoint, or holds more than plain tensors") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        found = f"a dict with {', '.join(map(repr, list(state)[:5]))}" if isinstance(state, Mapping) else type(state)
        raise ValueError(f"{path} is not a state dict (tensors by name); found {found}")
    return dict(state)


def load_weights(student: Student, path: str | Path, new_classes: bool = False) -> None:
    """Fills a student with weights from a file: a public checkpoint (.pt) or our own .safetensors.

    Every name and shape must agree. With ``new_classes`` the layer that gives the classes is not taken from the file but
    initialised anew, whatever number of classes the file has, and a warning says so.

    Raises ValueError, saying what differs and which student the file fits, if it does not fit this one.
    """
    state = student.tensors_of_checkpoint(read_state_dict(path))
    config = _config_of(student)
    _refuse_other_shapes(student, state, str(path), new_classes)
    if new_classes:
        replaced = _class_dependent_names(config)
        fresh = create_student(config.name, config.num_classes, **config.options).state_dict()
        state = state | {name: fresh[name] for name in replaced}
        _log.warning(
            "%s: not loaded but initialised anew for %d classes: %s", path, config.num_classes, ", ".join(replaced)
        )
    student.load_state_dict(state)


def student_from_weights(family: str, path: str | Path) -> Student:
    """The student that a weights file holds, its options told by the weights themselves, in evaluation mode.

    ``family`` is a name of ``list_families``, such as "passt". Raises ValueError for an unknown family, for one whose weights
    do not tell their options, and for a file that holds something else.
    """
    families = list_families()
    if family not in families:
        raise ValueError(f"unknown family {family!r}; choices: {', '.join(families)}")
    state = families[family].tensors_of_checkpoint(read_state_dict(path))
    try:
        config = families[family].config_of_weights(state)
        if config is None:
            names = [name for name in list_students() if family_of(name) is families[family]]
            raise ValueError(f"the weights of {family} do not tell its options; name the student: {', '.join(names)}")
        student = create_student(config.name, config.num_classes, **config.options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    _refuse_other_shapes(student, state, str(path))
    student.load_state_dict(state)
    return student.eval()


def _refuse_other_shapes(student: Student, state: StateDict, origin: str, new_classes: bool = False) -> None:
    """ValueError unless every name and shape agrees, except for those of the classes with ``new_classes``."""
    config = _config_of(student)
    if _shapes_of(state) == _shapes_of(student.state_dict()):
        return
    num_classes = _fitting_num_classes(config.name, config.options, state)
    if num_classes is None:
        raise ValueError(_describe_mismatch(student, config, state, origin))
    if not new_classes:
        raise ValueError(
            f"{origin} has {num_classes} classes, the student {config.num_classes}; create it with"
            f" {num_classes} classes, or ask for new_classes, which initialises the last layer anew"
        )


def _config_of(student: Student) -> StudentConfig:
    if student.config is None:
        raise ValueError("this student carries no configuration; build it with create_student")
    return student.config


def _shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(value.shape) for name, value in state.items()}


def _catalog_shapes(name: str, num_classes: int, options: Mapping[str, Any]) -> Shapes:
    if not options:
        return _default_shapes(name, num_classes)
    with torch.device("meta"):  # shapes without memory or random numbers
        return _shapes_of(create_student(name, num_classes, **options).state_dict())


@functools.cache  # a whole catalog is gone through to say what a file fits
def _default_shapes(name: str, num_classes: int) -> Shapes:
    with torch.device("meta"):
        return _shapes_of(create_student(name, num_classes).state_dict())


def _class_dependent_names(config: StudentConfig) -> list[str]:
    """The names of the tensors whose shape depends on the number of classes: those of the last layer."""
    two, three = (_catalog_shapes(config.name, number, config.options) for number in (2, 3))
    return [name for name in two if two[name] != three[name]]


def _fitting_num_classes(name: str, options: Mapping[str, Any], state: Mapping[str, Tensor]) -> int | None:
    """The number of classes with which a catalog entry has exactly the shapes of ``state``; None if with no number."""
    found = _shapes_of(state)
    two = _catalog_shapes(name, 2, options)
    if found.keys() != two.keys():
        return None
    three = _catalog_shapes(name, 3, options)
    # One size that depends on the classes gives their number, as it is linear in it; the comparison settles the rest.
    key = next(key for key in two if two[key] != three[key])
    if len(found[key]) != len(two[key]):
        return None
    axis = next(axis for axis, size in enumerate(two[key]) if size != three[key][axis])
    num_classes, remainder = divmod(found[key][axis] - two[key][axis], three[key][axis] - two[key][axis])
    num_classes += 2
    if remainder or num_classes < 1 or _catalog_shapes(name, num_classes, options) != found:
        return None
    return num_classes


def _describe_mismatch(student: Student, config: StudentConfig, state: StateDict, origin: str) -> str:
    wanted, found = _shapes_of(student.state_dict()), _shapes_of(state)
    lines = [f"{origin} does not hold the weights of {config.name} with the chosen options"]
    differences = {
        "missing": [name for name in wanted if name not in found],
        "not known to the student": [name for name in found if name not in wanted],
        "of another shape": [
            f"{name} {found[name]} instead of {wanted[name]}"
            for name in wanted
            if name in found and found[name] != wanted[name]
        ],
    }
    for what, names in differences.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"{what}: {', '.join(names[:3])}{more}")
    for name in list_students():
        num_classes = _fitting_num_classes(name, {}, state)
        if num_classes is not None:
            lines.append(f"it fits {name} with {num_classes} classes")
    return "; ".join(lines)


# --- ImageNet ----------------------------------------------------------------------------------------------------------


def imagenet_architecture(student: Student) -> str:
    """timm's name of the network whose ImageNet weights ``load_imagenet_weights`` takes; ValueError if there is none."""
    if student.imagenet_architecture is None:
        having = [name for name, family in list_families().items() if "imagenet_weights" in vars(family)]
        raise ValueError(
            f"there are no ImageNet weights for {type(student).__name__}; families with such weights: {', '.join(having)}"
        )
    return student.imagenet_architecture


def load_imagenet_weights(student: Student, timm_state_dict: Mapping[str, Tensor]) -> None:
    """Initialises a student from the state dict of timm's ``imagenet_architecture(student)``.

    The last layer, and all of a head that ImageNet's network does not have, stays as it is.

    Raises ValueError for another student and for another network's weights.
    """
    imagenet_architecture(student)
    student.load_state_dict(student.state_dict() | student.imagenet_weights(timm_state_dict))


# --- A student as a folder ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StudentCard:
    """What ``student.json`` tells about a student."""

    config: StudentConfig
    """Name, number of classes and options: enough to build it."""
    class_names: tuple[str, ...]
    """One name per output, in order."""
    frontend: LogMelConfig
    """What the student was trained to hear."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where the weights come from; free form, plain enough for JSON."""


def save_student(
    folder: str | Path,
    student: Student,
    class_names: Sequence[str],
    frontend: LogMelConfig,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Writes ``student.safetensors`` and ``student.json`` into ``folder``, each aside and renamed into place.

    Raises ValueError if the class names are not one per output.
    """
    config = _config_of(student)
    if len(class_names) != config.num_classes:
        raise ValueError(f"one class name per output: {config.num_classes} are needed, {len(class_names)} were given")
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
    _replace(folder / WEIGHTS_FILE, lambda aside: save_file(state, aside))
    _replace(folder / CARD_FILE, lambda aside: aside.write_text(text, encoding="utf-8"))


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """A killed process leaves the old file or the new one, never half of one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            write(aside)
        except SafetensorError as error:  # a full disk, mostly, which safetensors does not tell by an OSError
            raise OSError(f"{path} cannot be written: {error}") from error
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        flush = os.open(path.parent, os.O_RDONLY)
        os.fsync(flush)
        os.close(flush)
    finally:
        aside.unlink(missing_ok=True)


def read_card(folder: str | Path, allow: Sequence[str] = ()) -> StudentCard:
    """A saved student's card without its weights.

    ``allow``: names of the form ``module:Class`` that the card may ask for (see ``students.outside``).

    Raises ValueError if the folder holds no student, or one from outside this package that is not allowed.
    """
    path, content = _read_card_file(folder)
    return _card(path, content, allow)


def load_student(folder: str | Path, allow: Sequence[str] = ()) -> tuple[Student, StudentCard]:
    """A saved student on the CPU in evaluation mode, and its card.

    ``allow``: names of the form ``module:Class`` that the card may ask for (see ``students.outside``).

    Raises ValueError if the folder holds no student, one from outside this package that is not allowed, or if weights and
    card do not belong together.
    """
    path, content = _read_card_file(folder)
    card = _card(path, content, allow)
    weights = path.with_name(WEIGHTS_FILE)
    state = read_state_dict(weights)
    _refuse_other_shapes(outline(folder, card), state, str(weights))
    student = create_student(card.config.name, card.config.num_classes, **card.config.options)
    student.load_state_dict(state)
    if weights_fingerprint(student) != content.get("weights_fingerprint"):
        raise ValueError(
            f"{path} and {WEIGHTS_FILE} beside it do not belong together: the weights are not those that the card was"
            " written for (was saving interrupted, or one of them replaced?)"
        )
    return student.eval(), card


def outline(folder: str | Path, card: StudentCard) -> Student:
    """The student of a card on the device "meta": its shapes without memory, of which a damaged card may ask for any amount.

    Raises ValueError, naming the card in ``folder``, if there is no such student.
    """
    try:
        with torch.device("meta"):
            return create_student(card.config.name, card.config.num_classes, **card.config.options)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{Path(folder) / CARD_FILE}: {error}") from error


def _read_card_file(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    path = Path(folder) / CARD_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder} holds no student: there is no {CARD_FILE}") from None
    except ValueError as error:  # not JSON or not UTF-8
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} does not describe a student (its format is not {FORMAT!r})")
    if content.get("version") != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {content.get('version')!r}; this reader knows {FORMAT_VERSION}")
    return path, content


def _card(path: Path, content: Mapping[str, Any], allow: Sequence[str]) -> StudentCard:
    try:
        config = StudentConfig(**content["student"])
        class_names = tuple(content["class_names"])
        card = StudentCard(config, class_names, LogMelConfig.from_dict(content["frontend"]), content["provenance"])
        if not all(isinstance(part, dict) for part in (config.options, card.provenance)):
            raise TypeError("options and provenance are objects")
        if not all(isinstance(name, str) and name.strip() for name in class_names) or len({*class_names}) < len(
            class_names
        ):
            raise TypeError("class names are unique text")
        if not isinstance(config.name, str):
            raise TypeError("the student's name is text")
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} is incomplete or damaged: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    check_allowed(config.name, path, allow)
    bands = config.options.get("n_mels", card.frontend.n_mels)
    if bands != card.frontend.n_mels:
        raise ValueError(
            f"{path}: the student takes {bands!r} mel bands, and its front end makes {card.frontend.n_mels}"
        )
    if len(class_names) != config.num_classes:
        raise ValueError(f"{path} names {len(class_names)} classes for {config.num_classes} outputs")
    return card


def weights_fingerprint(module: nn.Module) -> str:
    """32 hexadecimal digits that name a module's weights: BLAKE2b over names, types, shapes and bytes of its state dict.

    The same on every device and in every process; any changed bit changes it.
    """
    state = hashlib.blake2b(digest_size=16)
    for name, value in sorted(module.state_dict().items()):
        state.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        state.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()
