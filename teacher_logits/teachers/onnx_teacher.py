"""ONNX models as teachers: any model that turns waveforms or our log-mel spectrograms into logits.

The input must have shape (batch, samples) or (batch, 1, bands, frames). Everything else is read from the model's metadata
(strings by name, ``metadata_props``). These entries are optional:

    class_names      JSON list, one name per output; default: given by the caller
    sample_rate_hz   sample rate of the waveform; default: 32000, with a warning
    clip_seconds     length of clips that the model is for; default: the input's length if it is fixed, otherwise 10
    frontend         JSON object, settings of students.frontend.LogMelConfig; default: the defaults of that class
    link             "sigmoid" or "softmax", the activation that the model was trained with; default: not known
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audio_datasets.audio.readers import FASTEST_HZ
from audio_datasets.stores.class_lists import check_class_names
from audio_datasets.system.files import parse_json
from audio_datasets.system.messages import brief
from audio_datasets.system.paths.contents import changed
from audio_datasets.system.paths.inputs import open_regular
from students.frontend import LogMel, LogMelConfig
from teacher_logits.stores.links import TeacherLink
from teacher_logits.teachers.base import DEFAULT_CLIP_SECONDS, Teacher
from teacher_logits.teachers.onnx_session import BatchRunner, open_session

LARGEST_AXIS = 2**27
"""More than an hour of audio at 32 kHz. Damaged files usually claim more."""
PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
DEFAULT_SAMPLE_RATE_HZ = LogMelConfig().sample_rate_hz

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OnnxModel:
    """The description that an ONNX file gives of itself."""

    path: Path
    input_name: str
    output_name: str
    takes_log_mel: bool
    """Whether the input is (batch, 1, bands, frames) rather than (batch, samples)."""
    batch: int | None
    """Batch size, if fixed."""
    bands: int | None
    """Number of mel bands, if fixed."""
    length: int | None
    """Number of samples or frames, if fixed."""
    classes: int | None
    """Number of outputs, if fixed."""
    metadata: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> "OnnxModel":
        """Raises ValueError for a missing file, one that is not an ONNX model, and unsupported inputs or outputs."""
        try:
            return cls._described_by(_open_session(path, threads=1), path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: a name in it is not UTF-8 text: {error}") from error

    @classmethod
    def _described_by(cls, session: Any, path: Path) -> "OnnxModel":
        inputs, outputs = session.get_inputs(), session.get_outputs()
        shape = inputs[0].shape if len(inputs) == 1 and inputs[0].type == "tensor(float)" else []
        if len(shape) not in (2, 4) or (len(shape) == 4 and isinstance(shape[1], int) and shape[1] != 1):
            found = ", ".join(f"{one.name} {one.type} {one.shape}" for one in inputs)
            raise ValueError(
                f"{path}: a teacher must have one input, tensor(float), of shape (batch, samples) or (batch, 1, bands, frames);"
                f" found {found}"
            )
        named = [output for output in outputs if output.name == "logits"] or outputs
        if len(named) != 1 or len(named[0].shape) != 2:
            found = ", ".join(f"{one.name} {one.shape}" for one in outputs)
            raise ValueError(
                f"{path}: a teacher must have one output, or one called logits, of shape (batch, classes); found {found}"
            )
        sizes = [size if isinstance(size, int) else None for size in shape]  # axes of variable size have names
        if max(size or 1 for size in sizes) > LARGEST_AXIS or min(1 if size is None else size for size in sizes) < 1:
            raise ValueError(f"{path}: the axes of its input must have sizes from 1 to {LARGEST_AXIS:,}; found {shape}")
        return cls(
            path=path,
            input_name=inputs[0].name,
            output_name=named[0].name,
            takes_log_mel=len(sizes) == 4,
            batch=sizes[0],
            bands=sizes[2] if len(sizes) == 4 else None,
            length=sizes[-1],
            classes=named[0].shape[1] if isinstance(named[0].shape[1], int) else None,
            metadata=dict(session.get_modelmeta().custom_metadata_map),
        )

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The class names in the metadata; None if there are none."""
        names = self._json("class_names", list)
        return None if names is None else check_class_names(names)

    def log_mel_config(self) -> LogMelConfig:
        """The front end in the metadata, or the default one. ValueError if the model takes other spectrograms."""
        settings = self._json("frontend", dict)
        config = LogMelConfig() if settings is None else LogMelConfig.from_dict(settings)
        if self.bands not in (None, config.n_mels):
            raise ValueError(
                f"{self.path} takes {self.bands} mel bands, but its front end has {config.n_mels};"
                " put the right settings into the model's metadata under 'frontend'"
            )
        return config

    def sample_rate_hz(self) -> int:
        """Rate of the waveform, for a model that takes waveforms."""
        rate = self._json("sample_rate_hz", int)
        if rate is None:
            _log.warning("%s does not give its sample rate; assuming %d Hz", self.path, DEFAULT_SAMPLE_RATE_HZ)
            return DEFAULT_SAMPLE_RATE_HZ
        if not 0 < rate <= FASTEST_HZ:
            raise ValueError(
                f"{self.path}: the metadata's sample_rate_hz must be from 1 to {FASTEST_HZ:,}; found "
                f"{brief(self.metadata['sample_rate_hz'])}"
            )
        return rate

    def link(self, num_classes: int) -> TeacherLink | None:
        """What turns the logits into probabilities, if the metadata tells."""
        if "link" not in self.metadata:
            return None
        try:
            return TeacherLink.from_json(self._json("link", (str, list)), num_classes)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def clip_seconds(self, positions_per_second: float) -> float:
        """``positions_per_second``: samples or frames."""
        seconds = self._json("clip_seconds", (int, float))
        if seconds is not None:
            return seconds
        return DEFAULT_CLIP_SECONDS if self.length is None else self.length / positions_per_second

    def files(self) -> list[Path]:
        """The model's file, and the files beside it that hold its weights, whatever they are called.

        Raises:
            ValueError: weights outside of the model's folder, or a file that is not there.
        """
        usual = [self.path.with_name(self.path.name + ending) for ending in (".data", "_data")]
        beside = [path for path in usual if path.is_file()]
        folder = os.path.realpath(self.path.parent)
        for location in sorted(external_locations(self.path)):
            path = self.path.parent / location
            if not os.path.realpath(path).startswith(os.path.join(folder, "")):
                raise ValueError(
                    f"{self.path} keeps weights outside of its folder ({brief(location)}), which are not read"
                )
            if path not in beside:
                beside.append(path)
        return [self.path, *beside]

    def digest(self) -> str:
        """32 hexadecimal digits: a hash of the model's bytes, including weights in files beside it."""
        state = hashlib.blake2b(digest_size=16)
        for path in self.files():
            with open_regular(path) as file:
                state.update(hashlib.file_digest(file, "blake2b").digest())
        return state.hexdigest()

    def _json(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """A metadata entry; None if it is not there, ValueError if it is of another kind."""
        if key not in self.metadata:
            return None
        try:
            value = parse_json(self.metadata[key])
        except ValueError:
            value = self.metadata[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{self.path}: the metadata's {key} has the wrong type; found {brief(self.metadata[key])}")
        return value


def external_locations(path: Path) -> set[str]:
    """The files, as a model names them, that hold the values of its tensors outside of its own file.

    Raises ValueError for a file that is no ONNX model.
    """
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise ValueError(f"ONNX models need onnx: pip install 'audio-kd[export]' ({error})") from error
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's errors, of several types
        raise ValueError(f"{path} is damaged, or no ONNX model: {brief(str(error), 200)}") from error
    tensors = (tensor for tensor in _tensors_in(model) if tensor.data_location == onnx.TensorProto.EXTERNAL)
    return {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}


def _tensors_in(message: Any) -> Iterator[Any]:
    """The tensors anywhere in a message of ONNX's protocol buffers: weights, constants, and those of inner graphs."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for inner in (value,) if hasattr(value, "DESCRIPTOR") else value:  # one message, or several
                yield from _tensors_in(inner)


def _open_session(path: Path, threads: int) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return open_session(path, threads)  # says what is missing
    available = onnxruntime.get_available_providers()
    return open_session(path, threads, [name for name in PROVIDERS if name in available])


class OnnxTeacher(Teacher):
    """An ONNX model as a teacher. onnxruntime chooses the device and uses as many threads as torch would."""

    def __init__(self, model: OnnxModel, class_names: Sequence[str]) -> None:
        """Raises ValueError unless there is one class name per output."""
        if model.classes not in (None, len(class_names)):
            raise ValueError(f"{model.path} has {model.classes} outputs; {len(class_names)} class names were given")
        log_mel = LogMel(model.log_mel_config()) if model.takes_log_mel else None
        if log_mel is None:
            rate = model.sample_rate_hz()
            positions_per_second = float(rate)
        else:
            rate = log_mel.config.sample_rate_hz
            positions_per_second = rate / log_mel.config.hop_samples
        super().__init__(
            model.path.stem,
            class_names,
            sample_rate_hz=rate,
            clip_seconds=model.clip_seconds(positions_per_second),
            frontend=log_mel.config.to_dict() if log_mel else None,
            architecture={"onnx": model.digest(), "output": model.output_name},
            link=model.link(len(class_names)),
        )
        self.log_mel = log_mel
        self.model = model
        self._session: BatchRunner | None = None  # opened at the first batch, when the number of threads is known

    def forward(self, waveform: Tensor) -> Tensor:
        """(batch, samples) -> (batch, classes)"""
        return self._run(waveform) if self.log_mel is None else self.logits_of_mel(self.log_mel(waveform))

    def logits_of_mel(self, mel: Tensor) -> Tensor:
        """(batch, 1, bands, frames) -> (batch, classes)"""
        return self._run(mel)

    def _run(self, inputs: Tensor) -> Tensor:
        """(B, ...) -> (B, classes), in batches of the model's size."""
        if self.model.length not in (None, inputs.shape[-1]):
            raise ValueError(
                f"{self.model.path} takes exactly {self.model.length} {'frames' if self.model.takes_log_mel else 'samples'};"
                f" found {inputs.shape[-1]} (leave out --clip-seconds)"
            )
        if self._session is None:
            session = _open_session(self.model.path, torch.get_num_threads())
            if self.model.digest() != self.architecture["onnx"]:
                raise ValueError(changed("the teacher", self.model.path))
            self._session = BatchRunner(session, self.model.path)
        array = np.ascontiguousarray(inputs.float().cpu().numpy())
        outputs = []
        for start in range(0, len(array), self.model.batch or len(array)):
            part = array[start : start + (self.model.batch or len(array))]
            padding = (self.model.batch or len(part)) - len(part)
            full = np.pad(part, [(0, padding)] + [(0, 0)] * (part.ndim - 1)) if padding else part
            (logits,) = self._session([self.model.output_name], self.model.input_name, full)
            if logits.dtype != np.float32 or logits.shape != (len(full), len(self.class_names)):
                raise ValueError(
                    f"{self.model.path} must return one float32 logit for each of {len(full)} clips and "
                    f"{len(self.class_names)} classes; found {logits.dtype} {logits.shape}"
                )
            outputs.append(logits[: len(part)])
        return torch.from_numpy(np.concatenate(outputs)).to(inputs.device)


def load_onnx_teacher(path: Path, class_names: Sequence[str] | None) -> OnnxTeacher:
    """The teacher in an ONNX file. ``class_names`` are used if it has none. ValueError if there are none at all."""
    model = OnnxModel.read(path)
    try:
        names = model.class_names or class_names
        if names is None:
            raise ValueError(f"{path} has no class names; give them with --class-names FILE")
        return OnnxTeacher(model, names)
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
