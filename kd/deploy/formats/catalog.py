"""The formats by name: what is refused before anything is exported, and what is written and compared."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from kd.deploy.exporting.clips import ClipSet
from kd.deploy.exporting.parity import (
    compare,
    effect_of_rounding,
    pytorch_network,
    refuse_float_difference,
)
from kd.deploy.exporting.runtime import ExportedModel
from kd.deploy.exporting.subject import Subject
from kd.deploy.formats import coreml, huggingface, litert, ort
from kd.deploy.formats.base import Format, Source
from teacher_logits.teachers.export_folder import MODEL_FILE, ExportCard

FormatName = Literal["ort", "litert", "coreml", "huggingface"]
FORMATS: dict[str, Format] = {module.FORMAT.name: module.FORMAT for module in (ort, litert, coreml, huggingface)}
COMPARED_CLIPS = 8


def refuse_formats(names: Sequence[str], subject: Subject) -> None:
    """Raises ValueError if a format cannot be written: a package is missing, or the student does not fit it."""
    for name in names:
        form = FORMATS[name]
        missing = [module for module in form.modules if importlib.util.find_spec(module) is None]
        if missing:
            raise ValueError(f"--format {name} needs {', '.join(missing)}: {form.install}")
        if reason := form.refusal(subject):
            raise ValueError(f"--format {name} does not fit this student: {reason}")


def write_formats(
    names: Sequence[str], subject: Subject, card: ExportCard, folder: Path, clips: ClipSet
) -> dict[str, dict[str, Any]]:
    """Writes each format into ``folder``, runs it in its own runtime and compares it; what ``parity.json`` says of each.

    model.ort is compared with model.onnx, whose weights it has; the others, which have float32 weights, with PyTorch. Raises
    ValueError for one that disagrees.
    """
    found = {}
    for name in dict.fromkeys(names):
        source = Source(subject, card, folder, clips.first(COMPARED_CLIPS))
        converted = FORMATS[name].convert(source)
        row: dict[str, Any] = {"file": converted.path.name, "bytes": _size(converted.path), "note": converted.note}
        if converted.network is not None:
            if name == "ort":
                model = ExportedModel(folder / MODEL_FILE, subject.frontend)
                reference, against = (lambda windows, model=model: model(windows)[1]), MODEL_FILE
            else:
                reference, against = pytorch_network(subject.student, subject.frontend), "PyTorch"
            parity = compare(reference, converted.network, source.clips, subject.label_space, name)
            refuse_float_difference(
                parity,
                f"the {name} model",
                lambda source=source: effect_of_rounding(subject.student, subject.frontend, source.clips),
            )
            row |= {
                "compared_with": against,
                "clips": parity.description,
                "largest_logit_difference": parity.largest_difference,
                "top1_agreement": parity.top1_agreement,
            }
        found[name] = row
    return found


def describe(row: dict[str, Any]) -> str:
    """One line about a format that was written."""
    text = f"{row['file']}: {row['bytes'] / 1e6:.2f} MB"
    if "compared_with" in row:
        text += f", logits differ from those of {row['compared_with']} by at most {row['largest_logit_difference']:.2g}"
    return f"{text}; {row['note']}" if row["note"] else text


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
