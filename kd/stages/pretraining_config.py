"""The settings of a pretraining run."""

from dataclasses import dataclass
from pathlib import Path

from kd.stages import stage_config
from kd.stages.stage_config import StageConfig


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(StageConfig):
    """Train a student on labels and teacher logits."""

    clips: tuple[Path, ...]
    """Clip stores with the training clips; several count as one."""
    split: str | None = None
    """Train on the clips of this split of the manifest only."""
    folds: tuple[int, ...] = ()
    """Train on the clips of these folds only."""
    valid_clips: Path | None = None
    """Clip store to validate on (the training store if left out and a validation split or folds are given)."""
    valid_split: str | None = None
    """Validate on the clips of this split."""
    valid_folds: tuple[int, ...] = ()
    """Validate on the clips of these folds."""
    class_names: Path | None = None
    """Class list for clip stores that carry none (the PaSST layout)."""
    clip_seconds: float = 10.0
    """Length that training clips are cropped or padded to; with stored views, theirs."""
    seed: int = 0
    """Seed of everything random."""
    log_with: tuple[str, ...] = ()
    """Trackers of Accelerate to log to besides metrics.jsonl, as tensorboard."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed < 0:
            raise ValueError(f"seed must not be negative; found {self.seed}")
        # A recipe on its own (and the command line's defaults) have no clips yet, and so no logits.
        has_clips = isinstance(self.clips, tuple) and len(self.clips) > 0
        if has_clips and not self.logits and self.distillation.label_weight < 1.0:
            raise ValueError(
                f"label_weight is {self.distillation.label_weight}, but no --logits are given; give teacher logits, or "
                "--label-weight 1 to train on labels alone"
            )
        if self.augment.in_pairs and self.loop.batch_size % 2:
            raise ValueError(
                f"batch_size must be at least 2 (batch normalisation), and even with mixup (clips are mixed in pairs); "
                f"found {self.loop.batch_size}"
            )


CHANGES_NOTHING = (*stage_config.CHANGES_NOTHING, "log_with", "clips", "valid_clips", "class_names")
"""Settings that a run may go on with otherwise, since they do not change what is trained."""
