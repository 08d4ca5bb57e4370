"""Files that are small outside and huge inside are refused before they take memory. The long form: tests/robustness/bombs.py."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from audio_datasets.stores.manifest import read_parquet
from audio_datasets.system.files import read_arrays
from audio_datasets.system.paths import sizes
from kd.cli import main
from students import create_student, load_weights, weight_files
from students.weights import read_state_dict, student_from_weights

sys.path.insert(0, str(Path(__file__).parents[1] / "robustness"))
import bomb_files

SIZE = 300 * 10**6  # more than is allowed
REFUSED = "GB of memory, but the file takes 0.000 GB on the disk"


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The message of a command that ends with exit code 2."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    return run


# -- Weights -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bombs")
    return {
        "deflated": bomb_files.deflated_checkpoint(folder / "deflated.pt", SIZE),
        "wide": bomb_files.stored_checkpoint(folder / "wide.pt", {"weight": ("0", 1, (10**9,), (0,))}),
        "sparse": bomb_files.sparse_safetensors(folder / "sparse.safetensors", SIZE),
        "slow": bomb_files.slow_checkpoint(folder / "slow.pt"),
    }


@pytest.mark.parametrize("name", ["deflated", "wide", "sparse", "slow"])
def test_weights(name: str, bombs: dict[str, Path], tiny_store: Path, tmp_path: Path, refused) -> None:
    bomb = bombs[name]
    said = REFUSED if name != "slow" else "it holds tuples that are nested too deeply"
    pretrain = ("pretrain", "--clips", tiny_store, "--label-weight", 1, "--student", "mn01", "--out", tmp_path / "run")
    pretrain += ("--batch-size", 4)
    for command in (
        (*pretrain, "--weights", bomb),
        ("tag", "--tagger", f"mn01@{bomb}", tiny_store),
        ("teach", "--clips", tiny_store, "--teacher", f"passt@{bomb}", "--out", tmp_path / "logits"),
    ):
        error = refused(*command)
        assert str(bomb) in error
        assert said in error


def test_a_student_in_a_run_folder(
    bombs: dict[str, Path], run_folder: Path, tiny_store: Path, tmp_path, refused
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    (run / "student.safetensors").unlink()
    (run / "student.safetensors").symlink_to(bombs["sparse"])
    for command in (
        ("evaluate", "--tagger", run, "--clips", tiny_store),
        ("export", run, "--out", tmp_path / "export"),
        ("teach", "--clips", tiny_store, "--teacher", run, "--out", tmp_path / "logits"),
    ):
        assert REFUSED in refused(*command)


def test_only_plain_tensors_are_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    plain = create_student("mn01", 3).state_dict()
    first = next(iter(plain))
    for value, kind in (
        (torch.empty(plain[first].shape, device="meta"), "device meta"),
        (torch.zeros(plain[first].shape).to_sparse(), "sparse"),
        (torch.quantize_per_tensor(torch.zeros(plain[first].shape), 0.1, 0, torch.qint8), "quantised"),
        (torch.zeros(plain[first].shape, dtype=torch.complex64), "complex"),
    ):
        torch.save(plain | {first: value}, path)
        with pytest.raises(ValueError, match=rf"w\.pt.*({kind}|contains more than plain tensors)"):
            load_weights(create_student("mn01", 3), path)
    torch.save(plain, path)
    load_weights(create_student("mn01", 3), path)
    torch.save(plain, path, _use_new_zipfile_serialization=False)
    load_weights(create_student("mn01", 3), path)


def test_positions_of_a_passt_that_repeat_one_number(tmp_path: Path) -> None:
    small = create_student("passt_s", 3, width=64, depth=1, heads=1).state_dict()
    tensors = {name: (name, value.numel(), tuple(value.shape), value.stride()) for name, value in small.items()}
    tensors["time_new_pos_embed"] = ("t", 1, (1, 64, 1, 10**9), (0, 0, 0, 0))
    path = bomb_files.stored_checkpoint(tmp_path / "passt.pt", tensors)
    with pytest.raises(ValueError, match="what the shapes of its tensors ask for would take 256"):
        student_from_weights("passt", path)


def test_types_of_safetensors(tmp_path: Path) -> None:
    header = json.dumps({"weight": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}).encode()
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match="odd.safetensors"):
        read_state_dict(path)


def test_the_bound_can_be_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (sizes.LARGEST_VARIABLE, sizes.LARGEST_GB) == (weight_files.LARGEST_VARIABLE, weight_files.LARGEST_GB)
    archive = bomb_files.deflated_npz(tmp_path / "a.npz", "zeros", size=8 * 10**6)
    assert read_arrays(archive)["zeros"].shape == (10**6,)
    weights = bomb_files.sparse_safetensors(tmp_path / "w.safetensors", 8 * 10**6)
    assert read_state_dict(weights)["weight"].shape == (2 * 10**6,)
    monkeypatch.setenv(sizes.LARGEST_VARIABLE, "0.005")
    for read, path in ((read_arrays, archive), (read_state_dict, weights)):
        with pytest.raises(ValueError, match=f"{path.name}: .* set {sizes.LARGEST_VARIABLE}=1"):
            read(path)
    monkeypatch.setenv(sizes.LARGEST_VARIABLE, "much")
    for read, path in ((read_arrays, archive), (read_state_dict, weights)):
        with pytest.raises(
            ValueError, match=f"{sizes.LARGEST_VARIABLE} must be a positive number of gigabytes; found 'much'"
        ):
            read(path)


# -- JSON, tables ------------------------------------------------------------------------------------------------------


def test_nested_json(run_folder: Path, tiny_store: Path, tmp_path: Path, make_task_folder, refused) -> None:
    nested = bomb_files.nested_json()
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    (run / "student.json").write_text(nested)
    (tmp_path / "nested.json").write_text(nested)
    np.save(tmp_path / "rows.npy", np.zeros((4, 3)))
    sounds = make_task_folder("folder")
    index = ("--index", tmp_path / "nested.json", "--clips", tiny_store, "--out", tmp_path / "i.h5")
    for command in (
        ("evaluate", "--tagger", run, "--clips", tiny_store),
        ("tag", "--tagger", run, sounds),
        ("export", run, "--out", tmp_path / "export"),
        ("pack", sounds, "--out", tmp_path / "a.h5", "--class-names", tmp_path / "nested.json"),
        ("import-logits", "--logits", tmp_path / "rows.npy", *index),
    ):
        assert "it is nested too deeply" in refused(*command)


@pytest.mark.parametrize("rows", [2 * 10**7, 20_000])
def test_a_parquet_file_of_one_value(rows: int, tmp_path: Path, refused) -> None:
    if rows > 10**6:
        path = bomb_files.parquet_of_one_row(tmp_path / "list.parquet", rows, "a")
    else:
        import pyarrow
        import pyarrow.parquet

        text = pyarrow.array(["b" * 100_000])
        column = pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(rows, np.int32)), text)
        path = tmp_path / "list.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"clip_id": column}), path, store_schema=False)
    with pytest.raises(ValueError, match=rf"list\.parquet: its .*{REFUSED}"):
        read_parquet(path)
    assert REFUSED in refused("pack", path, "--out", tmp_path / "a.h5")


# -- Stores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["unwritten", "chunked", "sparse", "passt"])
def test_a_clip_store_of_nothing(layout: str, tmp_path: Path, run_folder: Path, refused) -> None:
    if layout == "passt":
        store = bomb_files.passt_store_of_nothing(tmp_path / "clips.h5")
    else:
        store = bomb_files.clip_store_of_nothing(tmp_path / "clips.h5", layout=layout)
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    names = ("--class-names", tmp_path / "names.txt") if layout == "passt" else ()
    for command in (
        ("evaluate", "--tagger", run_folder, "--clips", store, *names),
        ("teach", "--clips", store, "--teacher", run_folder, "--out", tmp_path / "logits", *names),
        ("pretrain", "--clips", store, "--label-weight", 1, "--out", tmp_path / "run", "--student", "mn01", *names),
    ):
        assert REFUSED in refused(*command)


@pytest.mark.parametrize("layout", ["unwritten", "sparse"])
def test_a_logit_store_of_nothing(layout: str, tmp_path: Path, tiny_store: Path, refused) -> None:
    logits = bomb_files.logit_store_of_nothing(tmp_path / "logits.h5", layout=layout)
    pretrain = ("pretrain", "--clips", tiny_store, "--logits", logits, "--out", tmp_path / "run", "--student", "mn01")
    for command in (
        ("verify", "--logits", logits, "--clips", tiny_store),
        ("compact-logits", "--logits", logits, "--out", tmp_path / "small.h5", "--keep", 1),
        pretrain,
    ):
        assert REFUSED in refused(*command)


def test_waveforms_that_are_not_there(tmp_path: Path, refused) -> None:
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    many = bomb_files.panns_of_nothing(tmp_path / "many.h5")
    chunk = bomb_files.panns_of_one_chunk(tmp_path / "chunk.h5", SIZE // 2)
    for path, said in ((many, "the description of its clips"), (chunk, "each chunk of 'waveform'")):
        error = refused(
            "pack", path, "--layout", "panns", "--out", tmp_path / "a.h5", "--class-names", tmp_path / "names.txt"
        )
        assert said in error


# -- ONNX --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", ["ConstantOfShape", "Expand", "Range"])
def test_a_constant_made_of_a_shape(operator: str, tmp_path: Path, tiny_store: Path, refused) -> None:
    pytest.importorskip("onnxruntime")
    model = bomb_files.onnx_constant(tmp_path / "bomb.onnx", operator=operator)
    error = refused("teach", "--clips", tiny_store, "--teacher", model, "--out", tmp_path / "logits", "--workers", 0)
    assert f"{model} needs more memory than it may take: 0.50 GB for one clip" in error
    assert "KD_MODEL_MEMORY_GB=1" in error


def test_a_batch_that_is_too_large_is_given_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    pytest.importorskip("onnxruntime")
    from teacher_logits.teachers.onnx_teacher import load_onnx_teacher

    model = bomb_files.onnx_constant(tmp_path / "small.onnx", elements=10)
    waveforms = torch.linspace(-1, 1, 32 * 16_000).reshape(32, 16_000)
    whole = load_onnx_teacher(model, None)(waveforms)
    monkeypatch.setenv("KD_MODEL_MEMORY_GB", "0.0005")
    in_parts = load_onnx_teacher(model, None)(waveforms)
    assert torch.equal(whole, in_parts)
