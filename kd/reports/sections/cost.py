"""What the student of a run costs: parameters, multiply-accumulates, memory and bytes on disk."""

from dataclasses import dataclass

from kd.reports.run_reader import RunFolder
from students.profile import profile_student
from students.weights import CARD_FILE, WEIGHTS_FILE, StudentCard, outline


@dataclass(frozen=True)
class Cost:
    """What the student of a run costs, for one clip of ``clip_seconds``."""

    parameters: int
    macs: int
    activation_bytes: int
    file_bytes: int
    clip_seconds: float
    n_mels: int
    frames: int


def student_cost(run: RunFolder) -> Cost | None:
    """The cost of the run's student on a clip as long as those it was trained on. None if no student is saved yet.

    Raises:
        ValueError: the saved student cannot process such a clip.
    """
    part = next((part for part in run.parts if part.card is not None), None)
    if part is None:
        return None
    card = part.card
    seconds = clip_seconds(run, card)
    frames = card.frontend.frames(round(seconds * card.frontend.sample_rate_hz))
    student = outline(part.folder, card)
    try:
        profile = profile_student(student, card.frontend.n_mels, frames)
    except ValueError as error:
        raise ValueError(f"{part.folder / CARD_FILE}: {error}") from error
    return Cost(
        parameters=profile.parameters,
        macs=profile.macs,
        activation_bytes=profile.activation_bytes,
        file_bytes=(part.folder / WEIGHTS_FILE).stat().st_size,
        clip_seconds=seconds,
        n_mels=card.frontend.n_mels,
        frames=frames,
    )


def clip_seconds(run: RunFolder, card: StudentCard) -> float:
    """The length of the training clips; 10 s if the run did not record it."""
    return float(card.provenance.get("clip_seconds") or run.config.get("clip_seconds") or 10.0)
