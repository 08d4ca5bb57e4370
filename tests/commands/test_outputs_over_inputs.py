"""No command writes over what it reads, whatever the path is spelled like, or over a file of another kind."""

import json
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from audio_datasets.system.paths.outputs import check_outputs, is_chart
from kd.cli import main
from kd.evaluate import EvaluateConfig, results_file
from students import create_student
from students.card import save_student
from students.frontend import LogMelConfig

CLASSES = ("hiss", "hum, low", "click")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    save_student(folder, create_student("mn01", 3), CLASSES, LogMelConfig(), {"clip_seconds": 0.5})
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which a command refuses its arguments."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def spelled(path: Path, how: str) -> Path:
    """The same file by another path."""
    other = path.with_name("other.json")
    if how == "symbolic link":
        other.symlink_to(path)
    elif how == "hard link":
        os.link(path, other)
    else:
        (path.parent / "sub").mkdir()
        other = path.parent / "sub" / ".." / path.name
    return other


@pytest.fixture
def listed(tmp_path: Path, tiny_list: pyarrow.Table) -> Path:
    pyarrow.parquet.write_table(tiny_list, tmp_path / "list.parquet")
    return tmp_path / "list.parquet"


@pytest.fixture
def tiny_list() -> pyarrow.Table:
    return pyarrow.table({"clip_id": ["a"], "path": ["a.wav"], "labels": ["dog"]})


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_pack_keeps_the_list_that_it_reads(
    listed: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    before = contents(listed.parent)
    error = refused(capsys, "pack", listed, "--out", listed.with_suffix(".h5"), *more)
    assert "list.parquet would be overwritten with the manifest of list.h5, but it is an input (SOURCE)" in error
    assert contents(listed.parent) == before


def test_pack_keeps_the_class_list_and_the_manifest_of_a_store_beside_it(
    listed: Path, make_tiny_store, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = listed.with_name("c.missing.txt")
    classes.write_text("dog\n")
    error = refused(capsys, "pack", listed, "--out", listed.with_name("c.h5"), "--class-names", classes)
    assert (
        "c.missing.txt would be overwritten with a list of clips of c.h5, but it is an input (--class-names)" in error
    )
    assert classes.read_text() == "dog\n"

    store = make_tiny_store("c.h5")
    manifest = store.with_suffix(".parquet")
    before = manifest.read_bytes()
    error = refused(capsys, "pack", listed, "--out", store.with_suffix(".hdf5"), "--overwrite")
    assert f"{manifest.name} beside {store.with_suffix('.hdf5')} would replace that of {store}" in error
    store.unlink()
    error = refused(capsys, "pack", listed, "--out", store)
    assert f"{manifest} exists and holds something else than the manifest of {store.name}" in error
    assert manifest.read_bytes() == before


@pytest.mark.parametrize("how", ["symbolic link", "hard link", "dots"])
def test_evaluate_keeps_the_clip_store_under_any_name(
    how: str, run_folder: Path, make_tiny_store, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_tiny_store("c.h5")
    out, before = spelled(store, how), store.read_bytes()
    error = refused(capsys, "evaluate", "--tagger", run_folder, "--clips", store, "--out", out, "--overwrite")
    assert f"{out} would be overwritten with the results of kd evaluate, but it is an input (--clips)" in error
    assert store.read_bytes() == before
    assert out.samefile(store)


def test_evaluate_keeps_the_tagger_and_what_lies_beside_the_clips(
    run_folder: Path, make_tiny_store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, weights = make_tiny_store("c.h5"), tmp_path / "w.pt"
    torch.save(create_student("mn01", 3).state_dict(), weights)
    before = contents(run_folder), contents(tmp_path)
    cases = (
        (f"mn01@{weights}", weights, "an input (--tagger)"),
        (run_folder, run_folder / "student.safetensors", "part of an input (--tagger)"),
        (run_folder, store.with_suffix(".parquet"), f"an input ({store.stem}.parquet belongs to --clips)"),
    )
    for tagger, out, expected in cases:
        error = refused(capsys, "evaluate", "--tagger", tagger, "--clips", store, "--out", out, "--overwrite")
        assert f"{out} would be overwritten with the results of kd evaluate, but it is {expected}" in error
    assert (contents(run_folder), contents(tmp_path)) == before


def test_evaluate_replaces_its_own_results_only(
    run_folder: Path, make_tiny_store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "notes.json"
    out.write_text('{"mine": 1}')
    command = ("evaluate", "--tagger", run_folder, "--clips", make_tiny_store("c.h5"), "--workers", 0, "--out", out)
    error = refused(capsys, *command)
    assert "holds something else than the results of kd evaluate; replace it with --overwrite" in error
    assert json.loads(out.read_text()) == {"mine": 1}
    assert main([str(argument) for argument in (*command, "--overwrite")]) == 0
    assert "mAP" in json.loads(out.read_text())
    tiny = EvaluateConfig(str(run_folder), tmp_path / "c.h5", out=out)
    check_outputs(tiny, [results_file(tiny)])  # without --overwrite


def test_import_logits_and_compact_keep_their_arrays(
    tmp_path: Path, tiny_logits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    array, classes = tmp_path / "logits.npy", tmp_path / "classes.txt"
    np.save(array, np.zeros((1, 3), np.float32))
    classes.write_text("a\nb\nc\n")
    (tmp_path / "index.json").write_text('{"x": 0}')
    before = contents(tmp_path)
    command = ("import-logits", "--index", tmp_path / "index.json", "--logits", array, "--class-names", classes)
    for out, option in ((array, "--logits"), (classes, "--class-names"), (tmp_path / "index.json", "--index")):
        error = refused(capsys, *command, "--out", out, "--overwrite")
        assert f"{out} would be overwritten with a logit store, but it is an input ({option})" in error
    assert contents(tmp_path) == before
    stored = tiny_logits.read_bytes()
    error = refused(capsys, "compact-logits", "--logits", tiny_logits, "--out", tiny_logits, "--keep", 1, "--replace")
    assert "it is an input (--logits)" in error
    assert tiny_logits.read_bytes() == stored


def test_tables_and_charts(
    tmp_path: Path, tiny_store: Path, tiny_logits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(
        capsys, "verify", "--logits", f"{tiny_logits}:0.5", "--clips", tiny_store, "--table", tiny_store, "--overwrite"
    )
    assert "it is an input (--clips)" in error
    error = refused(
        capsys, "verify", "--logits", f"{tiny_logits}:0.5", "--clips", tiny_store, "--table", tiny_logits, "--overwrite"
    )
    assert "it is an input (--logits)" in error
    mine = tmp_path / "mine.md"
    mine.write_text("# Mine\n")
    error = refused(capsys, "compare", tmp_path / "a", tmp_path / "b", "--out", mine)
    assert f"{mine} exists and holds something else than a comparison of runs; replace it with --overwrite" in error
    chart = tmp_path / "chart.png"
    chart.write_bytes(b"\x89PNG a photograph")
    error = refused(capsys, "profile", "--student", "mn01", "--chart", chart)
    assert f"{chart} exists and holds something else than a chart" in error
    error = refused(capsys, "profile", "--student", "mn01", "--chart", tmp_path / "x.png", "--out", tmp_path / "x.png")
    assert "are one file, and cannot both be written" in error
    for name in ("own.png", "own.svg", "own.pdf"):
        figure, _ = plt.subplots(figsize=(2, 1))
        figure.savefig(tmp_path / name)
        plt.close(figure)
        assert is_chart(tmp_path / name)


def test_tag_keeps_other_arrays(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    array = tmp_path / "mine.npz"
    np.savez(array, mine=np.zeros(3))
    error = refused(capsys, "tag", tmp_path, "--tagger", run_folder, "--embeddings", array, "--overwrite")
    assert f"{array} would be overwritten with embeddings, but it is part of an input (FILES)" in error
    (tmp_path / "sounds").mkdir()
    error = refused(capsys, "tag", tmp_path / "sounds", "--tagger", run_folder, "--embeddings", array)
    assert f"{array} exists and holds something else than embeddings; replace it with --overwrite" in error
    assert list(np.load(array)) == ["mine"]


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_run_keeps_the_student_that_it_starts_from(
    command: str, tmp_path: Path, tiny_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    save_student(run, create_student("mn01", 3), CLASSES, LogMelConfig(), {"clip_seconds": 0.5})
    (tmp_path / "link.safetensors").symlink_to(run / "student.safetensors")
    before = contents(tmp_path)
    labels = ("--clips", tiny_store, "--label-weight", 1)
    data = labels if command == "pretrain" else ("--task", "folder", "--data", tmp_path / "sounds")
    for weights in (run / "student.safetensors", tmp_path / "link.safetensors"):
        error = refused(capsys, command, *data, "--out", run, "--student", "mn01", "--weights", weights)
        assert f"{weights} (--weights) is part of what is written to {run}" in error
    if command == "finetune":
        error = refused(capsys, command, *data, "--out", run, "--init", run)
        assert f"--out {run} is an input (--init)" in error
    assert contents(tmp_path) == before


def test_a_run_folder_may_be_called_like_its_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mn01").mkdir()
    error = refused(capsys, "pretrain", "--clips", tiny_store, "--out", "mn01", "--student", "mn01")
    assert "there are no --logits" in error
    error = refused(
        capsys,
        *("pretrain", "--clips", tiny_store, "--out", "mn01", "--student", "mn01", "--label-weight", 1),
        *("--folds", 77),
    )
    assert "77" in error
