"""Teachers: anything that turns waveforms into logits and can say exactly what it is.

A teacher is named on the command line by one of

    runs/mn10                        a run folder: ``student.safetensors`` and ``student.json``
    mn04@mn04_as_mAP_432.pt          a student of the catalog with weights that carry no class names
    passt@passt-s.pt                 a PaSST, its size and variant told by the weights, likewise without class names
    ast:FOLDER_OR_NAME               an AST of the transformers package
    model.onnx                       an ONNX model from waveforms or log-mels to logits
    my_package.teachers:big_one      a function without arguments that returns a ``Teacher``
"""

import dataclasses
import importlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from audio_datasets.stores.class_lists import check_class_names
from audio_datasets.system.files import digest_of
from students import create_student, list_students, load_weights
from students.catalog import list_families
from students.frontend import LogMel, LogMelConfig, mask_stripes
from students.interface import Student
from students.weights import CARD_FILE, load_student, student_from_weights, weights_fingerprint

AST_PREFIX = "ast:"
ONNX_SUFFIX = ".onnx"
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


class StudentTeacher(Teacher):
    """A student with weights, in evaluation mode, as a teacher."""

    def __init__(
        self,
        name: str,
        class_names: Sequence[str],
        student: Student,
        frontend: LogMelConfig,
        clip_seconds: float = DEFAULT_CLIP_SECONDS,
    ) -> None:
        super().__init__(
            name,
            class_names,
            sample_rate_hz=frontend.sample_rate_hz,
            clip_seconds=clip_seconds,
            frontend=frontend.to_dict(),
            architecture=dataclasses.asdict(student.config),
        )
        self.log_mel = LogMel(frontend)
        self.student = student
        self.eval()

    def forward(self, waveform: Tensor) -> Tensor:
        """(batch, samples) -> (batch, classes)"""
        return self.logits_of_mel(self.log_mel(waveform))

    def logits_of_mel(self, mel: Tensor) -> Tensor:
        """(batch, 1, bands, frames) -> (batch, classes)"""
        return self.student(mel).logits


def load_teacher(
    spec: str | Path, class_names: Sequence[str] | None = None, clip_seconds: float | None = None
) -> Teacher:
    """The teacher that ``spec`` names (see the top of this file), on the CPU in evaluation mode.

    Args:
        class_names: what the outputs of bare weights (``NAME@WEIGHTS``) mean, and those of an ONNX model that does not
            tell; other teachers know their own.
        clip_seconds: the length of the clips it hears, in place of its own.

    Raises:
        ValueError: a spec of no known form; weights that are missing or of another student; a function that does not
            return a Teacher.
    """
    spec = str(spec)
    if Path(spec).is_dir():
        teacher = _from_run_folder(Path(spec))
    elif spec.startswith(AST_PREFIX):
        from teacher_logits.teachers.ast_teacher import load_ast_teacher

        teacher = load_ast_teacher(spec.removeprefix(AST_PREFIX))
    elif spec.endswith(ONNX_SUFFIX):
        from teacher_logits.teachers.onnx_teacher import load_onnx_teacher

        teacher = load_onnx_teacher(Path(spec), class_names)
    elif re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", spec):
        teacher = _from_function(spec)
    elif "@" in spec:
        teacher = _from_weights(spec, class_names)
    else:
        raise ValueError(
            f"teacher {spec!r} is none of: a run folder (holding {CARD_FILE}), NAME@WEIGHTS (as mn04@weights.pt or"
            " passt@weights.pt), FILE.onnx, ast:FOLDER_OR_NAME, module:function"
        )
    if clip_seconds is not None:
        if not 0 < clip_seconds < float("inf"):
            raise ValueError(f"clip_seconds must be above 0; found {clip_seconds}")
        teacher.clip_seconds = float(clip_seconds)
    return teacher.eval()


def knows_its_classes(spec: str | Path) -> bool:
    """Whether a teacher brings its own class names; bare weights do not, and an ONNX model perhaps."""
    spec = str(spec)
    if spec.endswith(ONNX_SUFFIX) and not Path(spec).is_dir():
        from teacher_logits.teachers.onnx_teacher import OnnxModel

        return OnnxModel.read(Path(spec)).class_names is not None
    return Path(spec).is_dir() or spec.startswith(AST_PREFIX) or "@" not in spec


def _from_run_folder(folder: Path) -> Teacher:
    student, card = load_student(folder)
    clip_seconds = card.provenance.get("clip_seconds", DEFAULT_CLIP_SECONDS)
    return StudentTeacher(folder.resolve().name, card.class_names, student, card.frontend, clip_seconds)


def _from_weights(spec: str, class_names: Sequence[str] | None) -> Teacher:
    student_name, _, weights = spec.partition("@")
    if class_names is None:
        raise ValueError(f"the weights of teacher {spec!r} carry no class names; give them with --class-names FILE")
    if student_name in list_families() and student_name not in list_students():
        student = student_from_weights(student_name, weights)
        if student.num_classes != len(class_names):
            raise ValueError(f"{weights} has {student.num_classes} classes; {len(class_names)} class names were given")
    else:
        student = create_student(student_name, len(class_names))
        load_weights(student, weights)
    clip_seconds = student.clip_seconds or DEFAULT_CLIP_SECONDS
    return StudentTeacher(Path(weights).stem, class_names, student, LogMelConfig(), clip_seconds)


def _from_function(spec: str) -> Teacher:
    module_name, _, function_name = spec.partition(":")
    # As for `python -m`: the user's module lies where the command is run, which is not where our script lies.
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, but something that it imports is not
        raise ValueError(f"teacher {spec!r}: there is no module {error.name!r} (looked in {folder} too)") from error
    function: Callable[[], Any] | None = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"teacher {spec!r}: {module_name} has no function {function_name!r}")
    teacher = function()
    if not isinstance(teacher, Teacher):
        raise ValueError(
            f"teacher {spec!r} returned {type(teacher).__name__}; a teacher_logits.teachers.base.Teacher is needed"
        )
    return teacher
