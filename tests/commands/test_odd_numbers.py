"""Numbers that make no sense in files: in cards of students, in the metadata of ONNX models, in logit stores."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from audio_datasets.stores.clip_store import ClipStore
from kd.cli import main
from teacher_logits.store import LogitStore, write_logit_store
from teacher_logits.teachers.base import Teacher

ODD_SECONDS = ["a word", None, 10**9, 0, -1, True, [1], "1e400"]


def with_card(run_folder: Path, folder: Path, change: Callable[[dict], None]) -> Path:
    """A copy of a run folder with another card. Numbers in quotes that begin with a digit are written without the quotes."""
    shutil.copytree(run_folder, folder)
    card = json.loads((folder / "student.json").read_text())
    change(card)
    (folder / "student.json").write_text(json.dumps(card).replace('"1e400"', "1e400").replace('"1e308"', "1e308"))
    return folder


@pytest.mark.parametrize("seconds", ODD_SECONDS)
def test_clip_seconds_of_a_card(seconds: object, run_folder: Path, tiny_store: Path, tmp_path: Path, capsys) -> None:
    run = with_card(run_folder, tmp_path / "run", lambda card: card["provenance"].update(clip_seconds=seconds))
    for command in (
        ("evaluate", "--tagger", run, "--clips", tiny_store),
        ("export", run, "--out", tmp_path / "export"),
        ("teach", "--clips", tiny_store, "--teacher", run, "--out", tmp_path / "logits"),
    ):
        assert main(list(map(str, command))) == 2
        error = capsys.readouterr().err
        assert f"{run / 'student.json'}: clip_seconds must be a number above 0 and at most 3,600; found" in error


@pytest.mark.parametrize(
    "setting",
    [{"n_fft": 10**9}, {"n_mels": 10**9}, {"sample_rate_hz": 10**30}, {"scale": "1e308"}, {"shift": "a word"}],
)
def test_front_ends_of_cards(setting: dict, run_folder: Path, tiny_store: Path, tmp_path: Path, capsys) -> None:
    run = with_card(run_folder, tmp_path / "run", lambda card: card["frontend"].update(setting))
    assert main(["evaluate", "--tagger", str(run), "--clips", str(tiny_store)]) == 2
    error = capsys.readouterr().err
    assert f"{run / 'student.json'}: {next(iter(setting))} must be" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("seconds", [*ODD_SECONDS[:3], float("nan"), float("inf")])
def test_clip_seconds_of_a_teacher(seconds: object, tiny_store: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="clip_seconds must be a number above 0 and at most 3,600; found"):
        Teacher("x", ("a", "b"), sample_rate_hz=32_000, clip_seconds=seconds)
    store = ClipStore.open(tiny_store)
    path = tmp_path / "logits.h5"
    write_logit_store(
        path,
        clip_ids=store.clip_ids[:1],
        audio_digests=store.audio_digests([0]),
        logit_blocks=[store.targets([0]).astype("float16")],
        class_names=store.class_names,
        teacher={"name": "x", "clip_seconds": seconds},
        clip_store_fingerprint=store.fingerprint,
    )
    with pytest.raises(ValueError, match=r"logits\.h5 is a damaged logit store: its teacher's clip_seconds must be"):
        LogitStore.open(path)
    with pytest.raises(ValueError, match="sample_rate_hz must be a whole number from 1 to 1,000,000; found"):
        Teacher("x", ("a", "b"), sample_rate_hz=10**30)


def test_numbers_in_the_metadata_of_an_onnx_model(tmp_path: Path, tiny_store: Path, capsys) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    inputs, outputs = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", size])
        for name, size in (("x", "samples"), ("logits", 3))
    )
    three = onnx.helper.make_tensor("three", onnx.TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
    mean = onnx.helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1], keepdims=1)
    node = onnx.helper.make_node("Mul", ["mean", "three"], ["logits"])
    graph = onnx.helper.make_graph([mean, node], "g", [inputs], [outputs], [three])
    for key, value, said in (
        ("clip_seconds", "1e308", "clip_seconds must be"),
        ("clip_seconds", "1000000000", "clip_seconds must be"),
        ("clip_seconds", "NaN", "clip_seconds must be"),
        ("clip_seconds", '"a word"', "the metadata's clip_seconds has the wrong type"),
        ("clip_seconds", "[" * 100_000, "the metadata's clip_seconds has the wrong type"),
        ("sample_rate_hz", "9" * 400, "sample_rate_hz must be"),
    ):
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
        model.metadata_props.add(key=key, value=value)
        path = tmp_path / "model.onnx"
        onnx.save(model, path)
        assert main(["teach", "--clips", str(tiny_store), "--teacher", str(path), "--out", str(tmp_path / "l")]) == 2
        error = capsys.readouterr().err
        assert said in error, (key, value[:20])
        assert len(error) < 2000
