"""int8 activations: the convolutions and linear layers of an ONNX model between QuantizeLinear and DequantizeLinear.

For hardware that computes in int8 only. On a CPU it is no faster. The front end stays in float32, since a logarithm's small
values matter as much as its large ones. So do the student's first convolution, whose input has the widest range, and its narrow
1×1 and linear layers (``FEWEST_INT8``), which measuring showed to cost most of the accuracy.
"""

import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd.deploy.graph.stored_weights import FEWEST_INT8

QUANTIZED = ("Conv", "Gemm", "MatMul")


def quantize_activations(model: Any, inputs: Sequence[np.ndarray]) -> Any:
    """A copy of an ``onnx.ModelProto`` with int8 activations, and int8 weights with a scale for each channel.

    ``inputs`` calibrate it: each is a batch as the model takes it.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    sizes = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    students = [node for node in model.graph.node if node.op_type in QUANTIZED and not _is_frontend(node.name)]
    first = next((node.name for node in students if node.op_type == "Conv"), None)
    excluded = [node.name for node in model.graph.node if _is_frontend(node.name)]
    excluded += [node.name for node in students if node.name == first or _is_narrow(node, sizes)]
    level = logging.getLogger().level
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(model.SerializeToString())
        try:
            logging.getLogger().setLevel(logging.ERROR)  # its advice to preprocess, which export has done already
            quantize_static(
                source,
                target,
                _Inputs(model.graph.input[0].name, inputs),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(QUANTIZED),
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=excluded,
                calibrate_method=CalibrationMethod.MinMax,
                extra_options={"CalibMovingAverage": True, "ActivationSymmetric": False, "WeightSymmetric": True},
            )
        finally:
            logging.getLogger().setLevel(level)
        return onnx.load(target)


def _is_narrow(node: Any, sizes: Mapping[str, int]) -> bool:
    """Whether a node is a 1×1 convolution or linear layer with few weights; depthwise convolutions are not."""
    grouped = any(attribute.name == "group" and attribute.i > 1 for attribute in node.attribute)
    return not grouped and sizes.get(node.input[1], FEWEST_INT8) < FEWEST_INT8


def _is_frontend(name: str) -> bool:
    return name.startswith("frontend/")


class _Inputs:
    """What onnxruntime's calibration reads, one input after the other."""

    def __init__(self, name: str, inputs: Sequence[np.ndarray]) -> None:
        self._rest = iter({name: values} for values in inputs)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._rest, None)
