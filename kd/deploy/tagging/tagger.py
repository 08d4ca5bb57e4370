"""``Tagger``: tags of files and waveforms by a trained student or an export.

Shapes: C classes, E embedding size, S samples of a window, W windows of a clip.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from kd.data.windows import Window
from kd.deploy.streaming.event_stream import EventStream, StreamSettings
from kd.deploy.tagging.ahead import ahead
from kd.deploy.tagging.audio import CutClip, as_waveforms, cut_file, cut_waveform
from kd.deploy.tagging.model import TaggingModel, load_model, with_threshold, with_window
from kd.deploy.tagging.tags import Tags, tags_of_windows

BATCH_WINDOWS = 8
"""Windows that are computed at once. They are always of one clip, so that a clip's tags do not depend on other clips."""
BATCHES_AHEAD = 8
"""Batches that wait, decoded, to be computed."""


@dataclass(frozen=True)
class UnusableFile:
    """A file that could not be tagged."""

    reason: str


class Tagger:
    """Tags files and waveforms. Windows, padding and averages are those of evaluation.

    ``Tagger.load("runs/mine")("street.wav").top(5)``
    """

    def __init__(self, model: TaggingModel) -> None:
        self.model = model

    @classmethod
    def load(
        cls,
        model: str | PathLike,
        *,
        class_names: Sequence[str] | None = None,
        window_seconds: float | None = None,
        device: str = "auto",
        threads: int | None = None,
        threshold: float | None = None,
    ) -> "Tagger":
        """
        Args:
            model: a run folder, an export folder, or NAME@WEIGHTS (as mn04@mn04_as_mAP_432.pt).
            class_names: the classes of bare weights; read from AudioSet's class list beside them, or else numbered, if left out.
            window_seconds: length of the windows; that of the student's evaluation if left out.
            device: "cpu", "cuda" …; "auto" takes a GPU if there is one.
            threads: threads that compute on the CPU.
            threshold: one threshold for all classes, in place of the model's own.

        Raises:
            ValueError: no such model, a damaged one, or an argument that does not go with it.
        """
        loaded = load_model(model, class_names, device=device, threads=threads)
        if window_seconds is not None:
            loaded = with_window(loaded, window_seconds)
        if threshold is not None:
            loaded = with_threshold(loaded, threshold)
        return cls(loaded)

    @property
    def class_names(self) -> tuple[str, ...]:
        """(C,)"""
        return self.model.class_names

    @property
    def window(self) -> Window:
        return self.model.window

    @property
    def thresholds(self) -> np.ndarray:
        """(C,) on the scores: chosen on the run's validation clips, or 0.5 (``model.thresholds_from`` tells)."""
        return self.model.thresholds

    def __call__(self, audio: Any, sample_rate_hz: int | None = None) -> Tags | list[Tags]:
        """The tags of a file, or of a waveform at ``sample_rate_hz``; a list of them for a batch of waveforms.

        Args:
            audio: a path, or a NumPy or torch array (samples,) or (batch, samples): floating point with full scale 1, or int16.

        Raises:
            ValueError: audio that cannot be decoded, has no samples, NaN or infinite ones; a waveform without its rate.
            OSError: a file that cannot be opened.
        """
        if isinstance(audio, str | PathLike):
            if sample_rate_hz is not None:
                raise ValueError("a file knows its rate; leave sample_rate_hz out")
            return self._tags(cut_file(Path(audio), self.window))
        waveforms = as_waveforms(audio, sample_rate_hz)
        found = [self._tags(cut_waveform(waveform, int(sample_rate_hz), self.window)) for waveform in waveforms]
        return found[0] if np.ndim(audio) == 1 else found

    def tag_files(self, paths: Iterable[Path]) -> Iterator[tuple[Path, Tags | UnusableFile]]:
        """Each file with its tags, in order. Files are decoded in a thread of their own, ahead of the computation."""
        clip, outputs = None, []
        for item in ahead(self._decoded(paths), BATCHES_AHEAD):
            if isinstance(item, np.ndarray):
                outputs.append(self._compute(item))
            elif isinstance(item, CutClip):
                clip, outputs = item, []
            else:
                path, error = item
                yield path, self._of_outputs(clip, outputs) if error is None else UnusableFile(error)

    def stream(self, sample_rate_hz: int, settings: StreamSettings | None = None) -> EventStream:
        """Events of samples that are fed to it piece by piece. ValueError for a rate or a window that cannot be."""
        return EventStream(self.model, sample_rate_hz, settings)

    def _decoded(self, paths: Iterable[Path]) -> Iterator[CutClip | np.ndarray | tuple[Path, str | None]]:
        """For each file a CutClip and the batches (W, S) of its windows, and then its path and, if it is unusable, why."""
        for path in paths:
            try:
                clip = cut_file(path, self.window)
                yield clip
                yield from batches(clip.waveforms)
            except (ValueError, OSError) as error:
                reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                yield path, reason
            else:
                yield path, None

    def _tags(self, clip: CutClip) -> Tags:
        return self._of_outputs(clip, [self._compute(batch) for batch in batches(clip.waveforms)])

    def _of_outputs(self, clip: CutClip, outputs: list[tuple[np.ndarray, np.ndarray]]) -> Tags:
        logits, embeddings = (np.concatenate(values) for values in zip(*outputs, strict=True))
        model = self.model
        return tags_of_windows(model.label_space, model.thresholds, clip, model.window.seconds, logits, embeddings)

    def _compute(self, waveforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(W, S) -> logits (W, C), embeddings (W, E). ValueError for logits that are not finite."""
        logits, embeddings = self.model.run(waveforms)
        if not np.isfinite(logits).all():
            raise ValueError(f"the logits of {self.model.name} are not finite (damaged weights?)")
        return logits, embeddings


def batches(waveforms: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """(S,) each -> (at most ``BATCH_WINDOWS``, S) each"""
    while batch := list(islice(waveforms, BATCH_WINDOWS)):
        yield np.stack(batch)
