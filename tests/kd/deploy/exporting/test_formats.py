"""Further formats of an export, each run in its own runtime. Those whose packages are missing are skipped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from audio_datasets.tasks.label_space import LabelGroup, LabelSpace
from kd.deploy.exporting.subject import read_subject
from kd.deploy.formats import catalog
from kd.deploy.formats.huggingface import source_code
from kd.deploy.tagging.tagger import Tagger
from kd.export import main
from students.card import load_student
from students.frontend import LogMel, LogMelConfig
from teacher_logits.teachers.export_folder import read_export


def exported(run: Path, name: str) -> tuple[Path, dict]:
    """An export with one further format, and what parity.json says of it."""
    out = run.parent / f"with {name}"
    assert main([str(run), "--out", str(out), "--format", name]) == 0
    return out, json.loads((out / "parity.json").read_text())["formats"][name]


def test_ort_gives_the_logits_of_the_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnxruntime

    out, row = exported(run, "ort")
    waveform = {"waveform": 0.1 * np.random.default_rng(0).standard_normal((2, 16000)).astype(np.float32)}
    logits = [
        onnxruntime.InferenceSession(out / file, providers=["CPUExecutionProvider"]).run(["logits"], waveform)[0]
        for file in ("model.onnx", "model.ort")
    ]
    assert np.abs(logits[0]).max() > 0.1
    assert np.abs(logits[0] - logits[1]).max() < 1e-5
    assert (row["file"], row["compared_with"]) == ("model.ort", "model.onnx")
    assert row["bytes"] == (out / "model.ort").stat().st_size
    assert "model.ort: " in capsys.readouterr().out
    assert "`model.ort`" in (out / "README.md").read_text()
    assert "model.ort" in read_export(out).files


_PIPELINE = """
import json, sys
import soundfile
from transformers import pipeline
tag = pipeline("audio-classification", model=sys.argv[1], trust_remote_code=True)
for path in sys.argv[2:]:
    waveform, rate = soundfile.read(path, dtype="float32")
    print(json.dumps(tag({"raw": waveform, "sampling_rate": rate}, top_k=None)))
"""


def test_a_pipeline_of_transformers_gives_the_scores_of_evaluation(run: Path) -> None:
    """Offline, in a process that cannot import our packages; clips shorter and longer than a window, and of another rate."""
    pytest.importorskip("transformers", reason="pip install 'audio-kd[ast]'")
    out, row = exported(run, "huggingface")
    assert (row["compared_with"], row["clips"]) == ("PyTorch", "the run's validation clips")
    assert row["largest_logit_difference"] < 1e-4
    files = sorted(run.parent.glob("clip *.wav"))
    blocked = "import sys; sys.modules.update(kd=None, students=None, audio_datasets=None)\n"
    done = subprocess.run(
        [sys.executable, "-c", blocked + _PIPELINE, str(out / "huggingface"), *map(str, files)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(run.parent / "hub")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(files) == 6
    tagger = Tagger.load(run)
    for path, rows in zip(files, found, strict=True):
        wanted = dict(tagger(path).top(3))
        assert [row["label"] for row in rows] == list(wanted)
        assert max(abs(row["score"] - wanted[row["label"]]) for row in rows) < 1e-4


def test_litert_gives_the_logits_of_pytorch(run: Path) -> None:
    pytest.importorskip("litert_torch", reason="pip install litert-torch")
    from ai_edge_litert.interpreter import Interpreter

    out, row = exported(run, "litert")
    assert row["largest_logit_difference"] < 1e-4
    waveform = 0.1 * torch.randn(1, 16000, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = load_student(run)(LogMel(LogMelConfig.from_dict(dict(read_export(out).frontend)))(waveform)).logits
    runner = Interpreter(model_path=str(out / "model.tflite")).get_signature_runner("serving_default")
    (name,) = runner.get_input_details()
    assert np.abs(runner(**{name: waveform.numpy()})["output_1"] - wanted.numpy()).max() < 1e-4


def test_core_ml_is_written_and_said_to_be_untested_where_it_cannot_run(run: Path) -> None:
    pytest.importorskip("coremltools", reason="pip install coremltools")
    out, row = exported(run, "coreml")
    assert (out / "model.mlpackage" / "Manifest.json").is_file()
    if sys.platform != "darwin":
        assert "neither run nor compared" in row["note"]
        assert "compared_with" not in row


def test_the_code_of_a_traced_network_computes_what_it_computes() -> None:
    """Of keyword arguments, several outputs, numbers that depend on the batch, and constants."""

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 3)
            self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]), persistent=False)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.linear(x) * self.scale + torch.arange(3, dtype=torch.float32)
            low, high = y.split([1, 2], dim=1)
            return torch.cat([low, high.clamp(min=0.0)], dim=1).expand(x.shape[0], -1), y.sum(1, keepdim=True)

    network, x = Network(), torch.randn(2, 4)
    program = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)
    body, tensors, trained = source_code(program)
    assert trained == {"linear__weight", "linear__bias"}
    assert "scale" in tensors
    names: dict = {"torch": torch, "aten": torch.ops.aten}
    exec(
        f"import operator\nclass Made:\n    def network(self, waveform):\n        device = waveform.device\n{body}",
        names,
    )
    made = names["Made"]()
    vars(made).update(tensors)
    more = torch.randn(5, 4)
    for found, wanted in zip(made.network(more), network(more), strict=True):
        assert torch.allclose(found, wanted.detach(), atol=1e-6)


def test_formats_that_do_not_fit_are_refused_before_anything_is_exported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog.importlib.util, "find_spec", lambda name: None)
    assert main([str(run), "--out", str(tmp_path / "out"), "--format", "litert"]) == 2
    assert "--format litert needs litert_torch, ai_edge_litert: pip install litert-torch" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    groups = LabelSpace((LabelGroup("place", ("dog", "clock"), True), LabelGroup("sound", ("rain, heavy",), False)))
    subject = read_subject(str(run), None)
    object.__setattr__(subject, "label_space", groups)
    monkeypatch.setattr(catalog.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match="--format huggingface does not fit this student: it has 2 groups of classes"):
        catalog.refuse_formats(["huggingface"], subject)


def test_a_format_that_disagrees_is_refused_by_name(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    true_compare = catalog.compare

    def shifted(reference, network, *rest):
        return true_compare(reference, lambda windows: network(windows) + 0.01, *rest)

    monkeypatch.setattr(catalog, "compare", shifted)
    assert main([str(run), "--out", str(tmp_path / "out"), "--format", "ort"]) == 2
    message = capsys.readouterr().err
    assert "the ort model does not agree with" in message
    assert "a logit differs by 0.01 " in message
    assert not (tmp_path / "out").exists()
