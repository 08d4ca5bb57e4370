"""An exported network as an ONNX model: opset 18, operators of ONNX's own domain only, batch and time free.

``torch.onnx.export(dynamo=True)`` makes the graph. What it adds for debugging is taken out again, since its stack traces hold
paths of this machine.
"""

import io
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch

from kd.deploy.graph.network import ExportedNetwork, Outputs

OPSET = 18
LARGEST_FOLDED = 600
"""Values that a constant may have to be computed here. Larger ones, as the front end's matrices, are computed when a runtime
loads the file: their formula is shorter than they are."""
_AXES = {2: ("batch", "samples"), 4: ("batch", None, None, "frames")}
"""Names of an input's free axes, by how many axes it has."""
_SCOPES = "pkg.torch.onnx.name_scopes"


def require_packages() -> None:
    """Raises ValueError if a package that export needs is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            f"export needs onnx, onnxruntime and onnxscript: pip install 'audio-kd[export]' ({error})"
        ) from error


def onnx_model(network: ExportedNetwork, example: torch.Tensor, fixed_length: bool = False) -> Any:
    """The network as an ``onnx.ModelProto`` with float32 weights, which keep their names.

    Args:
        example: an input; with one clip the batch is fixed at 1, with more it is free.
        fixed_length: the length of the example is the only one that the student takes.

    Raises:
        ValueError: a student that cannot be exported, with the exporter's reason.
    """
    require_packages()
    from onnxscript import optimizer

    free = torch.export.Dim.DYNAMIC
    axes = {} if len(example) == 1 else {0: free}
    if not fixed_length:
        axes[example.ndim - 1] = free
    with _quiet(), torch.inference_mode(False), torch.no_grad():
        try:
            program = torch.export.export(network, (example,), dynamic_shapes=(axes or None,), strict=False)
            exported = torch.onnx.export(
                program,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["waveform" if example.ndim == 2 else "mel"],
                output_names=list(Outputs._fields),
                optimize=False,
                verbose=False,
            )
        except Exception as error:  # the exporter's errors have no common type
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"{type(network.student).__name__} cannot be exported to ONNX: {reason}") from error
        optimizer.optimize_ir(
            exported.model, onnx_shape_inference=False, input_size_limit=2**31, output_size_limit=LARGEST_FOLDED
        )
    model = exported.model_proto
    _name_axes(model, axes)
    _strip(model)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what the exporter prints and logs; none of it is for the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _name_axes(model: Any, axes: Iterable[int]) -> None:
    """Gives the free axes plain names in place of the exporter's symbols."""
    shape = model.graph.input[0].type.tensor_type.shape.dim
    names = _AXES[len(shape)]
    for axis in axes:
        shape[axis].dim_param = names[axis]
    for output in model.graph.output:
        dims = output.type.tensor_type.shape.dim
        if 0 in axes:
            dims[0].dim_param = "batch"


def _strip(model: Any) -> None:
    """Removes stack traces and notes of the exporter, and names nodes by the module that they belong to."""
    graph = model.graph
    counts: dict[str, int] = {}
    for node in graph.node:
        notes = {entry.key: entry.value for entry in node.metadata_props}
        scopes = re.findall(r"'([^']*)'", notes.get(_SCOPES, ""))
        scope = ".".join(scopes[-2:-1]) or "scores"
        scope = "frontend" if scope.startswith("_") else scope  # the exporter's name for the input's own shape
        number = counts[scope] = counts.get(scope, 0) + 1
        node.name = f"{scope}/{node.op_type}_{number}"
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]
    del graph.value_info[:]
    del graph.metadata_props[:]
    del model.metadata_props[:]
    graph.doc_string = model.doc_string = ""
    graph.name = "audio_tagger"


def set_metadata(model: Any, metadata: Mapping[str, str]) -> None:
    """Replaces the model's metadata."""
    del model.metadata_props[:]
    for key, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
