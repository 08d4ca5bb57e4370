"""Pipes, devices and sockets are named and left alone, and an HDF5 file's data are read from that file only. Nothing hangs."""

import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.system.paths.inputs import NotAFileError, open_regular
from kd.cli import main

SECRET = b"-----BEGIN PRIVATE KEY-----"
HANG_SECONDS = 120


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """Ends a test that waits for a pipe."""

    def stop(*_: object) -> None:
        pytest.fail("waits for ever")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe.wav")
    return tmp_path / "pipe.wav"


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def test_only_regular_files_are_opened(tmp_path: Path, pipe: Path) -> None:
    (tmp_path / "zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for name, kind in (("pipe.wav", "a pipe"), ("zero", "a device"), ("socket", "a socket"), (".", "a folder")):
            with pytest.raises(NotAFileError, match=f"is {kind}, not a regular file"):
                open_regular(tmp_path / name)
    (tmp_path / "file").write_bytes(b"12")
    with open_regular(tmp_path / "file") as file:
        assert file.read() == b"12"


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (("pack", "SOUNDS", "--out", "OUT.h5"), "--class-names"),
        (("teach", "--clips", "CLIPS", "--teacher", "RUN", "--out", "OUT"), "--class-map"),
        (("evaluate", "--tagger", "RUN", "--clips", "CLIPS"), "--class-names"),
        (("verify", "--clips", "CLIPS"), "--logits"),
        (("pretrain", "--label-weight", "1", "--out", "OUT"), "--clips"),
        (("pretrain", "--clips", "CLIPS", "--label-weight", "1", "--out", "OUT"), "--weights"),
        (("finetune", "--task", "folder", "--data", "SOUNDS", "--out", "OUT"), "--weights"),
        (("import-logits", "--index", "CLIPS", "--clips", "CLIPS", "--out", "OUT.h5"), "--logits"),
        (("export", "RUN", "--out", "OUT"), "--clips"),
    ],
)
def test_a_pipe_as_an_option(
    command: tuple[str, ...], option: str, pipe: Path, tmp_path: Path, tiny_store: Path, run_folder: Path, capsys
) -> None:
    places = {"CLIPS": tiny_store, "RUN": run_folder, "SOUNDS": tmp_path, "OUT": tmp_path / "out"}
    places["OUT.h5"] = tmp_path / "out.h5"
    error = refused(capsys, *(places.get(word, word) for word in command), option, pipe)
    assert f"{option}: {pipe} is a pipe, not a regular file" in error


def test_pack_leaves_special_files_out(
    tmp_path: Path, pipe: Path, make_task_folder: Callable[..., Path], capsys
) -> None:
    sounds = make_task_folder("folder")
    first = next(sounds.rglob("*.wav"))
    (first.parent / "zero.wav").symlink_to("/dev/zero")
    (first.parent / "linked.wav").symlink_to(pipe)
    os.mkfifo(first.parent / "fifo.wav")
    assert main(["pack", str(sounds), "--out", str(tmp_path / "a.h5"), "--workers", "1"]) == 0
    shown = capsys.readouterr()
    assert "zero.wav: the symbolic link leads to a device (/dev/zero)" in shown.out
    assert f"linked.wav: the symbolic link leads to a pipe ({pipe})" in shown.out
    assert "neither files nor folders" in shown.err
    assert all(Path(name).name not in ("zero.wav", "linked.wav") for name in ClipStore.open(tmp_path / "a.h5").clip_ids)

    rows = [f"{name},{name}.wav,dog" for name in ("good", "zero", "pipe", "full")]
    shutil.copy(first, tmp_path / "good.wav")
    (tmp_path / "zero.wav").symlink_to("/dev/zero")
    (tmp_path / "full.wav").symlink_to("/dev/full")
    (tmp_path / "list.csv").write_text("\n".join(["clip_id,path,labels", *rows]))
    assert main(["pack", str(tmp_path / "list.csv"), "--out", str(tmp_path / "b.h5"), "--workers", "1"]) == 0
    shown = capsys.readouterr().out
    assert "is a device, not a regular file" in shown
    assert "is a pipe, not a regular file" in shown
    assert list(ClipStore.open(tmp_path / "b.h5").clip_ids) == ["good"]


def test_a_pipe_inside_a_run_folder(tmp_path: Path, run_folder: Path, tiny_store: Path, capsys) -> None:
    for name in ("student.json", "student.safetensors"):
        run = tmp_path / name
        shutil.copytree(run_folder, run)
        (run / name).unlink()
        os.mkfifo(run / name)
        for command in (
            ("evaluate", "--tagger", run, "--clips", tiny_store),
            ("teach", "--clips", tiny_store, "--teacher", run, "--out", tmp_path / "logits"),
            ("export", run, "--out", tmp_path / "export"),
        ):
            assert str(run / name) in refused(capsys, *command)


# -- HDF5 ----------------------------------------------------------------------------------------------------------------


def with_outside_data(path: Path, name: str, how: str, source: Path) -> None:
    """Makes the dataset ``name`` of a sealed store one whose data lie in ``source``."""
    with h5py.File(path, "r+") as file:
        old = file[name]
        shape, dtype = old.shape, old.dtype
        del file[name]
        if how == "external link":
            file[name] = h5py.ExternalLink(str(source), name)
        elif how == "external storage":
            file.create_dataset(name, shape, dtype, external=[(str(source), 0, h5py.h5f.UNLIMITED)])
        elif how == "symbolic link":
            file[name] = h5py.SoftLink("/elsewhere")
        else:
            layout = h5py.VirtualLayout(shape, dtype)
            layout[:] = h5py.VirtualSource(str(source), name, shape=shape)
            file.create_virtual_dataset(name, layout)


MESSAGES = {
    "external link": "is a link to another file",
    "external storage": "lie in another file",
    "symbolic link": "is a symbolic link, which is not followed",
    "virtual dataset": "is a virtual dataset, whose data lie in other files",
}


@pytest.mark.parametrize("how", MESSAGES)
def test_a_clip_store_is_read_from_its_own_file(
    how: str, tmp_path: Path, make_tiny_store: Callable[..., Path], run_folder: Path, pipe: Path, capsys
) -> None:
    store = make_tiny_store("clips.h5", clips=4)
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET * 100)
    with_outside_data(store, "clip_id", how, secret if how == "external storage" else pipe)
    for command in (
        ("evaluate", "--tagger", run_folder, "--clips", store),
        ("teach", "--clips", store, "--teacher", run_folder, "--out", tmp_path / "logits"),
        ("pretrain", "--clips", store, "--label-weight", 1, "--out", tmp_path / "run", "--student", "mn01"),
    ):
        error = refused(capsys, *command)
        assert f"{store}: " in error
        assert MESSAGES[how] in error
        assert "PRIVATE" not in error


@pytest.mark.parametrize("how", MESSAGES)
def test_a_logit_store_and_a_file_of_waveforms_are_read_from_their_own_files(
    how: str, tmp_path: Path, make_tiny_store, make_tiny_logits, make_task_folder, pipe: Path, capsys
) -> None:
    clips = make_tiny_store("clips.h5", clips=4)
    logits = make_tiny_logits("logits.h5", clips)
    secret = tmp_path / "secret"
    secret.write_bytes(np.zeros(1000, np.float16).tobytes())
    source = secret if how == "external storage" else pipe
    with_outside_data(logits, "logits", how, source)
    assert MESSAGES[how] in refused(capsys, "verify", "--logits", logits, "--clips", clips)
    compact = ("compact-logits", "--logits", logits, "--out", tmp_path / "small.h5", "--keep", 1)
    assert MESSAGES[how] in refused(capsys, *compact)
    folder = make_task_folder("panns")
    panns = folder if folder.is_file() else next(folder.rglob("*.hdf5"))
    with_outside_data(panns, "waveform", how, source)
    assert refused(capsys, "pack", panns, "--out", tmp_path / "packed.h5", "--layout", "panns", "--workers", 1)
    assert not (tmp_path / "packed.h5").exists()
