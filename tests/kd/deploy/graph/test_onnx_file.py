"""What the exporter's optimizer may break: a front end whose numbers span more than float32's common range, as an ONNX graph."""

import numpy as np
import onnxruntime
import pytest
import torch

from kd.deploy.graph.frontend import ConvolutionalLogMel
from kd.deploy.graph.network import Outputs
from kd.deploy.graph.onnx_file import onnx_model
from students.families.mergenet import mergenet_frontend
from students.frontend import LogMel


class FrontendAlone(torch.nn.Module):
    """The log-mel in place of scores; logits and embedding are of no meaning."""

    def __init__(self) -> None:
        super().__init__()
        self.frontend = ConvolutionalLogMel(mergenet_frontend())
        self.student = torch.nn.Identity()

    def forward(self, inputs: torch.Tensor) -> Outputs:
        log_mel = self.frontend(inputs)
        return Outputs(log_mel, log_mel.mean((1, 2)), log_mel.mean((1, 3)))


@pytest.fixture(scope="module")
def session() -> onnxruntime.InferenceSession:
    model = onnx_model(FrontendAlone(), 0.1 * torch.randn(2, 32_000))
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("samples", [1, 600, 16_000, 48_017, 170_001])
def test_mergenets_front_end_is_tiled_and_standardised_in_the_graph(
    session: onnxruntime.InferenceSession, samples: int
) -> None:
    waveform = 0.1 * torch.randn(2, samples, generator=torch.Generator().manual_seed(samples))
    wanted = LogMel(mergenet_frontend())(waveform).numpy()
    found = session.run(["scores"], {"waveform": waveform.numpy()})[0]
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < 1e-4


@pytest.mark.parametrize("level", [0.0, 1e-40, 0.3])
def test_constants_stay_finite_in_the_graph(session: onnxruntime.InferenceSession, level: float) -> None:
    """An offset of 1e-10 before the logarithm was once taken for 0, and silence became NaN."""
    outputs = session.run(None, {"waveform": np.full((1, 16_000), level, np.float32)})
    assert all(np.isfinite(output).all() for output in outputs)
