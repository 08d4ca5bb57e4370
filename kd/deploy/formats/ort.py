"""ONNX Runtime's own format, for its small builds for phones and microcontrollers, which cannot read ONNX.

The graph is simplified when it is written, so weights are float32 in it, whichever were asked for.
"""

from kd.deploy.exporting.runtime import ExportedModel
from kd.deploy.formats.base import Converted, Format, Source
from teacher_logits.teachers.export_folder import MODEL_FILE

FILE = "model.ort"


def convert(source: Source) -> Converted:
    import onnxruntime

    path = source.folder / FILE
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    # Extended optimisations fit only the machine that they were made on.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(str(source.folder / MODEL_FILE), options, providers=["CPUExecutionProvider"])
    model = ExportedModel(path, source.subject.frontend)
    return Converted(path, lambda windows: model(windows)[1])


FORMAT = Format("ort", convert)
