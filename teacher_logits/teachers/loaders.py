"""Loads the teacher that a command line names, as one of

runs/mn10                        a run folder: ``student.safetensors`` and ``student.json``
mn04@mn04_as_mAP_432.pt          a student of the catalog with weights that carry no class names
passt@passt-s.pt                 a PaSST, its size and variant told by the weights, likewise without class names
ast:FOLDER_OR_NAME               an AST of the transformers package
model.onnx                       an ONNX model from waveforms or log-mels to logits
my_package.teachers:big_one      a function without arguments that returns a ``Teacher``
"""

import re
from collections.abc import Sequence
from pathlib import Path

from audio_datasets.system.imports import named_attribute
from students.card import CARD_FILE
from teacher_logits.teachers.ast_teacher import load_ast_teacher
from teacher_logits.teachers.base import Teacher
from teacher_logits.teachers.network import teacher_from_run, teacher_from_weights
from teacher_logits.teachers.onnx_teacher import OnnxModel, load_onnx_teacher

AST_PREFIX = "ast:"
ONNX_SUFFIX = ".onnx"


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
        teacher = teacher_from_run(Path(spec))
    elif spec.startswith(AST_PREFIX):
        teacher = load_ast_teacher(spec.removeprefix(AST_PREFIX))
    elif spec.endswith(ONNX_SUFFIX):
        teacher = load_onnx_teacher(Path(spec), class_names)
    elif re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", spec):
        teacher = _from_function(spec)
    elif "@" in spec:
        teacher = teacher_from_weights(spec, class_names)
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
        return OnnxModel.read(Path(spec)).class_names is not None
    return Path(spec).is_dir() or spec.startswith(AST_PREFIX) or "@" not in spec


def _from_function(spec: str) -> Teacher:
    function = named_attribute(spec, "teacher")
    if not callable(function):
        raise ValueError(f"teacher {spec!r} is no function; found {type(function).__name__}")
    teacher = function()
    if not isinstance(teacher, Teacher):
        raise ValueError(
            f"teacher {spec!r} returned {type(teacher).__name__}; a teacher_logits.teachers.base.Teacher is needed"
        )
    return teacher
