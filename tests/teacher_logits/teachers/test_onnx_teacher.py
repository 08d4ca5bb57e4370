"""ONNX models as teachers: from waveforms and from log-mels, with and without metadata."""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from students.frontend import LogMel, LogMelConfig
from teacher_logits.teachers.loaders import knows_its_classes, load_teacher

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

CLASSES = ("hiss", "hum, low", "click")
Axis = int | str


def written_model(
    path: Path, input_shape: list[Axis], metadata: dict[str, str] | None = None, scale: float = 1.0
) -> Path:
    """A model whose logits are the mean squares of three equal parts of its input, one behind the other."""
    from onnx import TensorProto, helper, numpy_helper

    def constant(name: str, value: np.ndarray) -> onnx.TensorProto:
        return numpy_helper.from_array(value, name)

    nodes = [
        helper.make_node("Mul", ["audio", "audio"], ["power"]),
        helper.make_node("Reshape", ["power", "grouping"], ["groups"]),
        helper.make_node("ReduceMean", ["groups", "last"], ["means"], keepdims=0),
        helper.make_node("Mul", ["means", "scale"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "means",
        [helper.make_tensor_value_info("audio", TensorProto.FLOAT, input_shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [input_shape[0], 3])],
        [
            constant("grouping", np.array([0, 3, -1], dtype=np.int64)),
            constant("last", np.array([2], dtype=np.int64)),
            constant("scale", np.array(scale, dtype=np.float32)),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, metadata or {})
    onnx.save(model, path)
    return path


def expected_logits(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.square().reshape(len(inputs), 3, -1).mean(2)


def waveforms(count: int, samples: int = 3000) -> torch.Tensor:
    loudness = torch.linspace(0.1, 0.5, count)[:, None]
    return loudness * torch.randn(count, samples, generator=torch.Generator().manual_seed(0))


def test_a_model_that_tells_everything(tmp_path: Path) -> None:
    metadata = {"class_names": json.dumps(CLASSES), "sample_rate_hz": "16000", "clip_seconds": "0.25"}
    path = written_model(tmp_path / "small.onnx", ["batch", "samples"], metadata)
    teacher = load_teacher(path)
    assert (teacher.name, teacher.class_names) == ("small", CLASSES)
    assert (teacher.sample_rate_hz, teacher.clip_seconds) == (16000, 0.25)
    assert knows_its_classes(path)
    audio = waveforms(4)
    torch.testing.assert_close(teacher(audio), expected_logits(audio))
    assert load_teacher(path, clip_seconds=2).clip_seconds == 2.0
    with pytest.raises(ValueError, match=r"cannot take an input of shape \(4, 2999\)"):
        teacher(audio[:, :2999])


def test_a_model_that_tells_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written_model(tmp_path / "plain.onnx", ["batch", "samples"])
    with caplog.at_level(logging.WARNING):
        teacher = load_teacher(path, class_names=CLASSES)
    assert "does not give its sample rate; assuming 32000 Hz" in caplog.text
    assert (teacher.sample_rate_hz, teacher.clip_seconds) == (32000, 10.0)
    assert not knows_its_classes(path)
    with pytest.raises(ValueError, match="has no class names"):
        load_teacher(path)
    with pytest.raises(ValueError, match="has 3 outputs; 2 class names were given"):
        load_teacher(path, class_names=CLASSES[:2])


def test_a_model_of_one_size(tmp_path: Path) -> None:
    """Batches of two, of which the last is filled up, and one length."""
    path = written_model(tmp_path / "fixed.onnx", [2, 3000], {"sample_rate_hz": "6000"})
    teacher = load_teacher(path, class_names=CLASSES)
    assert teacher.clip_seconds == 0.5
    audio = waveforms(5)
    torch.testing.assert_close(teacher(audio), expected_logits(audio))
    with pytest.raises(ValueError, match="takes exactly 3000 samples; found 1500"):
        teacher(audio[:, :1500])


def test_a_model_that_takes_log_mels(tmp_path: Path) -> None:
    audio = waveforms(2, 16000)
    settings = {"hop_samples": 500, "n_mels": 96}
    path = written_model(tmp_path / "mel.onnx", ["batch", 1, 96, "frames"], {"frontend": json.dumps(settings)})
    teacher = load_teacher(path, class_names=CLASSES)
    mel = LogMel(LogMelConfig(**settings))(audio)
    torch.testing.assert_close(teacher(audio), expected_logits(mel))
    assert teacher.frontend == LogMelConfig(**settings).to_dict()
    edges = torch.tensor([[5.0, 14000.0]] * 2)
    jittered = teacher.hear_view(audio, edges)
    torch.testing.assert_close(jittered, expected_logits(teacher.log_mel(audio, edges)))

    fixed = written_model(tmp_path / "fixed.onnx", ["batch", 1, "bands", 51])
    assert load_teacher(fixed, class_names=CLASSES).clip_seconds == pytest.approx(0.51)
    unknown = written_model(tmp_path / "unknown.onnx", ["batch", 1, 64, "frames"])
    with pytest.raises(ValueError, match="takes 64 mel bands, but its front end has 128"):
        load_teacher(unknown, class_names=CLASSES)


def test_the_fingerprint_is_that_of_the_bytes(tmp_path: Path) -> None:
    def fingerprint(name: str, **options: float) -> str:
        path = written_model(tmp_path / name, ["batch", 1, 128, "frames"], **options)
        return load_teacher(path, class_names=CLASSES).fingerprint

    first = fingerprint("a.onnx")
    assert fingerprint("b.onnx") == first
    assert fingerprint("c.onnx", scale=2.0) != first
    # Weights may lie beside the model.
    (tmp_path / "b.onnx.data").write_bytes(b"weights")
    assert fingerprint("b.onnx") != first


def test_files_that_are_no_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str, path: Path) -> None:
        with pytest.raises(ValueError, match=message):
            load_teacher(path, class_names=CLASSES)

    refused("no such ONNX model", tmp_path / "absent.onnx")
    damaged = tmp_path / "damaged.onnx"
    for content in (b"", b"no model", written_model(tmp_path / "whole.onnx", ["batch", 3000]).read_bytes()[:150]):
        damaged.write_bytes(content)
        refused("not an ONNX model that onnxruntime can run|a teacher must have one", damaged)
    refused("one input, tensor", written_model(tmp_path / "cube.onnx", ["batch", 10, 30]))
    refused("one input, tensor", written_model(tmp_path / "colour.onnx", ["batch", 3, 128, "frames"]))
    for key, value in (("class_names", '"hiss"'), ("sample_rate_hz", "fast"), ("clip_seconds", "true")):
        refused(f"metadata's {key} has the wrong", written_model(tmp_path / "wrong.onnx", ["b", "s"], {key: value}))
    whole = tmp_path / "whole.onnx"
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refused("pip install 'audio-kd\\[export\\]'", whole)


def with_weights_beside(path: Path, location: str, scale: float) -> Path:
    """A model whose factor lies in a file of its own."""
    model = onnx.load(written_model(path, ["batch", "samples"], {"class_names": json.dumps(CLASSES)}))
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "scale")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "4")):
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    (path.parent / location).write_bytes(np.float32(scale).tobytes())
    return path


@pytest.mark.parametrize("location", ["weights.bin", "model.onnx.data"])
def test_weights_beside_the_model_belong_to_its_fingerprint(tmp_path: Path, location: str) -> None:
    path, audio = with_weights_beside(tmp_path / "model.onnx", location, 2.0), waveforms(2)
    first = load_teacher(path)
    torch.testing.assert_close(first(audio), 2 * expected_logits(audio))
    waiting = load_teacher(path)
    (tmp_path / location).write_bytes(np.float32(3.0).tobytes())
    second = load_teacher(path)
    assert second.fingerprint != first.fingerprint
    torch.testing.assert_close(second(audio), 3 * expected_logits(audio))
    with pytest.raises(ValueError, match="the teacher .* has changed since the command began to use it"):
        waiting(audio)  # its session is opened at the first batch


def test_weights_outside_of_the_models_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    path = with_weights_beside(tmp_path / "inside" / "model.onnx", "../weights.bin", 2.0)
    with pytest.raises(ValueError, match=r"weights outside of its folder|not an ONNX model that onnxruntime can run"):
        load_teacher(path)
