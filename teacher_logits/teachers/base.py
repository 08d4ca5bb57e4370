"""What a teacher is: anything that turns waveforms into logits and can say exactly what it is."""

import json
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from audio_datasets.stores.class_lists import check_class_names
from audio_datasets.system.files import digest_of
from students.frontend import LogMel, mask_stripes
from students.weights import weights_fingerprint

DEFAULT_CLIP_SECONDS = 10.0  # the clips of AudioSet, which most teachers were trained on


class Teacher(nn.Module):
    """Base of all teachers: waveform (batch, samples) -> logits (batch, classes), before sigmoid or softmax.

    Subclasses call ``super().__init__`` and define ``forward``. A teacher must treat every clip by itself: its logits may
    not depend on the rest of the batch.

    Attributes:
        name: names the store's file; takes no part in the fingerprint.
        class_names: what the logits' columns mean.
        sample_rate_hz: rate of the waveforms it wants.
        clip_seconds: length of the waveforms it wants; shorter clips are padded with zeros, longer ones cut.
        frontend: settings between waveform and network, for the fingerprint and for people; plain enough for JSON.
        architecture: whatever else tells this teacher from another with equal weights; plain enough for JSON.
        log_mel: our front end, for a teacher that has it and defines ``logits_of_mel`` too; None for others. Views with
            jittered mel bands or masked stripes need it.
    """

    def __init__(
        self,
        name: str,
        class_names: Sequence[str],
        *,
        sample_rate_hz: int,
        clip_seconds: float = DEFAULT_CLIP_SECONDS,
        frontend: dict[str, Any] | None = None,
        architecture: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not (isinstance(sample_rate_hz, int) and sample_rate_hz > 0):
            raise ValueError(f"a teacher's sample_rate_hz is a whole number above 0; found {sample_rate_hz!r}")
        if not 0 < clip_seconds < float("inf"):
            raise ValueError(f"a teacher's clip_seconds is above 0; found {clip_seconds!r}")
        self.name = name
        self.class_names = check_class_names(class_names)
        self.sample_rate_hz = sample_rate_hz
        self.clip_seconds = float(clip_seconds)
        self.frontend = frontend or {}
        self.log_mel: LogMel | None = None
        self.architecture = architecture or {"class": f"{type(self).__module__}.{type(self).__qualname__}"}

    def forward(self, waveform: Tensor) -> Tensor:
        """(batch, samples) at ``sample_rate_hz``, in [-1, 1] -> (batch, classes)"""
        raise NotImplementedError

    def logits_of_mel(self, mel: Tensor) -> Tensor:
        """(batch, 1, bands, frames), as ``log_mel`` gives it -> (batch, classes)"""
        raise NotImplementedError

    def hear_view(self, waveform: Tensor, band_edges: Tensor | None = None, stripes: Tensor | None = None) -> Tensor:
        """Logits (batch, classes) of views: waveforms (batch, samples), mel bands' limits (batch, 2), masks (batch, 4).

        Raises ValueError for limits or masks if the teacher has not our front end.
        """
        if band_edges is None and stripes is None:
            return self(waveform)
        if self.log_mel is None:
            raise ValueError(
                f"teacher {self.name!r} has a front end of its own and can hear neither jittered mel bands nor masks; "
                "turn them off with --no-view-mel-jitter and masks of 0"
            )
        mel = self.log_mel(waveform, band_edges)
        return self.logits_of_mel(mel if stripes is None else mask_stripes(mel, stripes))

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits over everything that decides the logits: weights, front end, class names, length."""
        settings = {key: value for key, value in self._settings().items() if key != "name"}
        return digest_of(json.dumps(settings, sort_keys=True), json.dumps(self.class_names), weights_fingerprint(self))

    def describe(self) -> dict[str, Any]:
        """What a logit store keeps of its teacher; plain enough for JSON."""
        return {**self._settings(), "weights_fingerprint": weights_fingerprint(self), "fingerprint": self.fingerprint}

    def _settings(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "sample_rate_hz": self.sample_rate_hz,
            "clip_seconds": self.clip_seconds,
            "frontend": self.frontend,
            "architecture": self.architecture,
        }
