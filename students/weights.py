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

from students.catalog import STUDENTS, Catalog
from students.families.image_backbones import EfficientNet
from students.families.mn import MN, STAGES
from students.frontend import LogMelConfig
from students.interface import Student, StudentConfig

FORMAT = "kd-student"
FORMAT_VERSION = 1
WEIGHTS_FILE = "student.safetensors"
CARD_FILE = "student.json"

_log = logging.getLogger(__name__)

StateDict = dict[str, Tensor]
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
    """Fills a student with weights from a file: a public EfficientAT checkpoint (.pt) or our own .safetensors.

    Every name and shape must agree. With ``new_classes`` the layer that gives the classes is not taken from the file but
    initialised anew, whatever number of classes the file has, and a warning says so.

    Raises ValueError, saying what differs and which student the file fits, if it does not fit this one.
    """
    fill_weights(student, read_state_dict(path), str(path), new_classes)


def fill_weights(
    student: Student, state: StateDict, origin: str, new_classes: bool = False, catalog: Catalog = STUDENTS
) -> None:
    """``load_weights`` for tensors that were read already, and for networks of any catalog.

    ``origin`` tells messages where the tensors come from.
    """
    config = _config_of(student)
    _refuse_other_shapes(student, state, origin, catalog, new_classes)
    if new_classes:
        replaced = _class_dependent_names(catalog, config)
        fresh = catalog.create(config.name, config.num_classes, **config.options).state_dict()
        state = state | {name: fresh[name] for name in replaced}
        _log.warning(
            "%s: not loaded but initialised anew for %d classes: %s", origin, config.num_classes, ", ".join(replaced)
        )
    student.load_state_dict(state)


def _refuse_other_shapes(
    student: Student, state: StateDict, origin: str, catalog: Catalog, new_classes: bool = False
) -> None:
    """ValueError unless every name and shape agrees, except for those of the classes with ``new_classes``."""
    config = _config_of(student)
    if _shapes_of(state) == _shapes_of(student.state_dict()):
        return
    num_classes = _fitting_num_classes(catalog, config.name, config.options, state)
    if num_classes is None:
        raise ValueError(_describe_mismatch(catalog, student, config, state, origin))
    if not new_classes:
        raise ValueError(
            f"{origin} has {num_classes} classes, the {catalog.kind} {config.num_classes}; create it with"
            f" {num_classes} classes, or ask for new_classes, which initialises the last layer anew"
        )


def _config_of(student: Student) -> StudentConfig:
    if student.config is None:
        raise ValueError("this student carries no configuration; build it with create_student")
    return student.config


def _shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(value.shape) for name, value in state.items()}


def _catalog_shapes(catalog: Catalog, name: str, num_classes: int, options: Mapping[str, Any]) -> Shapes:
    if not options:
        return _default_shapes(catalog, name, num_classes)
    with torch.device("meta"):  # shapes without memory or random numbers
        return _shapes_of(catalog.create(name, num_classes, **options).state_dict())


@functools.cache  # a whole catalog is gone through to say what a file fits
def _default_shapes(catalog: Catalog, name: str, num_classes: int) -> Shapes:
    with torch.device("meta"):
        return _shapes_of(catalog.create(name, num_classes).state_dict())


def _class_dependent_names(catalog: Catalog, config: StudentConfig) -> list[str]:
    """The names of the tensors whose shape depends on the number of classes: those of the last layer."""
    two, three = (_catalog_shapes(catalog, config.name, number, config.options) for number in (2, 3))
    return [name for name in two if two[name] != three[name]]


def _fitting_num_classes(
    catalog: Catalog, name: str, options: Mapping[str, Any], state: Mapping[str, Tensor]
) -> int | None:
    """The number of classes with which a catalog entry has exactly the shapes of ``state``; None if with no number."""
    found = _shapes_of(state)
    two = _catalog_shapes(catalog, name, 2, options)
    if found.keys() != two.keys():
        return None
    three = _catalog_shapes(catalog, name, 3, options)
    # One size that depends on the classes gives their number, as it is linear in it; the comparison settles the rest.
    key = next(key for key in two if two[key] != three[key])
    if len(found[key]) != len(two[key]):
        return None
    axis = next(axis for axis, size in enumerate(two[key]) if size != three[key][axis])
    num_classes, remainder = divmod(found[key][axis] - two[key][axis], three[key][axis] - two[key][axis])
    num_classes += 2
    if remainder or num_classes < 1 or _catalog_shapes(catalog, name, num_classes, options) != found:
        return None
    return num_classes


def _describe_mismatch(catalog: Catalog, student: Student, config: StudentConfig, state: StateDict, origin: str) -> str:
    wanted, found = _shapes_of(student.state_dict()), _shapes_of(state)
    lines = [f"{origin} does not hold the weights of {config.name} with the chosen options"]
    differences = {
        "missing": [name for name in wanted if name not in found],
        f"not known to the {catalog.kind}": [name for name in found if name not in wanted],
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
    for name in catalog.names():
        num_classes = _fitting_num_classes(catalog, name, {}, state)
        if num_classes is not None:
            lines.append(f"it fits {name} with {num_classes} classes")
    return "; ".join(lines)


# --- ImageNet ----------------------------------------------------------------------------------------------------------

_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def imagenet_architecture(student: Student) -> str:
    """timm's name of the network whose ImageNet weights ``load_imagenet_weights`` takes; ValueError if there is none."""
    if isinstance(student, EfficientNet):
        return student.architecture
    if isinstance(student, MN):
        return "mobilenetv3_large_100"
    raise ValueError(
        f"there are no ImageNet weights for {type(student).__name__}; they are for MN of width 1 and timm's image networks"
    )


def load_imagenet_weights(student: Student, timm_state_dict: Mapping[str, Tensor]) -> None:
    """Initialises a student from the state dict of timm's ``imagenet_architecture(student)``.

    The last layer, and all of a head that ImageNet's network does not have, stays as it is.

    An image network takes its own weights, the stem's kernels averaged over colour. An MN of width 1 takes those of
    MobileNetV3-Large, the stem's kernels summed over colour, so that a spectrogram is seen as a grey picture. The latter are
    not quite the same network: timm's batch norms have epsilon 1e-5 (ours 1e-3), its squeeze-excitation a hard sigmoid
    (ours a sigmoid).

    Raises ValueError for another student and for another network's weights.
    """
    imagenet_architecture(student)
    wanted = student.state_dict()
    if isinstance(student, EfficientNet):
        student.load_state_dict(wanted | student.imagenet_features(timm_state_dict))
        return
    filled: StateDict = {}
    for name, timm_name in _timm_names(has_mlp_head="classifier.2.weight" in wanted).items():
        if name not in wanted:
            raise ValueError(f"ImageNet weights need squeeze-excitation over channels (se_dims 'c'); no {name} here")
        if timm_name not in timm_state_dict:
            raise ValueError(f"these are not the weights of timm's mobilenetv3_large_100: {timm_name} is missing")
        value = timm_state_dict[timm_name]
        if timm_name == "conv_stem.weight":
            value = value.sum(dim=1, keepdim=True)
        if value.numel() != wanted[name].numel():
            raise ValueError(
                f"ImageNet weights fit an MN of width 1 with se_reduction 4: {timm_name} has shape"
                f" {tuple(value.shape)}, {name} here {tuple(wanted[name].shape)}"
            )
        filled[name] = value.reshape(wanted[name].shape)  # timm's linear layers are 1×1 convolutions
    if extra := [name for name in wanted if name.startswith("features.") and name not in filled]:
        raise ValueError(f"ImageNet weights need squeeze-excitation over channels alone; {extra[0]} has no counterpart")
    student.load_state_dict(wanted | filled)


def _timm_names(has_mlp_head: bool) -> dict[str, str]:
    """Names of an MN's tensors -> names of the same tensors in timm's mobilenetv3_large_100."""
    names: dict[str, str] = {}

    def pair_norm_layer(ours: str, timm_conv: str, timm_norm: str) -> None:
        names[f"{ours}.0.weight"] = f"{timm_conv}.weight"
        names.update({f"{ours}.1.{tensor}": f"{timm_norm}.{tensor}" for tensor in _NORM_TENSORS})

    def pair_linear(ours: str, timm_layer: str) -> None:
        names.update({f"{ours}.{tensor}": f"{timm_layer}.{tensor}" for tensor in ("weight", "bias")})

    pair_norm_layer("features.0", "conv_stem", "bn1")
    timm_blocks = [
        f"blocks.{stage}.{block}" for stage, depth in enumerate((1, 2, 3, 4, 2, 3)) for block in range(depth)
    ]
    for number, (stage, timm_block) in enumerate(zip(STAGES, timm_blocks, strict=True), start=1):
        block = f"features.{number}.block"
        convolutions = ["conv_dw", "conv_pw"] if number == 1 else ["conv_pw", "conv_dw", "conv_pwl"]
        for position, convolution in enumerate(convolutions):
            # Squeeze-excitation, where there is one, stands before the projection.
            place = position + 1 if stage.has_se and convolution == "conv_pwl" else position
            pair_norm_layer(f"{block}.{place}", f"{timm_block}.{convolution}", f"{timm_block}.bn{position + 1}")
        if stage.has_se:
            pair_linear(f"{block}.2.conc_se_layers.0.fc1", f"{timm_block}.se.conv_reduce")
            pair_linear(f"{block}.2.conc_se_layers.0.fc2", f"{timm_block}.se.conv_expand")
    pair_norm_layer(f"features.{len(STAGES) + 1}", "blocks.6.0.conv", "blocks.6.0.bn1")
    if has_mlp_head:
        pair_linear("classifier.2", "conv_head")
    return names


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


def read_card(folder: str | Path) -> StudentCard:
    """A saved student's card without its weights. Raises ValueError if the folder holds no student."""
    return _card(*_read_card_file(folder))


def load_student(folder: str | Path, catalog: Catalog = STUDENTS) -> tuple[Student, StudentCard]:
    """A saved student, or network of another catalog, on the CPU in evaluation mode, and its card.

    Raises ValueError if the folder holds no student, or if weights and card do not belong together.
    """
    path, content = _read_card_file(folder)
    card = _card(path, content)
    weights = path.with_name(WEIGHTS_FILE)
    state = read_state_dict(weights)
    _refuse_other_shapes(outline(folder, card, catalog), state, str(weights), catalog)
    student = catalog.create(card.config.name, card.config.num_classes, **card.config.options)
    student.load_state_dict(state)
    if weights_fingerprint(student) != content.get("weights_fingerprint"):
        raise ValueError(
            f"{path} and {WEIGHTS_FILE} beside it do not belong together: the weights are not those that the card was"
            " written for (was saving interrupted, or one of them replaced?)"
        )
    return student.eval(), card


def outline(folder: str | Path, card: StudentCard, catalog: Catalog = STUDENTS) -> Student:
    """The student of a card on the device "meta": its shapes without memory, of which a damaged card may ask for any amount.

    Raises ValueError, naming the card in ``folder``, if there is no such student.
    """
    try:
        with torch.device("meta"):
            return catalog.create(card.config.name, card.config.num_classes, **card.config.options)
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


def _card(path: Path, content: Mapping[str, Any]) -> StudentCard:
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
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} is incomplete or damaged: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
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
