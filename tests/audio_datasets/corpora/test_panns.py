"""PANNs' file of waveforms: every sample, id and class as it was packed there."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from audio_datasets.pack import PackConfig, main, pack
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.tasks.catalog import get_task, read_listing
from audio_datasets.tasks.task import read_task

CLASSES = ("Speech", "Male speech, man speaking", "Dog")


@pytest.fixture
def waveforms(make_task_folder: Callable[..., Path]) -> Path:
    return make_task_folder("panns")


@pytest.mark.parametrize("audio", ["keep", "pcm16", "flac"])
def test_every_sample_id_and_class_arrives(waveforms: Path, tmp_path: Path, audio: str) -> None:
    rate = None if audio == "keep" else 16000
    config = PackConfig(waveforms, tmp_path / "clips.h5", audio=audio, sample_rate_hz=rate, workers=1, shard_clips=4)
    result = pack(config, show_progress=False)
    assert (result.clips, result.skipped) == (6, ())
    store = ClipStore.open(result.store)
    assert store.class_names == CLASSES
    assert store.clip_ids == [f"Yabcdefgh-{index}_" for index in range(6)]
    with h5py.File(waveforms) as file:
        np.testing.assert_array_equal(store.targets(range(6)), file["target"][:])
        for row in range(6):
            np.testing.assert_array_equal(store.waveform(row, 16000), file["waveform"][row] / np.float32(32768))
    table = store.manifest(["split", "source", "sample_rate_hz"]).to_pylist()
    assert table[5] == {
        "clip_id": "Yabcdefgh-5_",
        "split": "balanced_train",
        "source": "balanced_train.h5[5]",
        "sample_rate_hz": 16000,
    }
    assert pack(config, show_progress=False).already_there


def test_the_class_list_may_be_given(waveforms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (waveforms.parent / "class_labels_indices.csv").rename(tmp_path / "classes.csv")
    assert main([str(waveforms), "--out", str(tmp_path / "clips.h5"), "--workers", "1"]) == 2
    assert "does not hold its class names: give --class-names" in capsys.readouterr().err
    arguments = [str(waveforms), "--out", str(tmp_path / "clips.h5"), "--workers", "1", "--class-names"]
    assert main([*arguments, str(tmp_path / "classes.csv")]) == 0
    assert "6 clips with 3 labels (layout: panns)" in capsys.readouterr().err
    (tmp_path / "two.txt").write_text("Speech\nDog\n")
    assert main([*arguments, str(tmp_path / "two.txt"), "--overwrite"]) == 2
    assert "has targets for 3 classes" in capsys.readouterr().err


def test_floats_and_bytes_as_names_are_read_as_well(waveforms: Path) -> None:
    with h5py.File(waveforms, "r+") as file:
        samples = file["waveform"][:].astype(np.float32) / 32768
        del file["waveform"]
        file.create_dataset("waveform", data=samples, chunks=(1, 4000), compression="gzip")
    clips, _ = read_task(get_task("panns"), waveforms)
    np.testing.assert_array_equal(clips.waveform(4, 16000), samples[4])
    assert clips.duration_seconds(4) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.attrs.pop("sample_rate"), "does not say its sample rate"),
        (lambda file: file.attrs.modify("sample_rate", -1), "found .*-1"),
        (lambda file: _replace(file, "waveform", np.zeros((6, 9), np.int64)), r"waveform is int64 \(6, 9\)"),
        (lambda file: _replace(file, "waveform", np.zeros((5, 9), np.int16)), r"6 names, waveforms \(5, 9\)"),
        (lambda file: _replace(file, "target", np.zeros((6, 3), np.float32)), "truth values as targets"),
        (lambda file: _replace(file, "audio_name", np.array([b"a.wav"] * 6)), "found more than once: 'a'"),
    ],
)
def test_files_that_are_something_else_are_refused(waveforms: Path, change: Callable, message: str) -> None:
    with h5py.File(waveforms, "r+") as file:
        change(file)
    with pytest.raises(ValueError, match=message) as error:
        read_listing(waveforms)
    assert str(waveforms) in str(error.value)


def _replace(file: h5py.File, name: str, values: np.ndarray) -> None:
    del file[name]
    file[name] = values
