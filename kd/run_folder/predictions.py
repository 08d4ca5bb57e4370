"""``predictions.npz``: a student's predictions of clips that it was not trained on. Writer and reader.

Plain arrays, nothing pickled: ``clip_ids`` (N,), ``logits`` (N, C) float32, ``targets`` (N, C) float32, ``mask`` (N, C) bool
(where targets are known), ``class_names`` (C,), ``source`` (N,), the audio files, ``content`` (N,), digests of what these held (32
hexadecimal digits of BLAKE2b-128; empty if unknown). If every clip has them, also ``device`` (N,),
``device_seen`` (N,), whether the device occurs in the training clips, and ``group`` (N,).

Shapes: N clips, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from audio_datasets.system.files import read_arrays, written_aside
from audio_datasets.system.messages import listed

PREDICTIONS_FILE = "predictions.npz"
VALIDATION_FILE = "validation_predictions.npz"

KINDS = {
    **dict.fromkeys(("clip_ids", "class_names", "source", "content", "device", "group"), "U"),
    **dict.fromkeys(("logits",), "f"),
    **dict.fromkeys(("targets", "mask", "device_seen"), "biuf"),
}
"""The allowed types of each array, as NumPy's kinds."""


def write_predictions(
    path: Path,
    *,
    clip_ids: Sequence[str],
    logits: np.ndarray,
    targets: np.ndarray,
    mask: np.ndarray,
    class_names: Sequence[str],
    columns: Mapping[str, Sequence[str] | np.ndarray],
) -> None:
    """Writes predictions under a temporary name and renames the file.

    ``columns`` are additional values for each clip: ``source``, ``content``, ``device``, ``device_seen``, ``group``.
    """
    arrays = {
        "clip_ids": np.array(clip_ids),
        "logits": logits.astype(np.float32),
        "targets": targets,
        "mask": mask,
        "class_names": np.array(class_names),
        **{name: np.asarray(values) for name, values in columns.items()},
    }
    with written_aside(path) as aside, open(aside, "wb") as file:
        np.savez_compressed(file, **arrays)


@dataclass(frozen=True)
class Predictions:
    """A student's predictions of clips that it was not trained on. Checked on construction."""

    clip_ids: np.ndarray
    """(N,) strings, unique."""
    logits: np.ndarray
    """(N, C) float32."""
    targets: np.ndarray
    """(N, C) bool."""
    known: np.ndarray
    """(N, C) bool: whether the target is known."""
    devices: np.ndarray | None = None
    """(N,) strings: the recording device of each clip."""
    device_seen: np.ndarray | None = None
    """(N,) bool: whether the student was trained on clips from that device."""
    sources: np.ndarray | None = None
    """(N,) strings: the clips' audio files."""
    contents: np.ndarray | None = None
    """(N,) strings: digests of what these files held; empty where it is not known."""

    def __post_init__(self) -> None:
        shape = self.logits.shape
        if len(shape) != 2 or self.targets.shape != shape or self.known.shape != shape:
            raise ValueError(
                f"logits {shape}, targets {self.targets.shape} and mask {self.known.shape} must be (clips, classes)"
            )
        for name in ("clip_ids", "devices", "device_seen", "sources", "contents"):
            values = getattr(self, name)
            if values is not None and values.shape != shape[:1]:
                raise ValueError(f"{name} {values.shape} must have one value for each of the {shape[0]} clips")
        if not np.isfinite(self.logits).all():
            raise ValueError(
                f"{int((~np.isfinite(self.logits)).any(axis=1).sum())} clips have logits that are not finite"
            )
        if len(np.unique(self.clip_ids)) < len(self.clip_ids):
            raise ValueError("a clip occurs more than once")

    @property
    def one_label(self) -> bool:
        """Whether every clip has exactly one class and all targets are known."""
        return bool(self.known.all() and (self.targets.sum(axis=1) == 1).all())

    @classmethod
    def read(cls, path: Path, class_names: Sequence[str] | None) -> "Predictions":
        """Reads ``predictions.npz``. Its class list, if it has one, must equal ``class_names``.

        Raises:
            ValueError: a file that is damaged or incomplete, has another class list, or contains Python objects.
        """
        arrays = read_arrays(path)
        missing = {"clip_ids", "logits", "targets"} - arrays.keys()
        if missing:
            raise ValueError(f"{path} has no {listed(sorted(missing))}; found {listed(sorted(arrays))}")
        for name, array in arrays.items():
            if array.dtype.kind not in KINDS.get(name, array.dtype.kind) or array.ndim < 1:
                raise ValueError(f"{path}: {name} has the wrong type; found {array.dtype} {array.shape}")
        found = tuple(map(str, arrays["class_names"])) if "class_names" in arrays else None
        if class_names is not None and found is not None and found != tuple(class_names):
            raise ValueError(
                f"{path} has another class list than the run: {len(found)} names instead of {len(class_names)}"
            )
        names = class_names if class_names is not None else found
        if names is None or arrays["logits"].shape[1:] != (len(names),):
            raise ValueError(f"{path}: logits {arrays['logits'].shape} do not fit {len(names or ())} class names")
        targets = arrays["targets"] > 0.5
        if not np.isin(arrays["targets"], (0, 1)).all():
            raise ValueError(f"{path}: targets must be 0 or 1; found other values")
        try:
            return cls(
                clip_ids=arrays["clip_ids"].astype(str),
                logits=arrays["logits"].astype(np.float32),
                targets=targets,
                known=arrays["mask"] > 0.5 if "mask" in arrays else np.ones_like(targets),
                devices=arrays["device"].astype(str) if "device" in arrays else None,
                device_seen=arrays["device_seen"].astype(bool) if "device_seen" in arrays else None,
                sources=arrays["source"].astype(str) if "source" in arrays else None,
                contents=arrays["content"].astype(str) if "content" in arrays else None,
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
