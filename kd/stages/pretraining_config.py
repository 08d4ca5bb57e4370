"""The settings of a pretraining run."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from audio_datasets.command_line.help_pages import HelpGroups
from kd.stages import stage_config
from kd.stages.stage_config import STAGE_GROUPS, StageConfig


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(StageConfig):
    """Train a student on labels and teacher logits."""

    help_groups: ClassVar[HelpGroups] = {
        "Data": ("clips", "out", "split", "folds", "class_names"),
        **STAGE_GROUPS,
        "Validation": ("valid_folds", "valid_split", "valid_clips", "validate_every_epochs"),
    }
    main_options: ClassVar[tuple[str, ...]] = (
        *("clips", "out", "folds", "student", "weights", "logits", "label_weight", "epochs", "batch_size"),
        *(
            "learning_rate",
            "clip_seconds",
            "mixed_precision",
            "workers",
            "valid_folds",
            "valid_clips",
            "seed",
            "restart",
        ),
    )

    clips: tuple[Path, ...]
    """Clip stores with the training clips; several are treated as one."""
    split: str | None = None
    """Train only on the clips of this split of the manifest."""
    folds: tuple[int, ...] = ()
    """Train only on the clips of these folds."""
    valid_clips: Path | None = None
    """Clip store to validate on (default with --valid-split or --valid-folds: the training store)."""
    valid_split: str | None = None
    """Validate on the clips of this split."""
    valid_folds: tuple[int, ...] = ()
    """Validate on the clips of these folds."""
    class_names: Path | None = None
    """Class list for clip stores that carry none (the PaSST layout)."""
    clip_seconds: float = 10.0
    """Crop or pad training clips to this many seconds; must equal the length of stored views."""
    seed: int = 0
    """Seed of all random choices."""
    log_with: tuple[str, ...] = ()
    """Also log to these trackers of Accelerate, such as tensorboard."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed < 0:
            raise ValueError(f"seed must not be negative; found {self.seed}")
        # A recipe on its own (and the command line's defaults) have no clips yet, and so no logits.
        has_clips = isinstance(self.clips, tuple) and len(self.clips) > 0
        needs_logits = not self.has_teacher_beside and self.distillation.label_weight < 1.0
        if has_clips and not self.logits and needs_logits:
            raise ValueError(
                f"label_weight is {self.distillation.label_weight}, but there are no --logits; give teacher logits, or "
                "--label-weight 1 to train on labels alone"
            )
        if self.augment.in_pairs and self.loop.batch_size % 2:
            raise ValueError(
                f"batch_size must be even with mixup, which mixes clips in pairs; found {self.loop.batch_size}"
            )


CHANGES_NOTHING = (*stage_config.CHANGES_NOTHING, "log_with", "clips", "valid_clips", "class_names")
"""Settings that may differ when a run is continued, since they do not change what is trained."""
