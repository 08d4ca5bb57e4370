"""`kd export` on a run folder with a tiny student: the model, what it says of itself, and what is refused."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from kd.deploy.exporting import export_student as exporting
from kd.deploy.tagging.tagger import Tagger
from kd.export import main
from students.card import load_student
from students.frontend import LogMel, LogMelConfig
from teacher_logits.teachers.export_folder import read_export
from teacher_logits.teachers.loaders import load_teacher

NAMES = ("dog", "rain, heavy", "clock")
FRONTEND = LogMelConfig(sample_rate_hz=16000, n_fft=512, window_samples=400, hop_samples=160, n_mels=24, fmax_hz=7000.0)


@pytest.fixture(scope="module")
def export(run: Path) -> Path:
    """The run, exported with float32 weights."""
    out = run.parent / "export"
    assert main([str(run), "--out", str(out), "--weights", "fp32"]) == 0
    return out


def session(folder: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


def test_the_model_agrees_with_the_student_for_any_batch_and_length(run: Path, export: Path) -> None:
    student, model = load_student(run), session(export)
    assert [value.name for value in model.get_inputs()] == ["waveform"]
    assert [value.name for value in model.get_outputs()] == ["scores", "logits", "embedding"]
    for batch, samples in ((1, 1), (3, 200), (2, 16000), (1, 50001)):
        waveform = 0.1 * np.random.default_rng(samples).standard_normal((batch, samples)).astype(np.float32)
        scores, logits, embedding = model.run(None, {"waveform": waveform})
        with torch.inference_mode():
            wanted = student(LogMel(FRONTEND)(torch.from_numpy(waveform)))
        assert np.abs(logits - wanted.logits.numpy()).max() < 1e-4
        assert np.abs(embedding - wanted.embedding.numpy()).max() < 1e-4
        assert np.abs(scores - wanted.logits.sigmoid().numpy()).max() < 1e-5


@pytest.mark.parametrize("value", [0.0, 1e-40, 1.0])
def test_silence_denormal_numbers_and_full_scale_give_finite_outputs(export: Path, value: float) -> None:
    for samples in (1, 16000):
        outputs = session(export).run(None, {"waveform": np.full((1, samples), value, np.float32)})
        assert all(np.isfinite(output).all() for output in outputs)


def test_the_file_has_plain_operators_metadata_and_no_local_paths(run: Path, export: Path) -> None:
    model = onnx.load(export / "model.onnx")
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    operators = {node.op_type for node in model.graph.node}
    assert not operators & {"STFT", "DFT", "BatchNormalization"}
    content = model.SerializeToString()
    assert b"site-packages" not in content
    assert str(Path(exporting.__file__).parents[2]).encode() not in content
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["class_names"]) == list(NAMES)
    assert json.loads(metadata["sample_rate_hz"]) == 16000
    assert json.loads(metadata["clip_seconds"]) == 1.0
    assert LogMelConfig.from_dict(json.loads(metadata["frontend"])) == FRONTEND
    assert "/home/somebody" not in metadata["provenance"] + (export / "export.json").read_text()
    assert json.loads(metadata["provenance"])["config"]["data"] == "sounds"


def test_the_card_says_how_the_student_is_used(run: Path, export: Path) -> None:
    card = read_export(export)
    assert card.class_names == NAMES
    assert (card.window_seconds, card.short_clips, card.sample_rate_hz) == (1.0, "pad", 16000)
    assert card.thresholds_from == "validation"
    assert len({*card.thresholds, 0.5}) > 1, "thresholds were not chosen on the validation clips"
    assert card.weights_fingerprint == json.loads((run / "student.json").read_text())["weights_fingerprint"]


def test_parity_is_measured_on_the_validation_clips(export: Path) -> None:
    parity = json.loads((export / "parity.json").read_text())
    assert (parity["clips"], parity["num_clips"]) == ("the run's validation clips", 6)
    assert 0 < parity["largest_logit_difference"] < 1e-4
    assert parity["top1_agreement"] == 1.0
    assert parity["metrics"]["pytorch"]["mAP"] == parity["metrics"]["exported"]["mAP"] == 1.0
    assert parity["classes"]["dog"]["clips"] == 3
    assert parity["costs"]["bytes"] == (export / "model.onnx").stat().st_size
    assert parity["costs"]["latency_seconds"]["1"] > 0
    assert parity["costs"]["memory_bytes"] > 1e5
    page = (export / "parity.html").read_text()
    assert "rain, heavy" in page
    assert "http" not in page.replace("http-equiv", "")


def test_tag_py_gives_the_scores_of_evaluation(run: Path, export: Path) -> None:
    """Of clips shorter and longer than a window, and of another rate; in a process that cannot import torch or our packages."""
    files = sorted(run.parent.glob("*.wav"))
    blocked = "import sys; sys.modules['torch'] = None; import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", blocked, "tag.py", "--json", *map(str, files), "missing.wav", "README.md"]
    done = subprocess.run(command, cwd=export, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "missing.wav" in done.stderr
    assert re.search("README.md: .* \\(convert other formats first: ffmpeg", done.stderr)
    assert "Traceback" not in done.stderr
    found = [json.loads(line)["scores"] for line in done.stdout.splitlines()]
    assert len(found) == 6
    student = load_student(run)
    clips = exporting.clips_at(run.parent, exporting.read_subject(str(run), None))
    for number, scores in enumerate(found):
        with torch.inference_mode():
            logits = student(LogMel(FRONTEND)(torch.from_numpy(clips.windows(number)))).logits.mean(0)
        wanted = logits.sigmoid().numpy()
        assert np.abs(np.array([scores[name] for name in NAMES]) - wanted).max() < 1e-4
        assert list(scores) == [NAMES[index] for index in np.argsort(-wanted)]


def test_a_tagger_gives_the_same_tags_with_the_run_and_its_export(run: Path, export: Path) -> None:
    from_run, from_export = Tagger.load(run), Tagger.load(export, threads=1)
    assert np.array_equal(from_run.thresholds, from_export.thresholds)
    assert from_export.model.thresholds_from == "validation"
    for path in sorted(run.parent.glob("*.wav")):
        wanted, found = from_run(path), from_export(path)
        assert np.abs(found.scores - wanted.scores).max() < 1e-5
        assert np.abs(found.embedding - wanted.embedding).max() < 1e-4
        assert found.present == wanted.present
    with pytest.raises(ValueError, match="an export runs on the CPU; found device 'cuda'"):
        Tagger.load(export, device="cuda")


def test_an_export_is_a_teacher_again(run: Path, export: Path) -> None:
    waveform = 0.1 * torch.randn(2, 16000, generator=torch.Generator().manual_seed(0))
    wanted = load_teacher(run)(waveform)
    for spec in (export, export / "model.onnx"):
        teacher = load_teacher(spec)
        assert (teacher.class_names, teacher.sample_rate_hz, teacher.clip_seconds) == (NAMES, 16000, 1.0)
        assert (teacher(waveform) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("weights", ["fp16", "int8"])
def test_fewer_bits_make_a_smaller_file_that_still_agrees(
    run: Path, export: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kd.deploy.graph.stored_weights.FEWEST_INT8", 32)  # the tiny student's layers are all narrow
    network_file = run.parent / weights
    assert main([str(run), "--out", str(network_file), "--weights", weights]) == 0
    kinds = {
        onnx.TensorProto.DataType.Name(tensor.data_type)
        for tensor in onnx.load(network_file / "model.onnx").graph.initializer
    }
    assert ("FLOAT16" in kinds, "INT8" in kinds) == (True, weights == "int8")
    parity = json.loads((network_file / "parity.json").read_text())
    assert 0 < parity["largest_logit_difference"] < 0.2
    assert parity["float_graph_difference"] < 1e-4


def test_a_mel_export_takes_our_log_mel(run: Path) -> None:
    out = run.parent / "mel"
    assert main([str(run), "--out", str(out), "--input", "mel", "--weights", "fp32", "--batch", "1"]) == 0
    assert not (out / "tag.py").exists()
    model = session(out)
    assert model.get_inputs()[0].shape == [1, 1, 24, "frames"]
    waveform = 0.1 * torch.randn(1, 9000, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        mel = LogMel(FRONTEND)(waveform)
        wanted = load_student(run)(mel).logits.numpy()
    assert np.abs(model.run(["logits"], {"mel": mel.numpy()})[0] - wanted).max() < 1e-4
    assert (load_teacher(out)(waveform) - torch.from_numpy(wanted)).abs().max() < 1e-4


def test_int8_activations_are_calibrated_on_given_clips(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kd.deploy.graph.activations.FEWEST_INT8", 32)
    out = run.parent / "act8"
    command = [
        str(run),
        "--out",
        str(out),
        "--activations",
        "int8",
        "--calibration-clips",
        str(run.parent),
    ]
    assert main([*command, "--allow-difference"]) == 0
    assert "calibrating int8 activations on the 6 audio files" in capsys.readouterr().out
    model = onnx.load(out / "model.onnx")
    quantized = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert quantized
    assert not any("frontend" in node.name for node in quantized)
    parity = json.loads((out / "parity.json").read_text())
    assert 1e-4 < parity["largest_logit_difference"] < 0.5
    assert read_export(out).activations == "int8"


# -- Refusals ----------------------------------------------------------------------------------------------------------


def test_an_export_that_disagrees_is_refused_by_name_and_leaves_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    true_model = exporting.onnx_model

    def wrong(*arguments, **options):
        model = true_model(*arguments, **options)
        bias = next(tensor for tensor in model.graph.initializer if tensor.name == "student.classifier.2.bias")
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(0.01), bias.name))
        return model

    monkeypatch.setattr(exporting, "onnx_model", wrong)
    assert main([str(run), "--out", str(run.parent / "wrong")]) == 2
    message = capsys.readouterr().err
    assert "does not agree with PyTorch" in message
    assert "for clip 'clip " in message
    assert "a logit differs by 0.01 " in message
    assert not (run.parent / "wrong").exists()
    assert not list(run.parent.glob(".wrong*"))


def test_what_is_lost_with_fewer_bits_is_refused_unless_allowed(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    true_store = exporting.store_weights

    def coarse(model, weights, channels):
        for tensor in model.graph.initializer:
            if tensor.name.endswith("classifier.2.weight"):
                values = onnx.numpy_helper.to_array(tensor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros_like(values), tensor.name))
        true_store(model, weights, channels)

    monkeypatch.setattr(exporting, "store_weights", coarse)
    monkeypatch.setattr("kd.deploy.graph.stored_weights.FEWEST_INT8", 32)
    command = [str(run), "--out", str(run.parent / "coarse"), "--weights", "int8"]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert "loses too much on the run's validation clips" in message
    assert "mAP drops by" in message
    assert not (run.parent / "coarse").exists()
    assert main([*command, "--allow-difference"]) == 0
    assert "accepted with --allow-difference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.onnx").unlink(), "model.onnx is missing"),
        (lambda folder: (folder / "tag.py").unlink(), "tag.py is missing"),
        (lambda folder: (folder / "export.json").write_text("[]"), "must hold an object"),
        (lambda folder: (folder / "model.onnx").write_bytes(b"onnx"), "was changed after the export"),
        (lambda folder: edited_card(folder, version=9), "format version 9"),
        (lambda folder: edited_card(folder, thresholds=[0.5]), "thresholds must be 3 numbers"),
        (lambda folder: edited_card(folder, files={"../x.onnx": {}}), "does not list model.onnx"),
        (
            lambda folder: strange_model(folder, external="../../secret"),
            "keeps weights in another file, '../../secret'",
        ),
        (lambda folder: strange_model(folder, domain="my.company"), "custom operators ('my.company')"),
    ],
)
def test_a_damaged_or_strange_folder_is_refused_in_one_line(export: Path, tmp_path: Path, damage, message: str) -> None:
    folder = tmp_path / "export"
    shutil.copytree(export, folder)
    damage(folder)
    with pytest.raises(ValueError, match="export") as caught:
        load_teacher(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def edited_card(folder: Path, **changes) -> None:
    path = folder / "export.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def strange_model(folder: Path, external: str = "", domain: str = "") -> None:
    """Changes the model as a stranger would, with a card that fits it."""
    from teacher_logits.teachers.export_folder import file_facts

    model = onnx.load(folder / "model.onnx")
    if external:
        tensor = model.graph.initializer[0]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=external)
        tensor.ClearField("raw_data")
    if domain:
        model.graph.node[3].domain = domain
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    files = json.loads((folder / "export.json").read_text())["files"]
    edited_card(folder, files=files | {"model.onnx": file_facts(folder / "model.onnx")})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "neither a run folder nor NAME@WEIGHTS"),
        (["mn01@nowhere.pt"], "carry no class names"),
        (["{runs}"], "holds several students; name one of its folders: 'mine'"),
        (["{export}"], "is an export already"),
        (["{run}", "--weights", "fp32", "--allow-difference"], "--allow-difference is for fp16 and int8"),
        (["{run}", "--out", "{export}"], "give --replace, or another --out"),
        (["{run}", "--out", "{run}"], "is an input (--student); choose another --out"),
        (["{run}", "--out", "{other}"], "holds something else than an export"),
        (["{run}", "--clips", "nowhere"], "no such clip store or folder: nowhere"),
        (["{run}", "--activations", "int8"], "give some with --calibration-clips"),
    ],
)
def test_a_wrong_command_ends_with_one_message(
    run: Path, export: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("of somebody")
    places = {"run": run, "export": export, "runs": run.parent, "other": tmp_path}
    given = [argument.format(**places) for argument in arguments]
    if "--out" not in given:
        given += ["--out", str(run.parent / "unused")]
    try:
        code = main(given)
    except SystemExit as ended:  # of tyro, for values that the configuration refuses
        code = ended.code
    assert code == 2
    said = capsys.readouterr()
    shown = " ".join((said.err + said.out).replace("│", " ").split())
    assert message in shown
    assert not (run.parent / "unused").exists()
