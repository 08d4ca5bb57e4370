"""How an ONNX model stores its weights: float32, float16, or int8 with a scale for each output channel.

The graph computes in float32 whichever is chosen. It begins with the casts and products that turn stored weights into float32
ones; they have constant inputs, so a runtime carries them out once, when it loads the file.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

Weights = Literal["fp32", "fp16", "int8"]

FEWEST_VALUES = 64
"""Smaller weights stay in float32: a cast would take as much room as it saves."""
FEWEST_INT8 = 4096
"""Smaller weights are stored in float16 in place of int8. They belong to narrow layers near the input, where few rounding errors
average out and all later layers inherit them: in mn04 seven such layers, 0.3 % of the weights, made 70 % of the difference."""
_CLIPS = np.linspace(0.6, 1.0, 21)
"""Shares of a row's largest magnitude that are tried as the largest one that is represented."""


def store_weights(model: Any, weights: Weights, channels: Mapping[str, Sequence[int]]) -> None:
    """Changes how the initializers of an ``onnx.ModelProto`` are stored.

    Args:
        channels: what may be int8: names of weights, each with a shape whose rows (last axis) share a scale.
    """
    if weights == "fp32":
        return
    from onnx import TensorProto, numpy_helper

    kept, nodes = [], []
    for tensor in model.graph.initializer:
        is_large = tensor.data_type == TensorProto.FLOAT and np.prod(tensor.dims) >= FEWEST_VALUES
        if not is_large or tensor.name.startswith("frontend.") or tensor.name.endswith("_scale"):
            # The front end's window and band edges are short, and errors in them reach all bands. Scales are those of
            # int8 activations, which hardware wants as they are.
            kept.append(tensor)
            continue
        values = numpy_helper.to_array(tensor)
        if weights == "int8" and tensor.name in channels and values.size >= FEWEST_INT8:
            stored, restoring = _as_int8(tensor.name, values, tuple(channels[tensor.name]))
        else:
            stored, restoring = _as_fp16(tensor.name, values)
        kept += stored
        nodes += restoring
    others = list(model.graph.node)
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(kept)
    model.graph.node.extend([*nodes, *others])


def _as_fp16(name: str, values: np.ndarray) -> tuple[list[Any], list[Any]]:
    from onnx import TensorProto, helper, numpy_helper

    half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError(f"{name} has values up to {np.abs(values).max():.3g}, beyond float16; use --weights fp32")
    cast = helper.make_node("Cast", [f"{name}.fp16"], [name], f"{name}/Cast", to=TensorProto.FLOAT)
    return [numpy_helper.from_array(half, f"{name}.fp16")], [cast]


def _as_int8(name: str, values: np.ndarray, shape: tuple[int, ...]) -> tuple[list[Any], list[Any]]:
    from onnx import TensorProto, helper, numpy_helper

    integers, scales = quantized_rows(values.reshape(shape))
    stored = [numpy_helper.from_array(integers, f"{name}.int8"), numpy_helper.from_array(scales, f"{name}.scale")]
    nodes = [
        helper.make_node("Cast", [f"{name}.int8"], [f"{name}.float"], f"{name}/Cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{name}.float", f"{name}.scale"], [name], f"{name}/Mul"),
    ]
    if shape != values.shape:
        nodes[1].output[0] = f"{name}.rows"
        stored.append(numpy_helper.from_array(np.array(values.shape, dtype=np.int64), f"{name}.shape"))
        nodes.append(helper.make_node("Reshape", [f"{name}.rows", f"{name}.shape"], [name], f"{name}/Reshape"))
    return stored, nodes


def quantized_rows(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(..., n) float32 -> int8 (..., n) and scales (..., 1) float32 with the smallest squared error of those tried."""
    largest = np.abs(values).max(-1, keepdims=True)
    best_error = np.full_like(largest, np.inf)
    best = np.zeros_like(largest)
    for clip in _CLIPS:
        scale = np.maximum(largest * np.float32(clip / 127.0), np.float32(1e-30))
        error = np.square(np.clip(np.rint(values / scale), -127, 127) * scale - values).sum(-1, keepdims=True)
        best = np.where(error < best_error, scale, best)
        best_error = np.minimum(error, best_error)
    return np.clip(np.rint(values / best), -127, 127).astype(np.int8), best.astype(np.float32)
