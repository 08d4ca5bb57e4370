"""Finds out which network the teacher's pretrained weights are of."""

from dataclasses import dataclass
from pathlib import Path

from kd.training.transfer import IMAGENET
from students import list_students
from students.card import CARD_FILE, read_card
from students.public_weights import find_weights, student_of


@dataclass(frozen=True)
class TeacherStart:
    """A pretrained network, as other commands take it."""

    name: str
    """Of the student whose network it is."""
    arguments: tuple[str, ...]
    """The options of ``kd finetune`` that name it and its weights."""
    teacher: str
    """What ``kd teach --teacher`` takes."""
    run_folder: Path | None = None
    """The run that holds the weights, if they are of a run."""


def teacher_start(weights: str) -> TeacherStart:
    """Reads ``--teacher-weights``: a run folder, NAME@WEIGHTS, public weights, or a file whose name begins with a student's name.

    Raises:
        ValueError: no such file or folder, or a file name that does not tell which student it is of.
    """
    name, at, file = weights.rpartition("@")
    if at:
        if file != IMAGENET:
            find_weights(file)  # refuses what does not exist, before anything is done
        return TeacherStart(name, ("--student", name, "--weights", file), weights)
    path = Path(weights)
    if path.is_dir():
        if not (path / CARD_FILE).is_file():
            raise ValueError(f"--teacher-weights {path} is a folder without a trained student ({CARD_FILE})")
        return TeacherStart(read_card(path).config.name, ("--init", str(path)), str(path), path)
    find_weights(weights)
    if (public := student_of(weights)) is not None:
        return TeacherStart(public, ("--student", public, "--weights", weights), f"{public}@{weights}")
    stem = path.name.lower()
    fitting = [name for name in list_students() if stem.startswith(name) and not stem.removeprefix(name)[:1].isalnum()]
    if not fitting:
        raise ValueError(
            f"--teacher-weights {weights}: the file's name does not begin with the name of a student, so it is not known which "
            f"network it is of. Write NAME@{weights}, with one of {', '.join(list_students())}"
        )
    name = max(fitting, key=len)
    return TeacherStart(name, ("--student", name, "--weights", weights), f"{name}@{weights}")
