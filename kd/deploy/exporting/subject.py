"""What is exported: a trained student with all that its user must know, from a run folder or from bare weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from audio_datasets.system.messages import listed
from audio_datasets.tasks.label_space import LabelSpace
from kd.data.windows import Window
from kd.reports.analysis.thresholds import choose_thresholds
from kd.reports.run_reader import Part
from kd.run_folder.predictions import VALIDATION_FILE
from kd.run_folder.results import RESULTS_FILE, Results
from students import create_student, load_weights
from students.card import CARD_FILE, load_student
from students.frontend import LogMelConfig
from students.interface import Student
from teacher_logits.teachers.base import DEFAULT_CLIP_SECONDS
from teacher_logits.teachers.export_folder import is_export_folder

DEFAULT_THRESHOLD = 0.5


@dataclass(frozen=True)
class Subject:
    """A trained student in evaluation mode, and how it is used."""

    name: str
    """What to call it, such as the run folder's name."""
    student: Student
    frontend: LogMelConfig
    label_space: LabelSpace
    window: Window
    """What the student was evaluated with."""
    thresholds: tuple[float, ...]
    """(C,) on the scores."""
    thresholds_from: str
    """"validation" or "default"."""
    provenance: dict[str, Any] = field(default_factory=dict)
    run: Path | None = None
    """The run folder; None for bare weights."""


def read_subject(spec: str, class_names: Sequence[str] | None) -> Subject:
    """What ``kd export`` was asked to export: a run folder, or NAME@WEIGHTS with class names.

    Raises ValueError for anything else, and for a run of several students.
    """
    path = Path(spec)
    if path.is_dir():
        if class_names is not None:
            raise ValueError("--class-names would not be used: the run knows its classes; leave it out")
        return _from_run(path)
    name, separator, weights = spec.partition("@")
    if not separator:
        raise ValueError(f"{spec!r} is neither a run folder nor NAME@WEIGHTS (as mn04@mn04_as_mAP_432.pt)")
    if class_names is None:
        raise ValueError(f"the weights of {spec!r} carry no class names; give them with --class-names FILE")
    student = create_student(name, len(class_names))
    load_weights(student, weights)
    frontend = type(student).published_frontend()
    return Subject(
        name=Path(weights).stem,
        student=student.eval(),
        frontend=frontend,
        label_space=LabelSpace.single(class_names, exclusive=False),
        window=Window(frontend.sample_rate_hz, student.clip_seconds or DEFAULT_CLIP_SECONDS),
        thresholds=(DEFAULT_THRESHOLD,) * len(class_names),
        thresholds_from="default",
        provenance={"weights": Path(weights).name},
    )


def _from_run(folder: Path) -> Subject:
    if not (folder / CARD_FILE).is_file():
        if is_export_folder(folder):
            raise ValueError(f"{folder} is an export already; give the run folder that it was made from")
        students = sorted(card.parent.relative_to(folder).as_posix() for card in folder.glob(f"*/**/{CARD_FILE}"))
        if students:
            raise ValueError(f"{folder} holds several students; name one of its folders: {listed(students)}")
    student = load_student(folder)
    card, provenance = student.card, student.card.provenance
    label_space = _label_space(folder, card.class_names, provenance)
    configured = provenance.get("config") if isinstance(provenance.get("config"), dict) else {}
    short_clips = "repeat" if configured.get("short_clips") == "repeat" else "pad"
    seconds = provenance.get("clip_seconds")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= 3600:
        seconds = student.clip_seconds or DEFAULT_CLIP_SECONDS
    thresholds, thresholds_from = _thresholds(folder, label_space)
    return Subject(
        name=folder.resolve().name,
        student=student,
        frontend=card.frontend,
        label_space=label_space,
        window=Window(card.frontend.sample_rate_hz, float(seconds), short_clips),
        thresholds=thresholds,
        thresholds_from=thresholds_from,
        provenance=dict(provenance),
        run=folder,
    )


def _label_space(folder: Path, class_names: Sequence[str], provenance: dict[str, Any]) -> LabelSpace:
    """From the student's card; from the run's results where an older card does not say; else one multi-label group."""
    found = None
    if "label_groups" in provenance:
        found = LabelSpace.from_json(provenance["label_groups"])
    else:
        for path in (folder, folder.parent, folder.parent.parent):
            if (path / RESULTS_FILE).is_file():
                found = Results.read(path).label_space
                break
    if found is None or found.class_names != tuple(class_names):
        return LabelSpace.single(class_names, exclusive=False)
    return found


def _thresholds(folder: Path, label_space: LabelSpace) -> tuple[tuple[float, ...], str]:
    """Those with the highest F1 on the run's validation clips; 0.5 where there are no such clips, or softmax scores."""
    default = np.full(len(label_space.class_names), DEFAULT_THRESHOLD)
    part = Part(folder, label_space.class_names)
    if not (folder / VALIDATION_FILE).is_file() or any(group.exclusive for group in label_space.groups):
        return tuple(default.tolist()), "default"
    chosen = choose_thresholds([(part, part.validation)])
    values = np.where(np.isnan(chosen.probability), default, chosen.probability)
    return tuple(np.clip(values, 0.0, 1.0).tolist()), "validation"
