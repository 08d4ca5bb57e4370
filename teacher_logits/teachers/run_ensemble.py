"""All students of a run – one for each fold and seed – as one teacher: their mean or, cross-fitted, for each clip the mean of those
that have not been trained on its labels.

A student is right on nearly every clip that it was trained on, and says nothing there that the labels do not say. What it says of a
clip that it has not seen is what it has to teach.

Shapes: B clips, C classes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from audio_datasets.system.files import digest_of, read_json, write_json
from audio_datasets.system.messages import brief
from students.card import CARD_FILE
from teacher_logits.teachers.base import Teacher
from teacher_logits.teachers.network import StudentTeacher, teacher_from_run

RESULTS_FILE = "results.json"
TRAINED_ON_FILE = "trained_on.json"
"""In the folder of a student: the clips whose labels it was trained on."""


def write_trained_on(folder: Path, clip_ids: Sequence[str]) -> None:
    """Writes which clips' labels the student in ``folder`` was trained on."""
    write_json(folder / TRAINED_ON_FILE, {"clips_with_labels": sorted(clip_ids)})


def read_trained_on(folder: Path) -> frozenset[str]:
    """The clips whose labels the student in ``folder`` was trained on; ValueError if that was not recorded."""
    path = folder / TRAINED_ON_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} does not tell which clips its student was trained on ({TRAINED_ON_FILE} is missing: the run was made by an "
            "earlier version); train it again, or leave out --cross-fitted"
        )
    content = read_json(path)
    ids = content.get("clips_with_labels") if isinstance(content, dict) else None
    if not isinstance(ids, list) or not all(isinstance(clip_id, str) for clip_id in ids):
        raise ValueError(f"{path} is damaged: a list of clip ids is needed; found {brief(content)}")
    return frozenset(ids)


def trained_on_by_any(spec: str) -> frozenset[str]:
    """The clips whose labels any student of a run was trained on; none for other teachers and for runs that do not tell."""
    folders = students_of_run(Path(spec)) if Path(spec).is_dir() else []
    return frozenset().union(*(read_trained_on(place) for place in folders if (place / TRAINED_ON_FILE).is_file()))


class RunEnsemble(Teacher):
    """The students of one run as one teacher."""

    def __init__(
        self, name: str, members: Sequence[StudentTeacher], trained_on: Sequence[frozenset[str]] | None = None
    ) -> None:
        """
        Args:
            trained_on: for each student the clips that it may not teach; None: each teaches all.

        Raises:
            ValueError: students of other classes or another front end.
        """
        first = members[0]
        for member in members[1:]:
            if (member.class_names, member.frontend, member.link) != (first.class_names, first.frontend, first.link):
                raise ValueError(
                    f"the students of {name} differ in their classes, front ends or links, so there is no mean of them"
                )
        architecture: dict[str, Any] = {"mean_of": [member.architecture for member in members]}
        if trained_on is not None:
            architecture["cross_fitted"] = digest_of(*(digest_of(*sorted(ids)) for ids in trained_on))
        super().__init__(
            name,
            first.class_names,
            sample_rate_hz=first.sample_rate_hz,
            clip_seconds=max(member.clip_seconds for member in members),
            short_clips=first.short_clips,
            frontend=first.frontend,
            architecture=architecture,
            link=first.link,
        )
        self.log_mel = first.log_mel
        self.members = nn.ModuleList(members)
        self.trained_on = trained_on
        self.is_choosy = trained_on is not None
        self.eval()

    def forward(self, waveform: Tensor) -> Tensor:
        """(B, samples) -> (B, C): the mean of all students' logits"""
        return torch.stack([member(waveform) for member in self.members]).mean(0)

    def logits_of_mel(self, mel: Tensor) -> Tensor:
        """(B, 1, bands, frames) -> (B, C): the mean of all students' logits"""
        return torch.stack([member.logits_of_mel(mel) for member in self.members]).mean(0)

    def silent_about(self, clip_id: str) -> str | None:
        if self.trained_on is None or not all(clip_id in ids for ids in self.trained_on):
            return None
        return "every student of the teacher was trained on its labels"

    def hear_clips(
        self, clip_ids: Sequence[str], waveform: Tensor, band_edges: Tensor | None = None, stripes: Tensor | None = None
    ) -> Tensor:
        """As ``Teacher.hear_clips``; cross-fitted, a clip is heard by those students only that may teach it."""
        if self.trained_on is None:
            return self.hear_view(waveform, band_edges, stripes)
        may_teach = torch.from_numpy(self._may_teach(clip_ids)).to(waveform.device)
        total = torch.zeros(len(waveform), len(self.class_names), device=waveform.device)
        for member, mine in zip(self.members, may_teach, strict=True):
            if mine.any():
                parts = (None if part is None else part[mine] for part in (waveform, band_edges, stripes))
                total[mine] += member.hear_view(*parts).float()
        return total / may_teach.sum(0)[:, None]

    def _may_teach(self, clip_ids: Sequence[str]) -> np.ndarray:
        """(students, B) bool"""
        assert self.trained_on is not None
        allowed = np.array([[clip_id not in ids for clip_id in clip_ids] for ids in self.trained_on])
        assert allowed.any(axis=0).all(), "a clip that no student may teach"
        return allowed


def run_as_teacher(folder: Path, *, cross_fitted: bool = False) -> Teacher:
    """The student of a run folder; the mean of its students if it has several, one for each fold and seed.

    Raises:
        ValueError: a folder without students, or a damaged one; ``cross_fitted`` and a run that does not tell what its students were
            trained on.
    """
    folders = students_of_run(folder)
    if len(folders) == 1 and not cross_fitted:
        return teacher_from_run(folders[0])
    members = [teacher_from_run(place) for place in folders]
    trained_on = [read_trained_on(place) for place in folders] if cross_fitted else None
    name = folder.resolve().name
    return RunEnsemble(f"{name}-cross-fitted" if cross_fitted else name, members, trained_on)


def students_of_run(folder: Path) -> list[Path]:
    """The folders of a run's students: its own, or those that its results name.

    Raises:
        ValueError: results that are damaged, that name a folder outside of the run, or a student that is not there.
    """
    results = folder / RESULTS_FILE
    if (folder / CARD_FILE).is_file() or not results.is_file():
        return [folder]
    content = read_json(results)
    runs = content.get("runs") if isinstance(content, dict) else None
    names = [run.get("folder") if isinstance(run, dict) else None for run in runs] if isinstance(runs, list) else []
    if not names or not all(isinstance(name, str) and "\0" not in name for name in names):
        raise ValueError(f"{results} is damaged: it names no folders of students")
    places = [folder / name for name in names]
    # A linear probe's parts may lie beside it, in the folder of the run.
    root = folder.resolve().parent if folder.name == "probe" else folder.resolve()
    if outside := [name for name, place in zip(names, places, strict=True) if not place.resolve().is_relative_to(root)]:
        raise ValueError(f"{results} is damaged: {brief(outside[0])} is no folder of the run")
    if missing := [name for name, place in zip(names, places, strict=True) if not (place / CARD_FILE).is_file()]:
        raise ValueError(
            f"{folder} has no student in {', '.join(missing)}; {len(names) - len(missing)} of its {len(names)} students are there"
        )
    return places
