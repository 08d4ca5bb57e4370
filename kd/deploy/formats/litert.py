"""LiteRT (TensorFlow Lite) through litert-torch: batch 1, windows of one length, float32 weights."""

import io
import logging
import warnings
from contextlib import redirect_stderr, redirect_stdout

import numpy as np

from kd.deploy.formats.base import Converted, Format, Source
from kd.deploy.graph.network import Outputs

FILE = "model.tflite"
_SIGNATURE = "serving_default"


def convert(source: Source) -> Converted:
    import litert_torch
    from ai_edge_litert.interpreter import Interpreter

    path = source.folder / FILE
    level = logging.getLogger().level
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            logging.getLogger().setLevel(logging.ERROR)
            model = litert_torch.convert(source.network(), (source.example(),))
            model.export(str(path))
        except Exception as error:  # the converter's errors have no common type
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"litert-torch cannot convert this student: {reason}") from error
        finally:
            logging.getLogger().setLevel(level)
        interpreter = Interpreter(model_path=str(path), num_threads=1)
        runner = interpreter.get_signature_runner(_SIGNATURE)
        (name,) = runner.get_input_details()

    def network(windows: np.ndarray) -> np.ndarray:
        return np.concatenate([_logits(runner(**{name: window[None]})) for window in windows])

    return Converted(path, network, "outputs output_0, output_1 and output_2 are scores, logits and embedding; batch 1")


def _logits(outputs: dict[str, np.ndarray]) -> np.ndarray:
    """(1, C): outputs are numbered in the order of ``Outputs``."""
    return outputs[f"output_{Outputs._fields.index('logits')}"]


FORMAT = Format(
    "litert",
    convert,
    ("litert_torch", "ai_edge_litert"),
    "pip install litert-torch, then pip install -U typing_extensions (docs/export.md)",
)
