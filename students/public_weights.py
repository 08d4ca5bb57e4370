"""Public AudioSet weights that our students load, by name, and where on this machine they are (docs/weights.md)."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

WEIGHTS_DIR = "KD_WEIGHTS_DIR"
"""Environment variable: the folder with downloaded weights."""
SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")
EFFICIENTAT = "https://github.com/fschmid56/EfficientAT/releases"
PASST = "https://github.com/kkoutini/PaSST/releases"


@dataclass(frozen=True)
class PublicWeights:
    """One public checkpoint with AudioSet's 527 classes."""

    student: str
    """Name of the student in the catalog, or of its family."""
    mean_average_precision: float
    """On AudioSet's evaluation set, as published."""
    source: str = EFFICIENTAT
    licence: str = "MIT"
    sha256: str | None = None
    """Of the published file, if we have seen it."""


PUBLIC_WEIGHTS = {
    "mn04_as": PublicWeights("mn04", 0.432, sha256="899a8c6217063f6941793102a2780b3dd788ab11fce468d9cf5f0577c453321c"),
    "mn05_as": PublicWeights("mn05", 0.443),
    "mn10_as": PublicWeights("mn10", 0.471),
    "mn20_as": PublicWeights("mn20", 0.478),
    "mn30_as": PublicWeights("mn30", 0.482),
    "mn40_as": PublicWeights("mn40", 0.484),
    "mn40_as_ext": PublicWeights("mn40", 0.487),
    "dymn04_as": PublicWeights("dymn04", 0.450),
    "dymn10_as": PublicWeights("dymn10", 0.477),
    "dymn20_as": PublicWeights("dymn20", 0.493),
    "passt_s_swa_p16_128_ap476": PublicWeights("passt_s", 0.476, PASST, "Apache-2.0"),
    "passt_s_swa_p16_s16_128_ap473": PublicWeights("passt", 0.473, PASST, "Apache-2.0"),
    "passt_s_swa_p16_s14_128_ap471": PublicWeights("passt", 0.471, PASST, "Apache-2.0"),
    "passt_s_swa_p16_s12_128_ap473": PublicWeights("passt", 0.473, PASST, "Apache-2.0"),
}
"""The weights by the names that their authors gave them; their files are called so too, some with "_mAP_…" at the end."""


def find_weights(given: str | Path) -> Path:
    """The weights file at a path, or the one of this name in the folder that ``KD_WEIGHTS_DIR`` names.

    ``mn04_as`` finds ``mn04_as.pt`` and ``mn04_as_mAP_432.pt``, and ``mn04_as_mAP_432.pt`` that file.

    Raises ValueError if there is no such file, or several; says where to get public weights. Also raises ValueError for a file that
    was found by its public name and is not the published one, where its SHA-256 is known.
    """
    path, folder = Path(given), os.environ.get(WEIGHTS_DIR)
    if path.is_file() or path.name != str(given):
        return _existing(path)
    found = [file for file in sorted(Path(folder).glob("*")) if _is_called(file, path)] if folder else []
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(
            f"{WEIGHTS_DIR} ({folder}) has several files for the weights {given}: {names}; give one of them"
        )
    if not found:
        raise ValueError(_where_to_get(path, folder))
    known = PUBLIC_WEIGHTS.get(path.name)
    if known is not None and known.sha256 is not None:
        digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
        if digest != known.sha256:
            raise ValueError(
                f"{found[0]} is not the published {given}: its SHA-256 is {digest}, not {known.sha256}. Was the download cut "
                f"off? Weights of your own are given by their path. The published file: {known.source}"
            )
    return found[0]


def student_of(weights: str | Path) -> str | None:
    """The student that public weights fit, told by their name or their file's; None for other weights."""
    name = Path(weights).name
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    known = PUBLIC_WEIGHTS.get(name.partition("_mAP_")[0])
    return known.student if known is not None and known.student != "passt" else None


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"no such weights file: {path}")
    return path


def _is_called(file: Path, name: Path) -> bool:
    if file.suffix not in SUFFIXES or not file.is_file():
        return False
    return file.name == name.name or file.stem == name.name or file.stem.startswith(f"{name.name}_mAP_")


def _where_to_get(name: Path, folder: str | None) -> str:
    message = f"no such weights file: {name}"
    if name.suffix in SUFFIXES and folder is None:
        return message
    looked = f"there is none of this name in {folder} ({WEIGHTS_DIR})" if folder else f"{WEIGHTS_DIR} is not set"
    known = PUBLIC_WEIGHTS.get(name.name)
    if known is None:
        return f"{message}; {looked}. Give a file, or the name of public weights: {', '.join(PUBLIC_WEIGHTS)}"
    return (
        f"{message}; {looked}. {name} are public weights ({known.licence} licence): download them from {known.source} into a "
        f"folder, and set {WEIGHTS_DIR} to that folder or give the file's path"
    )
