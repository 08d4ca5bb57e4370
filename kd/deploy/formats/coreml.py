"""Core ML through coremltools: batch 1, windows of one length, float32. Only macOS can run the result."""

import io
import logging
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import torch

from kd.deploy.formats.base import Converted, Format, Source
from kd.deploy.graph.network import Outputs

FILE = "model.mlpackage"
_COPIES = ("aten.alias.default", "aten.lift_fresh_copy.default", "aten.detach.default", "aten.detach_.default")


def convert(source: Source) -> Converted:
    level = logging.getLogger().level
    path = source.folder / FILE
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            logging.getLogger().setLevel(logging.ERROR)
            import coremltools

            program = _without_copies(
                torch.export.export(source.network(), (source.example(),), strict=False).run_decompositions({})
            )
            model = coremltools.convert(
                program,
                minimum_deployment_target=coremltools.target.iOS16,
                compute_precision=coremltools.precision.FLOAT32,
                outputs=[coremltools.TensorType(name=name) for name in Outputs._fields],
            )
            model.save(str(path))
        except Exception as error:  # the converter's errors have no common type
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"coremltools cannot convert this student: {reason}") from error
        finally:
            logging.getLogger().setLevel(level)
    if sys.platform != "darwin":
        return Converted(path, None, "converted, but neither run nor compared: Core ML runs on macOS only")
    loaded = coremltools.models.MLModel(str(path))
    (name,) = (value.name for value in loaded.get_spec().description.input)

    def network(windows: np.ndarray) -> np.ndarray:
        return np.concatenate([loaded.predict({name: window[None]})["logits"] for window in windows])

    return Converted(path, network)


def _without_copies(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Takes out the operators that return their input, which coremltools does not know."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and str(node.target) in _COPIES:
            node.replace_all_uses_with(node.args[0])
            for spec in program.graph_signature.output_specs:
                if spec.arg.name == node.name:
                    spec.arg.name = node.args[0].name
            graph.erase_node(node)
    graph.lint()
    program.graph_module.recompile()
    return program


FORMAT = Format("coreml", convert, ("coremltools",), "pip install coremltools")
