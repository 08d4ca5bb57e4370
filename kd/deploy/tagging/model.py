"""The models that can tag: a student in PyTorch, or an exported one in ONNX Runtime, behind one interface.

Shapes: B batch, N samples, C classes, E embedding size.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from audio_datasets.stores.class_lists import read_class_names
from audio_datasets.tasks.label_space import LabelSpace
from kd.data.windows import Window
from kd.deploy.exporting.runtime import ExportedModel
from kd.deploy.exporting.subject import read_subject
from students import create_student, load_weights
from students.card import CARD_FILE
from students.frontend import LogMel, LogMelConfig
from students.public_weights import find_weights
from students.weights import OtherClasses
from teacher_logits.teachers.export_folder import MODEL_FILE, is_export_folder, read_export

AUDIOSET_CLASSES = 527
AUDIOSET_CLASS_LIST = "class_labels_indices.csv"
"""AudioSet's class list, as it is published."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaggingModel:
    """A model that tags, and all that its user must know."""

    name: str
    """The folder's or the weights' name."""
    label_space: LabelSpace
    window: Window
    """Rate and length of the windows that it was evaluated with."""
    thresholds: np.ndarray
    """(C,) on the scores."""
    thresholds_from: str
    """"validation" (chosen on the run's validation clips), "default" (0.5) or "given"."""
    embedding_dim: int
    fixed_length: bool
    """Whether it takes windows of exactly ``window`` only."""
    run: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    """Waveforms (B, N) float32 -> logits (B, C), embeddings (B, E), both float32."""

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.label_space.class_names


def load_model(
    spec: str | Path, class_names: Sequence[str] | None = None, *, device: str = "auto", threads: int | None = None
) -> TaggingModel:
    """The model in a run folder or an export folder, or NAME@WEIGHTS.

    Args:
        class_names: the classes of bare weights. If left out, they are read from AudioSet's class list beside the weights, and
            else numbered; a warning says so.
        device: "cpu", "cuda", "cuda:1" …; "auto" takes a GPU if there is one. Exports run on the CPU.
        threads: threads that compute on the CPU; the library's own choice if left out.

    Raises:
        ValueError: no such model, a damaged or changed one, or an argument that would have no effect.
    """
    spec = str(spec)
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1; found {threads}")
    if is_export_folder(spec):
        if class_names is not None:
            raise ValueError(f"{spec} knows its classes; leave the class names out")
        return _exported(Path(spec), device, threads)
    if not Path(spec).is_dir() and "@" not in spec:
        raise ValueError(
            f"{spec!r} is none of: a run folder (with {CARD_FILE}), an export folder, NAME@WEIGHTS (as mn04@mn04_as_mAP_432.pt)"
        )
    return _pytorch(spec, class_names, device, threads)


def _exported(folder: Path, device: str, threads: int | None) -> TaggingModel:
    if device not in ("auto", "cpu"):
        raise ValueError(f"an export runs on the CPU; found device {device!r} (load the run folder to use a GPU)")
    card = read_export(folder)
    try:
        model = ExportedModel(folder / MODEL_FILE, LogMelConfig.from_dict(dict(card.frontend)), threads or 0)
    except ModuleNotFoundError as error:
        raise ValueError(f"exports need onnxruntime: pip install 'audio-kd[export]' ({error})") from error

    def run(waveforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        _, logits, embedding = model(waveforms)
        return logits, embedding

    return TaggingModel(
        name=folder.resolve().name,
        label_space=card.label_space,
        window=Window(card.sample_rate_hz, float(card.window_seconds), card.short_clips),
        thresholds=np.array(card.thresholds, dtype=np.float64),
        thresholds_from=card.thresholds_from,
        embedding_dim=card.embedding_dim,
        fixed_length=isinstance(model.input.shape[-1], int),
        run=run,
    )


def _pytorch(spec: str, class_names: Sequence[str] | None, device: str, threads: int | None) -> TaggingModel:
    if class_names is None and not Path(spec).is_dir():
        class_names = _classes_of_weights(spec)
    subject = read_subject(spec, class_names)
    place = _device(device)
    torch.set_flush_denormal(True)
    if threads is not None:
        torch.set_num_threads(threads)
    student, log_mel = subject.student.fuse().to(place), LogMel(subject.frontend).to(place)

    def run(waveforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            output = student(log_mel(torch.from_numpy(waveforms).to(place)))
            return output.logits.float().cpu().numpy(), output.embedding.float().cpu().numpy()

    return TaggingModel(
        name=subject.name,
        label_space=subject.label_space,
        window=subject.window,
        thresholds=np.array(subject.thresholds, dtype=np.float64),
        thresholds_from=subject.thresholds_from,
        embedding_dim=subject.student.embedding_dim,
        fixed_length=subject.student.clip_seconds is not None,
        run=run,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # torch says so when it was built without CUDA
        first_line = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used: {first_line}") from error
    return place


def _classes_of_weights(spec: str) -> tuple[str, ...]:
    """Class names for weights that carry none: AudioSet's list beside them, or numbers. A warning tells which."""
    name, _, weights = spec.partition("@")
    count = AUDIOSET_CLASSES
    try:
        load_weights(create_student(name, count), weights)
    except OtherClasses as error:
        count = error.in_file
    beside = find_weights(weights).with_name(AUDIOSET_CLASS_LIST)
    if beside.is_file() and len(names := read_class_names(beside)) == count:
        _log.warning("%s: class names are read from %s", spec, beside)
        return names
    _log.warning("%s: the weights carry no class names, so classes are numbered; give a class list", spec)
    return tuple(f"class {number}" for number in range(count))


def with_window(model: TaggingModel, seconds: float) -> TaggingModel:
    """The same model with windows of another length. ValueError if it takes its own length only."""
    if seconds == model.window.seconds:
        return model
    if not 0 < seconds <= 3600:
        raise ValueError(f"a window lasts more than 0 and at most 3600 seconds; found {seconds:g}")
    if model.fixed_length:
        raise ValueError(f"{model.name} takes windows of {model.window.seconds:g} s only; found {seconds:g} s")
    return dataclasses.replace(model, window=dataclasses.replace(model.window, seconds=float(seconds)))


def with_threshold(model: TaggingModel, threshold: float) -> TaggingModel:
    """The same model with one threshold for all classes."""
    if not 0 <= threshold <= 1:
        raise ValueError(f"a threshold lies between 0 and 1; found {threshold:g}")
    return dataclasses.replace(model, thresholds=np.full(len(model.class_names), threshold), thresholds_from="given")
