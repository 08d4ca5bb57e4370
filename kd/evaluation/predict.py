"""Logits of a tagger over chosen clips of a store, with any number of processes, and the tables made from them."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from audio_datasets.audio.bad_clips import OnBadClip
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.system.command import progress
from audio_datasets.system.stop_signals import outlive_stop_signals
from audio_datasets.system.text_tables import text_table
from kd.data.training_data import EvaluationClips
from kd.evaluation.metrics import TaggingMetrics


def evaluation_loader(
    accelerator: Accelerator,
    clips: ClipStore,
    rows: np.ndarray,
    *,
    sample_rate_hz: int,
    clip_seconds: float,
    batch_size: int,
    workers: int,
    on_bad_clip: OnBadClip = "refuse",
) -> DataLoader:
    """Prepared loader of (index into ``rows``, waveform) batches, divided among the processes."""
    dataset = EvaluationClips(
        clips, rows, sample_rate_hz=sample_rate_hz, clip_seconds=clip_seconds, on_bad_clip=on_bad_clip
    )
    loader = DataLoader(
        dataset,
        batch_size,
        num_workers=workers,
        worker_init_fn=outlive_stop_signals,
        pin_memory=accelerator.device.type == "cuda",
    )
    return accelerator.prepare(loader)


@torch.inference_mode()
def predict_logits(
    accelerator: Accelerator,
    tagger: Callable[[Tensor], Tensor],
    loader: DataLoader,
    num_clips: int,
    description: str,
    before_batch: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Logits of every clip of an ``evaluation_loader``, in the order of its rows; (num_clips, classes) float32.

    Clips that cannot be used and are to be skipped have NaN (see ``skipped_clips``), and no others: a tagger whose logits
    are not finite is a ValueError. Every process gets the whole array. Accelerate fills the last batches up with clips seen before; each row is written
    at its own index, so a clip counts once however the clips were divided.

    Args:
        tagger: (batch, samples) waveform on the accelerator's device -> (batch, classes) logits; in evaluation mode.
        before_batch: called by every process before each batch; may raise, on all of them alike.
    """
    logits = None
    seen = np.zeros(num_clips, dtype=bool)
    for indices, waveform in progress(
        loader, shown=accelerator.is_main_process, desc=description, unit="batch", leave=False
    ):
        before_batch()
        with accelerator.autocast():
            output = tagger(waveform)
        indices, output = (values.cpu().numpy() for values in accelerator.gather((indices, output.float())))
        bad_clip = indices < 0
        indices = np.where(bad_clip, ~indices, indices)
        not_finite = indices[~bad_clip & ~np.isfinite(output).all(axis=1)]
        if len(not_finite):
            clip_id = loader.dataset.clip_id(int(not_finite[0]))
            raise ValueError(f"the tagger's logits are not finite for clip {clip_id!r} (damaged weights?)")
        if logits is None:
            logits = np.zeros((num_clips, output.shape[1]), dtype=np.float32)
        logits[indices] = np.where(bad_clip[:, None], np.nan, output)
        seen[indices] = True
    assert logits is not None
    assert seen.all(), f"{int((~seen).sum())} of {num_clips} clips were not evaluated"
    return logits


def skipped_clips(loader: DataLoader, logits: np.ndarray) -> dict[str, str]:
    """The clips of an ``evaluation_loader`` that ``predict_logits`` has skipped: reason by clip id."""
    dataset: EvaluationClips = loader.dataset
    skipped = np.flatnonzero(np.isnan(logits).any(axis=1))
    return {dataset.clip_id(int(index)): dataset.reason(int(index)) for index in skipped}


def class_table(metrics: TaggingMetrics, class_names: Sequence[str]) -> str:
    """A line per class that occurs: its clips, average precision and ROC AUC; the best first."""
    occurring = np.flatnonzero(metrics.positives)
    rows = [("class", "clips", "AP", "AUC")]
    for index in occurring[np.argsort(-metrics.average_precision[occurring], kind="stable")]:
        numbers = metrics.average_precision[index], metrics.class_roc_auc[index]
        rows.append((class_names[index], str(metrics.positives[index]), *(f"{number:.3f}" for number in numbers)))
    return text_table(rows)


def listed_absent(metrics: TaggingMetrics, at_most: int = 10) -> str:
    """Names the classes without clips, the first few of many."""
    absent = metrics.absent_classes
    if not absent:
        return "every class occurs"
    more = f" and {len(absent) - at_most} more" if len(absent) > at_most else ""
    return f"{len(absent)} classes without clips are left out: {', '.join(absent[:at_most])}{more}"
