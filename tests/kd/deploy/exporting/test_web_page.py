"""The page of an export: in a browser it gives Python's scores; what is in it, and what is refused."""

import base64
import dataclasses
import gzip
import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from audio_datasets.tasks.label_space import LabelGroup, LabelSpace
from kd.deploy.tagging.tagger import Tagger
from kd.deploy.web.onnxruntime_web import OnnxRuntimeWeb, find_onnxruntime_web
from kd.deploy.web.page import write_page, write_web_folder
from kd.export import main
from teacher_logits.teachers.export_folder import read_export

RUNTIME = OnnxRuntimeWeb("9.9", "var ort = {};\n//# sourceMappingURL=ort.js.map", "export default 1;", b"\0asm")


@pytest.fixture(scope="module")
def export(run: Path) -> Path:
    out = run.parent / "export"
    assert main([str(run), "--out", str(out), "--weights", "fp32"]) == 0
    return out


def test_the_page_gives_the_scores_of_python_for_any_rate_length_and_format(
    run: Path, export: Path, sounds: Path, onnxruntime_web: Path | None, drop_on_page: Callable
) -> None:
    try:
        runtime = find_onnxruntime_web(onnxruntime_web)
    except ValueError as error:
        pytest.skip(f"no onnxruntime-web: {error}")
    tagger = Tagger.load(export, threads=1)
    files = sorted(path for path in sounds.rglob("*") if path.suffix in (".wav", ".ogg", ".flac", ".mp3"))
    assert len(files) == 5
    page = write_page(export, read_export(export), "mine", runtime)
    rows, said = drop_on_page(page, [*files, sounds / "notes.txt"])
    assert said.startswith("notes.txt cannot be tagged")
    assert [row["file"] for row in rows] == [file.name for file in files]
    for row, file in zip(rows, files, strict=True):
        wanted = tagger(file)
        assert row["duration_seconds"] == pytest.approx(wanted.duration_seconds, abs=1e-9)
        assert np.abs([row["scores"][name] - score for name, score in wanted.top(3)]).max() < 1e-3
        assert list(row["scores"]) == [name for name, _ in wanted.top(3)]


def test_the_page_holds_the_model_and_nothing_that_a_class_name_could_run(export: Path, tmp_path: Path) -> None:
    names = ("</script><script>alert(1)</script>", "rain & <b>wind</b>", "clock")
    card = dataclasses.replace(read_export(export), label_space=LabelSpace((LabelGroup("", names, True),)))
    text = write_page(export, card, "<i>mine</i>", RUNTIME).read_text()
    assert "alert(1)</script>" not in text
    assert "<i>mine" not in text
    assert "sourceMappingURL" not in text
    described = json.loads(re.search(r'id="card">(.*?)</script>', text)[1])
    assert described["class_names"] == list(names)
    assert (described["sample_rate_hz"], described["window_seconds"]) == (16000, 1.0)
    assert described["timeline"] == {"window_seconds": 1.0, "hop_seconds": 0.5}
    packed = re.search(r'id="model.onnx">(.*?)</script>', text)[1]
    assert gzip.decompress(base64.b64decode(packed)) == (export / "model.onnx").read_bytes()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    assert "http" not in policy


def test_the_folder_for_a_server_has_what_its_page_loads(export: Path) -> None:
    web = write_web_folder(export, read_export(export), "mine", RUNTIME)
    assert sorted(file.name for file in web.iterdir()) == [
        "index.html",
        "model.onnx",
        "runtime.js",
        "runtime.mjs",
        "runtime.wasm",
    ]
    assert (web / "model.onnx").read_bytes() == (export / "model.onnx").read_bytes()
    assert "connect-src 'self'" in (web / "index.html").read_text()
    read_export(export)  # which is an export still


def npm_archive(path: Path, name: str = "onnxruntime-web", without: str = "") -> Path:
    files = {
        "package.json": json.dumps({"name": name, "version": "9.9"}).encode(),
        "dist/ort.wasm.min.js": RUNTIME.script.encode(),
        "dist/ort-wasm-simd-threaded.mjs": RUNTIME.loader.encode(),
        "dist/ort-wasm-simd-threaded.wasm": RUNTIME.binary,
    }
    with tarfile.open(path, "w:gz") as archive:
        for member, content in files.items():
            if member != without:
                info = tarfile.TarInfo(f"package/{member}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def test_the_runtime_comes_from_an_archive_or_a_folder(tmp_path: Path) -> None:
    archive = npm_archive(tmp_path / "good.tgz")
    assert find_onnxruntime_web(archive) == RUNTIME
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "node_modules", filter="data")
    (tmp_path / "node_modules" / "package").rename(tmp_path / "node_modules" / "onnxruntime-web")
    for folder in (tmp_path, tmp_path / "node_modules", tmp_path / "node_modules" / "onnxruntime-web"):
        assert find_onnxruntime_web(folder) == RUNTIME


def test_a_runtime_that_cannot_be_used_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.tgz").write_text("no archive")
    cases = {
        npm_archive(tmp_path / "other.tgz", name="left-pad"): "holds the package 'left-pad'; expected onnxruntime-web",
        npm_archive(tmp_path / "part.tgz", without="dist/ort.wasm.min.js"): "dist/ort.wasm.min.js",
        tmp_path / "text.tgz": "no archive of npm's",
        tmp_path / "missing.tgz": "no such folder or archive",
        tmp_path: "does not hold onnxruntime-web",
    }
    for path, message in cases.items():
        with pytest.raises(ValueError, match="onnxruntime-web|archive") as caught:
            find_onnxruntime_web(path)
        assert message in str(caught.value)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="npm is not installed here") as caught:
        find_onnxruntime_web(None)
    assert "--onnxruntime-web" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--web", "--input", "mel"], "a page needs a model with its front end"),
        (["--onnxruntime-web", "x.tgz"], "--onnxruntime-web would not be used without --web"),
        (["--web", "--onnxruntime-web", "nowhere.tgz"], "no such folder or archive: nowhere.tgz"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_exported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    try:
        code = main([str(run), "--out", str(tmp_path / "out"), *arguments])
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr()
    assert code == 2
    assert message in " ".join((said.out + said.err).replace("│", " ").split())
    assert not (tmp_path / "out").exists()
