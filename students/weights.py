"""Loading weights into a student: from a file, where all names and shapes must match, or from ImageNet networks. Nothing is
ever loaded that could run code.
"""

import functools
import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from students.catalog import create_student, family_of, list_families, list_students
from students.interface import StateDict, Student, StudentConfig
from students.weight_files import read_state_dict as read_state_dict

_log = logging.getLogger(__name__)

Shapes = dict[str, tuple[int, ...]]

PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
"""What wrappers put before every name: DataParallel and DistributedDataParallel, torch.compile, and training modules."""
AVERAGED_COUNT = "n_averaged"
"""torch.optim.swa_utils.AveragedModel's count of updates, beside the weights under "module."."""


# --- Weights from files ------------------------------------------------------------------------------------------------


def load_weights(student: Student, path: str | Path, new_classes: bool = False) -> None:
    """Loads weights from a file into a student: a public checkpoint (.pt) or our own .safetensors.

    All names and shapes must match, apart from prefixes and unused tensors that ``tensors_under_own_names`` removes. With
    ``new_classes`` the layer that outputs the classes is not loaded but reinitialised, whatever number of classes the file has,
    and a warning says so.

    The student is then in evaluation mode, ready to be used. Call ``train()`` to train it.

    Raises ValueError if the file does not fit; the message says what differs and which student it fits.
    """
    state = tensors_under_own_names(student, read_state_dict(path), str(path))
    config = config_of(student)
    refuse_other_shapes(student, state, str(path), new_classes)
    if new_classes:
        replaced = _class_dependent_names(config)
        fresh = create_student(config.name, config.num_classes, **config.options).state_dict()
        state = state | {name: fresh[name] for name in replaced}
        _log.warning(
            "%s: not loaded but reinitialised for %d classes: %s", path, config.num_classes, ", ".join(replaced)
        )
    student.load_state_dict(state)
    student.eval()


def student_from_weights(family: str, path: str | Path) -> Student:
    """The student in a weights file, with options inferred from the weights, in evaluation mode.

    ``family`` is one of ``list_families``, such as "passt". Raises ValueError for an unknown family, for one whose options cannot
    be inferred from weights, and for a file with other contents.
    """
    families = list_families()
    if family not in families:
        raise ValueError(f"unknown family {family!r}; choices: {', '.join(families)}")
    read = read_state_dict(path)
    try:
        config = _config_of_weights(families[family], read)
        if config is None:
            names = [name for name in list_students() if family_of(name) is families[family]]
            raise ValueError(
                f"options of {family} cannot be inferred from weights; name the student: {', '.join(names)}"
            )
        student = create_student(config.name, config.num_classes, **config.options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    state = tensors_under_own_names(student, read, str(path))
    refuse_other_shapes(student, state, str(path))
    student.load_state_dict(state)
    return student.eval()


def named_student_from_weights(name: str, path: str | Path) -> Student:
    """The student called ``name`` with a file's weights and as many classes as they have, in evaluation mode.

    ``name`` may be a family too, where options can be inferred. Raises ValueError for an unknown name and for weights that do not fit.
    """
    if name in list_families() and name not in list_students():
        return student_from_weights(name, path)
    student = create_student(name, 1)
    try:
        load_weights(student, path)
    except OtherClasses as error:
        student = create_student(name, error.in_file)
        load_weights(student, path)
    return student


def _config_of_weights(family: type[Student], state: StateDict) -> StudentConfig | None:
    """``config_of_weights`` of the tensors as they are named, or without a wrapper's prefix; the first error if neither works."""
    first_error = None
    for _, unwrapped in _without_prefixes(state):
        try:
            return family.config_of_weights(family.tensors_of_checkpoint(unwrapped))
        except ValueError as error:
            first_error = first_error or error
    raise first_error


def tensors_under_own_names(student: Student, state: StateDict, origin: str) -> StateDict:
    """The tensors of a file under the student's own names.

    A prefix that all names share (``PREFIXES``) is taken off where the names then fit, and tensors that the student's options
    leave unused are passed over; a warning that begins with ``origin`` says so. Names that do not fit either way are returned
    as they fit best.
    """
    own = student.state_dict().keys()
    best, most = student.tensors_of_checkpoint(state), -1
    for prefix, unwrapped in _without_prefixes(state):
        tensors = student.tensors_of_checkpoint(unwrapped)
        unused = student.unused_tensors(tensors)
        used = {name: value for name, value in tensors.items() if name not in unused}
        if used.keys() == own:
            if prefix:
                _log.warning("%s: every name begins with %r, which was taken off", origin, prefix)
            if unused:
                shown = ", ".join(sorted(unused)[:3]) + (f" and {len(unused) - 3} more" if len(unused) > 3 else "")
                _log.warning("%s: not loaded, since the student's options do not use them: %s", origin, shown)
            return used
        if (common := len(tensors.keys() & own)) > most:
            best, most = tensors, common
    return best


def _without_prefixes(state: StateDict) -> Iterator[tuple[str, StateDict]]:
    """("", the tensors as they are), then the tensors without one more of the prefixes that all their names share."""
    yield "", state
    names = {name: name for name in state if name != AVERAGED_COUNT}
    prefix = ""
    while names and (shared := next((p for p in PREFIXES if all(name.startswith(p) for name in names)), None)):
        prefix += shared
        names = {name.removeprefix(shared): original for name, original in names.items()}
        yield prefix, {name: state[original] for name, original in names.items()}


class OtherClasses(ValueError):
    """Weights that would fit a student if it had another number of classes."""

    def __init__(self, origin: str, in_file: int, in_student: int) -> None:
        super().__init__(
            f"{origin} has {in_file} classes, the student {in_student}; create it with num_classes={in_file}, or load the "
            "weights with new_classes=True, which reinitialises the last layer"
        )
        self.in_file = in_file


def refuse_other_shapes(student: Student, state: StateDict, origin: str, new_classes: bool = False) -> None:
    """Raises ValueError unless all names and shapes match; with ``new_classes`` the number of classes may differ.

    If only that number differs, the error is an ``OtherClasses``.
    """
    config = config_of(student)
    if _shapes_of(state) == _shapes_of(student.state_dict()):
        return
    num_classes = _fitting_num_classes(config.name, config.options, state)
    if num_classes is None:
        raise ValueError(_describe_mismatch(student, config, state, origin))
    if not new_classes:
        raise OtherClasses(origin, num_classes, config.num_classes)


def config_of(student: Student) -> StudentConfig:
    """The configuration of a student. Raises ValueError if it was built by hand and has none."""
    if student.config is None:
        raise ValueError("this student has no configuration; build it with create_student")
    return student.config


def _shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(value.shape) for name, value in state.items()}


def _catalog_shapes(name: str, num_classes: int, options: Mapping[str, Any]) -> Shapes:
    if not options:
        return _default_shapes(name, num_classes)
    with torch.device("meta"):  # shapes without memory or random numbers
        return _shapes_of(create_student(name, num_classes, **options).state_dict())


@functools.cache  # finding out which student a file fits goes through the whole catalog
def _default_shapes(name: str, num_classes: int) -> Shapes:
    with torch.device("meta"):
        return _shapes_of(create_student(name, num_classes).state_dict())


def _class_dependent_names(config: StudentConfig) -> list[str]:
    """The names of the tensors whose shape depends on the number of classes: those of the last layer."""
    two, three = (_catalog_shapes(config.name, number, config.options) for number in (2, 3))
    return [name for name in two if two[name] != three[name]]


def _fitting_num_classes(name: str, options: Mapping[str, Any], state: Mapping[str, Tensor]) -> int | None:
    """The number of classes for which a catalog entry has exactly the shapes of ``state``; None if there is no such number."""
    found = _shapes_of(state)
    two = _catalog_shapes(name, 2, options)
    if found.keys() != two.keys():
        return None
    three = _catalog_shapes(name, 3, options)
    # Sizes are linear in the number of classes, so one such size gives the number. The final comparison checks the rest.
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
    lines = [f"{origin} does not contain the weights of {config.name} with the chosen options"]
    differences = {
        "missing": [name for name in wanted if name not in found],
        "not in the student": [name for name in found if name not in wanted],
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
    """timm's name of the network whose ImageNet weights ``load_imagenet_weights`` accepts; ValueError if there is none."""
    if student.imagenet_architecture is None:
        having = [name for name, family in list_families().items() if "imagenet_weights" in vars(family)]
        raise ValueError(
            f"there are no ImageNet weights for {type(student).__name__}; families with such weights: {', '.join(having)}"
        )
    return student.imagenet_architecture


def check_imagenet_weights(student: Student) -> None:
    """Raises ValueError, saying why, for a student that ImageNet's weights do not fit; found without downloading them."""
    import timm  # here, since it takes longer to import than all else, and most students do without

    with torch.device("meta"):
        network = timm.create_model(imagenet_architecture(student))
    student.imagenet_weights(network.state_dict())


def load_imagenet_weights(student: Student, timm_state_dict: Mapping[str, Tensor]) -> None:
    """Initialises a student from the state dict of timm's ``imagenet_architecture(student)``.

    The last layer keeps its weights, and so do parts of the head that the ImageNet network does not have.

    Raises ValueError for a student without ImageNet weights and for another network's weights.
    """
    imagenet_architecture(student)
    student.load_state_dict(student.state_dict() | student.imagenet_weights(timm_state_dict))


def weights_fingerprint(module: nn.Module) -> str:
    """A fingerprint of 32 hexadecimal digits: BLAKE2b over names, types, shapes and bytes of a module's state dict.

    It is the same on every device and in every process, and changes with any bit of the weights.
    """
    state = hashlib.blake2b(digest_size=16)
    for name, value in sorted(module.state_dict().items()):
        state.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        state.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()
