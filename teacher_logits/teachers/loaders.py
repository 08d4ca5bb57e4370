"""Loads the teacher named on a command line, in one of these forms:

runs/mn10                        a run folder: ``student.safetensors`` and ``student.json``, or one for each fold and seed
exports/mn10                     a folder that ``kd export`` wrote
mn04@mn04_as_mAP_432.pt          a student of the catalog with weights that have no class names
passt@passt-s.pt                 a PaSST whose size and variant are inferred from the weights, also without class names
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
from teacher_logits.teachers.export_folder import EXPORT_FILE, MODEL_FILE, is_export_folder, read_export
from teacher_logits.teachers.network import teacher_from_weights
from teacher_logits.teachers.onnx_teacher import OnnxModel, load_onnx_teacher
from teacher_logits.teachers.run_ensemble import run_as_teacher

AST_PREFIX = "ast:"
ONNX_SUFFIX = ".onnx"


def load_teacher(
    spec: str | Path,
    class_names: Sequence[str] | None = None,
    clip_seconds: float | None = None,
    *,
    cross_fitted: bool = False,
) -> Teacher:
    """The teacher that ``spec`` names (see the top of this file), on the CPU in evaluation mode.

    Args:
        class_names: classes for bare weights (``NAME@WEIGHTS``) and for ONNX models without class names; other teachers have
            their own.
        clip_seconds: length of the input clips, if it should not be the teacher's own.
        cross_fitted: a clip gets logits only from the students of a run that were not trained on its labels.

    Raises:
        ValueError: a spec of unknown form; weights that are missing or belong to another student; a function that does not
            return a Teacher.
    """
    spec = str(spec)
    if cross_fitted and (not Path(spec).is_dir() or is_export_folder(spec)):
        raise ValueError(
            f"--cross-fitted needs run folders, which tell what they were trained on; found teacher {spec!r}"
        )
    if is_export_folder(spec):
        read_export(spec)
        teacher = load_onnx_teacher(Path(spec) / MODEL_FILE, class_names)
        teacher.name = Path(spec).resolve().name
    elif Path(spec).is_dir():
        teacher = run_as_teacher(Path(spec), cross_fitted=cross_fitted)
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
            f"teacher {spec!r} is none of: a run folder (with {CARD_FILE}), an export folder (with {EXPORT_FILE}),"
            " NAME@WEIGHTS (such as mn04@weights.pt or"
            " passt@weights.pt), FILE.onnx, ast:FOLDER_OR_NAME, module:function"
        )
    if clip_seconds is not None:
        if not 0 < clip_seconds < float("inf"):
            raise ValueError(f"clip_seconds must be above 0; found {clip_seconds}")
        teacher.clip_seconds = float(clip_seconds)
    return teacher.eval()


def knows_its_classes(spec: str | Path) -> bool:
    """Whether a teacher has its own class names. Bare weights have none; ONNX models may have some."""
    spec = str(spec)
    if spec.endswith(ONNX_SUFFIX) and not Path(spec).is_dir():
        return OnnxModel.read(Path(spec)).class_names is not None
    return Path(spec).is_dir() or spec.startswith(AST_PREFIX) or "@" not in spec


def _from_function(spec: str) -> Teacher:
    function = named_attribute(spec, "teacher")
    if not callable(function):
        raise ValueError(f"teacher {spec!r} must be a function; found {type(function).__name__}")
    teacher = function()
    if not isinstance(teacher, Teacher):
        raise ValueError(
            f"teacher {spec!r} must return a teacher_logits.teachers.base.Teacher; found {type(teacher).__name__}"
        )
    return teacher
