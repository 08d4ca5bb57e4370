"""The settings of ``kd distill``, and what they mean for the commands that it runs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from audio_datasets.audio.bad_clips import OnBadClip
from audio_datasets.command_line.help_pages import HelpGroups
from kd.stages.stage_config import Flat
from students.frontend import LogMelConfig
from teacher_logits.stores.links import LinkKind

PASSES = 60
FEWEST_STEPS = 600
MOST_STEPS = 20_000


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distil a small student from a folder of sounds of which some are labelled.

    A teacher is made from the labels and the given pretrained weights; it labels all clips, and the student learns from both.
    For comparison another student learns from the labels alone.
    """

    help_groups: ClassVar[HelpGroups] = {
        "Data": (
            "data",
            "out",
            "unlabelled",
            "test_share",
            "fold",
            "labels_per_class",
            "label_seed",
            "allow_outside",
            "on_bad_clip",
        ),
        "Teacher": (
            *("teacher_weights", "teacher", "teacher_epochs", "class_map", "teacher_class_names", "teacher_link"),
        ),
        "Student": (
            "student",
            "steps",
            "batch_size",
            "learning_rate",
            "clip_seconds",
            "label_weight",
            "labels_alone",
            "seed",
        ),
        "Run": ("workers", "dry_run", "restart"),
    }
    main_options: ClassVar[tuple[str, ...]] = (
        *("data", "out", "unlabelled", "teacher_weights", "teacher", "student", "steps", "labels_alone", "dry_run"),
    )

    data: Path
    """Folder with one sub-folder of sounds per class, and clips without labels in a sub-folder "unlabelled"; or a manifest
    (CSV or Parquet), or a folder in the layout of ESC-50 or another task."""
    teacher_weights: str
    """What the teacher starts from: a weights file whose name begins with its student's (mn04_as_mAP_432.pt), NAME@WEIGHTS, or a
    run folder."""
    out: Path = Path("runs/distill")
    """Folder to write. The student is in its sub-folder "distilled"."""
    unlabelled: Path | None = None
    """Folder with more sounds without labels, at any depth."""
    student: str = "mn01"
    """Student of the catalog to train."""
    teacher: Literal["probe", "finetune", "given"] = "probe"
    """How the teacher is made: probe fits a linear classifier on the frozen network (seconds); finetune trains the network; given
    takes the network as it is, if it knows your classes already (by their names, or by --class-map)."""
    teacher_epochs: int = 20
    """Epochs that a fine-tuned teacher is trained."""
    class_map: Path | None = None
    """For a given teacher: CSV file (columns teacher_class, class) that maps its classes to yours."""
    teacher_class_names: Path | None = None
    """For a given teacher whose weights have no class list (AudioSet's class_labels_indices.csv, or one name a line)."""
    teacher_link: LinkKind | None = None
    """For a given teacher that does not tell: the activation that it was trained with."""
    allow_outside: bool = False
    """Allow a manifest to name files outside its own folder, by an absolute path or through ".."."""
    labels_per_class: int | None = None
    """Use only this many labels per class for training, and treat the other clips as unlabelled (for experiments)."""
    label_seed: int = 0
    """Which labels those are."""
    test_share: float = 0.2
    """Share of the labelled clips held out for testing, if the data have neither splits nor folds and at least 5 labels per
    class. With fewer labels the test is a cross-validation."""
    fold: tuple[int, ...] = ()
    """Data with folds: test only these."""
    steps: int | None = None
    """Training steps of each student (default: 60 passes over all clips, at least 600 and at most 20,000 steps)."""
    batch_size: int = 16
    """Clips per step."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    clip_seconds: float | None = None
    """Length that training clips are cropped or padded to (default: decided by the clips' lengths)."""
    label_weight: float = 0.1
    """Weight of the label loss in the distilled student's loss; the rest is the teacher's."""
    labels_alone: bool = True
    """Also train a student on the labels alone, to compare with."""
    seed: int = 0
    """Seed of the students."""
    on_bad_clip: OnBadClip = "refuse"
    """A clip that cannot be decoded: refuse stops and names it; skip leaves it out and lists it."""
    workers: int = 2
    """Data-loading processes."""
    dry_run: bool = False
    """Only say what would be done and what it would take."""
    restart: bool = False
    """If the folder holds a run with other settings, delete that run and start over."""
    frontend: Annotated[LogMelConfig, Flat] = field(default_factory=LogMelConfig)

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 2), ("teacher_epochs", 1), ("label_seed", 0), ("seed", 0), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; found {getattr(self, name)}")
        for name in ("steps", "labels_per_class"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; found {getattr(self, name)}")
        if not 0.0 < self.test_share < 1.0:
            raise ValueError(f"test_share must be between 0 and 1; found {self.test_share}")
        if not 0.0 <= self.label_weight < 1.0:
            raise ValueError(
                f"label_weight must be at least 0 and below 1, or the teacher would not count; found {self.label_weight}"
            )
        if self.teacher != "given":
            for name in ("class_map", "teacher_class_names", "teacher_link"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"--{name.replace('_', '-')} is for --teacher given; --teacher {self.teacher} learns your classes"
                    )
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive; found {self.learning_rate}")

    def steps_for(self, clips: int) -> int:
        """Training steps of a student on so many clips."""
        return self.steps or min(MOST_STEPS, max(FEWEST_STEPS, PASSES * clips // self.batch_size))
