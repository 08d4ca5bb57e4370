"""Runs a tagger on chosen clips, with any number of processes, and formats the results as tables."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from audio_datasets.audio.bad_clips import OnBadClip
from audio_datasets.system.command import progress
from audio_datasets.system.text_tables import text_table
from audio_datasets.system.workers.loading import create_loader
from kd.data.windows import Clips, EvaluationWindows, Window
from kd.evaluation.metrics import TaggingMetrics

Tagger = Callable[[Tensor], Tensor]
"""(batch, samples) waveform on the accelerator's device -> (batch, columns), such as logits; in evaluation mode."""


class ClipEvaluator:
    """Applies taggers to chosen clips. Can be called repeatedly."""

    def __init__(
        self,
        accelerator: Accelerator,
        clips: Clips,
        rows: np.ndarray,
        window: Window,
        *,
        batch_size: int,
        workers: int,
        description: str,
        on_bad_clip: OnBadClip = "refuse",
        whole_clips: bool = True,
    ) -> None:
        """
        Args:
            batch_size: windows in a batch of one process.
            whole_clips: average over windows that cover each clip; otherwise only its beginning is used.
        """
        self.accelerator = accelerator
        self.description = description
        shown = accelerator.is_main_process
        self.windows = EvaluationWindows(clips, rows, window, on_bad_clip, whole_clips, shown)
        self.skipped: dict[str, str] = {}
        """The clips that the last call skipped: reason by clip id."""
        on_gpu = accelerator.device.type == "cuda"
        loader = create_loader(self.windows, batch_size=batch_size, workers=workers, on_gpu=on_gpu)
        self._loader = accelerator.prepare(loader)

    def predict(self, tagger: Tagger, before_batch: Callable[[], None] = lambda: None) -> np.ndarray:
        """The tagger's output for each clip, averaged over its windows: (rows, columns) float32, on every process.

        Skipped clips have NaN; no others do.

        Args:
            before_batch: called by every process before each batch. If it raises, it must do so on all processes.

        Raises:
            ValueError: the tagger's output is not finite; the message names the clip.
        """
        values = self._predict_windows(tagger, before_batch)
        bad = np.flatnonzero(np.isnan(values).any(axis=1))
        self.skipped = {self.windows.clip_id(int(number)): self.windows.reason(int(number)) for number in bad}
        return self.windows.mean_of_clips(values)

    @torch.inference_mode()
    def _predict_windows(self, tagger: Tagger, before_batch: Callable[[], None]) -> np.ndarray:
        """(windows, columns). Accelerate fills up the last batches with earlier windows; these overwrite their own rows."""
        values = None
        seen = np.zeros(len(self.windows), dtype=bool)
        shown = self.accelerator.is_main_process
        for numbers, waveform in progress(self._loader, shown=shown, desc=self.description, unit="batch", leave=False):
            before_batch()
            with self.accelerator.autocast():
                output = tagger(waveform)
            gathered = self.accelerator.gather((numbers, output.float()))
            numbers, output = (tensor.cpu().numpy() for tensor in gathered)
            is_bad = numbers < 0
            numbers = np.where(is_bad, ~numbers, numbers)
            not_finite = numbers[~is_bad & ~np.isfinite(output).all(axis=1)]
            if len(not_finite):
                clip_id = self.windows.clip_id(int(not_finite[0]))
                raise ValueError(f"the tagger's logits are not finite for clip {clip_id!r} (damaged weights?)")
            if values is None:
                values = np.zeros((len(self.windows), output.shape[1]), dtype=np.float32)
            values[numbers] = np.where(is_bad[:, None], np.nan, output)
            seen[numbers] = True
        assert values is not None
        assert seen.all(), f"{int((~seen).sum())} of {len(seen)} windows were not evaluated"
        return values


def drop_skipped(rows: np.ndarray, values: np.ndarray, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Removes skipped clips, which have NaN, from the rows and their values (rows, columns).

    Args:
        split: the name of the split, for the message: "training" or "test".

    Raises:
        ValueError: no clip is left.
    """
    usable = ~np.isnan(values).any(axis=1)
    if not usable.any():
        raise ValueError(f"none of the {len(rows)} {split} clips can be used")
    return rows[usable], values[usable]


def class_table(metrics: TaggingMetrics, class_names: Sequence[str]) -> str:
    """A line for each class that occurs, the best first: its clips, average precision and ROC AUC."""
    occurring = np.flatnonzero(metrics.positives)
    rows = [("class", "clips", "AP", "AUC")]
    for index in occurring[np.argsort(-metrics.average_precision[occurring], kind="stable")]:
        numbers = metrics.average_precision[index], metrics.class_roc_auc[index]
        rows.append((class_names[index], str(metrics.positives[index]), *(f"{number:.3f}" for number in numbers)))
    return text_table(rows)


def listed_absent(metrics: TaggingMetrics, at_most: int = 10) -> str:
    """A sentence on classes without clips that names the first ones."""
    absent = metrics.absent_classes
    if not absent:
        return "every class occurs"
    more = f" and {len(absent) - at_most} more" if len(absent) > at_most else ""
    return f"{len(absent)} classes without clips are left out: {', '.join(absent[:at_most])}{more}"
