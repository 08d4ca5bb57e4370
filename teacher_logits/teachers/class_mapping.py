"""Teachers with other class names, used through an explicit map from their classes to the classes of the clips.

The logit of a target class is the maximum over the teacher classes that are mapped to it. A clip has the target if it has any
of them. The maximum belongs to the most probable one. Its probability never exceeds that of the union, and equals it
for nested classes, as in AudioSet's ontology. (A mean would lower a target with every additional teacher class; a
sum of probabilities would count nested classes twice.) For a teacher trained with a softmax, whose classes exclude each other, the
sum of probabilities is exact, and is taken.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audio_datasets.stores.class_lists import check_class_names, class_list_difference
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.system.messages import listed
from audio_datasets.system.paths.inputs import read_regular
from audio_datasets.tasks.unlabelled import SoundFolder
from teacher_logits.teachers.base import Teacher
from teacher_logits.teachers.loaders import load_teacher

COLUMNS = ("teacher_class", "class")

ClassMap = dict[str, tuple[str, ...]]
"""For each class, the teacher classes over which the maximum is taken."""


def read_class_map(path: Path) -> ClassMap:
    """The map in a CSV file with the columns ``teacher_class`` and ``class``, one row for each pair.

    A teacher class may be mapped to several classes, and a class may have several teacher classes.

    Raises ValueError, with path and line, for a missing file or column, an empty entry, or a repeated pair.
    """
    path = Path(path)
    try:
        text = read_regular(path).decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"no such class map: {path}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    class_map: ClassMap = {}
    try:
        if set(rows.fieldnames or ()) != set(COLUMNS):
            raise ValueError(f"{path}: a class map must have the columns {', '.join(COLUMNS)}; found {rows.fieldnames}")
        for row in rows:
            teacher_class, name = ((row[column] or "").strip() for column in COLUMNS)
            if not teacher_class or not name or None in row:
                raise ValueError(f"{path}, line {rows.line_num}: expected a teacher class and a class; found {row}")
            if teacher_class in class_map.get(name, ()):
                raise ValueError(f"{path}, line {rows.line_num}: {teacher_class!r} -> {name!r} occurs twice")
            class_map[name] = (*class_map.get(name, ()), teacher_class)
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: {error}") from error
    if not class_map:
        raise ValueError(f"class map {path} is empty")
    return class_map


class MappedTeacher(Teacher):
    """A teacher whose logits are mapped to other classes: the maximum over the teacher classes of each, or behind a softmax their sum.

    The map and the teacher's original class names are part of ``architecture``, and therefore of the fingerprint.
    """

    def __init__(self, teacher: Teacher, class_names: Sequence[str], class_map: Mapping[str, Sequence[str]]) -> None:
        """Raises ValueError for a class that is not mapped, and for a name in the map that is not a class."""
        names = check_class_names(class_names)
        if missing := [name for name in names if not class_map.get(name)]:
            raise ValueError(f"the class map has no teacher class for {listed(missing)}")
        if unknown := [name for name in class_map if name not in names]:
            raise ValueError(f"the class map names classes that the clips do not have: {listed(unknown)}")
        place_of = {name: place for place, name in enumerate(teacher.class_names)}
        named = dict.fromkeys(name for sources in class_map.values() for name in sources)
        if unknown := [name for name in named if name not in place_of]:
            raise ValueError(
                f"the class map names classes that teacher {teacher.name!r} does not have: {listed(unknown)}"
            )
        self.sums = teacher.link is not None and "softmax" in teacher.link.kinds
        if self.sums and len(teacher.link.kinds) > 1:
            raise ValueError(
                f"a class map is for teachers with one group of classes; teacher {teacher.name!r} has {teacher.link}"
            )
        sources = [source for name in names for source in class_map[name]]
        each_once = sorted(sources) == sorted(teacher.class_names)
        link = teacher.link and ("softmax" if self.sums and each_once else "sigmoid")
        super().__init__(
            teacher.name,
            names,
            sample_rate_hz=teacher.sample_rate_hz,
            clip_seconds=teacher.clip_seconds,
            short_clips=teacher.short_clips,
            frontend=teacher.frontend,
            architecture={
                "teacher": teacher.architecture,
                "teacher_class_names": list(teacher.class_names),
                "class_map": {name: list(class_map[name]) for name in names},
                **({"mapped": "sums of probabilities"} if self.sums else {}),
            },
            link=link,
        )
        self.teacher = teacher
        self.log_mel = teacher.log_mel
        self.is_choosy = teacher.is_choosy
        # (classes, maximum number of teacher classes). Shorter rows repeat their first entry, which changes no maximum.
        most = max(len(class_map[name]) for name in names)
        places = [[place_of[source] for source in class_map[name]] for name in names]
        table = torch.tensor([row + row[:1] * (most - len(row)) for row in places])
        self.register_buffer("table", table, persistent=False)
        is_repeated = torch.tensor([[place >= len(row) for place in range(most)] for row in places])
        self.register_buffer("is_repeated", is_repeated, persistent=False)
        self.eval()

    def forward(self, waveform: Tensor) -> Tensor:
        """(batch, samples) -> (batch, classes)"""
        return self._mapped(self.teacher(waveform))

    def logits_of_mel(self, mel: Tensor) -> Tensor:
        """(batch, 1, bands, frames) -> (batch, classes)"""
        return self._mapped(self.teacher.logits_of_mel(mel))

    def silent_about(self, clip_id: str) -> str | None:
        return self.teacher.silent_about(clip_id)

    def hear_clips(
        self, clip_ids: Sequence[str], waveform: Tensor, band_edges: Tensor | None = None, stripes: Tensor | None = None
    ) -> Tensor:
        return self._mapped(self.teacher.hear_clips(clip_ids, waveform, band_edges, stripes))

    def _mapped(self, logits: Tensor) -> Tensor:
        if not self.sums:
            return logits[:, self.table].amax(2)
        # Classes that exclude each other: a class's probability is the sum of those that are mapped to it.
        parts = torch.log_softmax(logits.double(), dim=1)[:, self.table].masked_fill(self.is_repeated, -torch.inf)
        log_p = parts.logsumexp(2).clamp(max=0.0)
        if self.link.kinds == ("softmax",):
            return log_p.to(logits.dtype)
        return (log_p - torch.log(-torch.expm1(log_p).clamp(max=-1e-12))).to(logits.dtype)


def with_classes_of_clips(
    teacher: Teacher, spec: str, clips: ClipStore | SoundFolder, class_map: Mapping[str, Sequence[str]] | None
) -> Teacher:
    """A teacher with the classes of a clip store: the given one if its classes are the same, otherwise a mapped one.

    Raises ValueError if the classes differ and there is no map, or the map does not fit.
    """
    difference = class_list_difference(clips.class_names, teacher.class_names, str(clips.path), f"teacher {spec}")
    if difference is None:
        return teacher
    if class_map is None:
        raise ValueError(
            f"class lists differ: {difference}; to map the teacher's classes to those of the clips, give --class-map FILE"
        )
    return MappedTeacher(teacher, clips.class_names, class_map)


def load_teacher_as_stored(spec: str, stored: Mapping[str, Any], class_names: Sequence[str]) -> Teacher:
    """The teacher that ``spec`` names, with the clip length and class map from a logit store's description of its teacher.

    ``stored`` is the output of ``Teacher.describe``; ``class_names`` are the store's. Raises ValueError as ``load_teacher`` does.
    """
    clip_seconds, architecture = stored.get("clip_seconds"), stored.get("architecture", {})
    if "class_map" not in architecture:
        return load_teacher(spec, class_names, clip_seconds, cross_fitted="cross_fitted" in architecture)
    cross_fitted = "cross_fitted" in architecture.get("teacher", {})
    teacher = load_teacher(spec, architecture["teacher_class_names"], clip_seconds, cross_fitted=cross_fitted)
    if "mapped" not in architecture:
        teacher.link = None  # as when nothing was known of it, and the maximum was taken
    elif teacher.link is None:
        teacher.tell_link("softmax")
    return MappedTeacher(teacher, class_names, architecture["class_map"])
