"""The interface of a teacher: it turns waveforms into logits and describes itself exactly."""

import json
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from audio_datasets.audio.heard import LONGEST_CLIP_SECONDS
from audio_datasets.audio.readers import FASTEST_HZ
from audio_datasets.stores.class_lists import check_class_names
from audio_datasets.system.files import digest_of
from audio_datasets.system.messages import brief
from students.frontend import LogMel, mask_stripes
from students.weights import weights_fingerprint
from teacher_logits.stores.links import LinkKind, TeacherLink, link_of_classes

DEFAULT_CLIP_SECONDS = 10.0  # the clips of AudioSet, which most teachers were trained on


class Teacher(nn.Module):
    """Base class of all teachers: waveform (batch, samples) -> logits (batch, classes), before sigmoid or softmax.

    Subclasses call ``super().__init__`` and define ``forward``. The logits of a clip must not depend on the rest of the batch.

    Attributes:
        name: used for the name of the store's file; not part of the fingerprint.
        class_names: the classes of the logits' columns.
        sample_rate_hz: sample rate of the input waveforms.
        clip_seconds: length of the input waveforms; shorter clips are filled up, longer ones cut.
        short_clips: what shorter clips are filled up with: "pad" zeros, or "repeat" the clip, as a student was trained.
        frontend: settings between waveform and network, for the fingerprint and for people. Must be valid JSON.
        link: what turns the logits into probabilities: the activation that the teacher was trained with, "sigmoid" or "softmax"
            over all classes, or a ``TeacherLink`` for several groups of classes; None if it is not known.
        architecture: everything else that distinguishes this teacher from another with equal weights. Must be valid JSON.
        log_mel: our front end, for a teacher that uses it and also defines ``logits_of_mel``; None for others. Needed for views
            with jittered mel bands or masked stripes.
        is_choosy: whether the teacher gives no logits for some clips (``silent_about``).
    """

    def __init__(
        self,
        name: str,
        class_names: Sequence[str],
        *,
        sample_rate_hz: int,
        clip_seconds: float = DEFAULT_CLIP_SECONDS,
        short_clips: str = "pad",
        frontend: dict[str, Any] | None = None,
        architecture: dict[str, Any] | None = None,
        link: LinkKind | TeacherLink | None = None,
    ) -> None:
        super().__init__()
        if not (isinstance(sample_rate_hz, int) and 0 < sample_rate_hz <= FASTEST_HZ):
            raise ValueError(
                f"a teacher's sample_rate_hz must be a whole number from 1 to {FASTEST_HZ:,}; found {brief(sample_rate_hz)}"
            )
        if not isinstance(clip_seconds, int | float) or not 0 < clip_seconds <= LONGEST_CLIP_SECONDS:
            raise ValueError(
                f"a teacher's clip_seconds must be a number above 0 and at most {LONGEST_CLIP_SECONDS:,}; found {brief(clip_seconds)}"
            )
        self.name = name
        self.class_names = check_class_names(class_names)
        self.sample_rate_hz = sample_rate_hz
        self.clip_seconds = float(clip_seconds)
        if short_clips not in ("pad", "repeat"):
            raise ValueError(f"a teacher's short_clips is 'pad' or 'repeat'; found {short_clips!r}")
        self.short_clips = short_clips
        self.frontend = frontend or {}
        self.log_mel: LogMel | None = None
        self.is_choosy = False
        link = link or link_of_classes(self.class_names)
        self.link = TeacherLink.whole(link, len(self.class_names)) if isinstance(link, str) else link
        self.architecture = architecture or {"class": f"{type(self).__module__}.{type(self).__qualname__}"}

    def forward(self, waveform: Tensor) -> Tensor:
        """(batch, samples) at ``sample_rate_hz``, in [-1, 1] -> (batch, classes)"""
        raise NotImplementedError

    def logits_of_mel(self, mel: Tensor) -> Tensor:
        """(batch, 1, bands, frames), the output of ``log_mel`` -> (batch, classes)"""
        raise NotImplementedError

    def hear_view(self, waveform: Tensor, band_edges: Tensor | None = None, stripes: Tensor | None = None) -> Tensor:
        """Logits (batch, classes) of views: waveforms (batch, samples), edges of the mel bands (batch, 2), masks (batch, 4).

        Raises ValueError for edges or masks if the teacher does not use our front end.
        """
        if band_edges is None and stripes is None:
            return self(waveform)
        if self.log_mel is None:
            raise ValueError(
                f"teacher {self.name!r} has its own front end, so jittered mel bands and masks cannot be applied; "
                "turn them off with --no-view-mel-jitter and masks of 0"
            )
        mel = self.log_mel(waveform, band_edges)
        return self.logits_of_mel(mel if stripes is None else mask_stripes(mel, stripes))

    def silent_about(self, clip_id: str) -> str | None:
        """Why this teacher has nothing to say of a clip, which then gets no logits; None where it has."""
        return None

    def hear_clips(
        self, clip_ids: Sequence[str], waveform: Tensor, band_edges: Tensor | None = None, stripes: Tensor | None = None
    ) -> Tensor:
        """``hear_view`` of the clips with these ids, one for each row, for a teacher to whom it matters which clips they are."""
        return self.hear_view(waveform, band_edges, stripes)

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits: a hash of everything that determines the logits (weights, front end, class names, length)."""
        settings = {key: value for key, value in self._settings().items() if key != "name"}
        return digest_of(json.dumps(settings, sort_keys=True), json.dumps(self.class_names), weights_fingerprint(self))

    def describe(self) -> dict[str, Any]:
        """The description for a logit store, ready for JSON."""
        # The link changes no logit, so it is no part of the fingerprint.
        link = {} if self.link is None else {"link": self.link.to_json()}
        fingerprints = {"weights_fingerprint": weights_fingerprint(self), "fingerprint": self.fingerprint}
        return {**self._settings(), **fingerprints, **link}

    def tell_link(self, kind: LinkKind) -> None:
        """Sets the link as the user says. Raises ValueError if the teacher is known to have another."""
        told = TeacherLink.whole(kind, len(self.class_names))
        if self.link not in (None, told):
            raise ValueError(
                f"teacher {self.name!r} was trained with the link {self.link}; found --teacher-link {kind}"
            )
        self.link = told

    def _settings(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "sample_rate_hz": self.sample_rate_hz,
            "clip_seconds": self.clip_seconds,
            "frontend": self.frontend,
            "architecture": self.architecture,
            # Only where it is not silence, so that fingerprints of older teachers stay what they were.
            **({"short_clips": self.short_clips} if self.short_clips != "pad" else {}),
        }


def without_link(description: dict[str, Any]) -> dict[str, Any]:
    """A teacher's description as older versions stored it."""
    return {name: value for name, value in description.items() if name != "link"}
