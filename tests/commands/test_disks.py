"""Disks that are full or take no files: a plain message, nothing saved is lost, and the same command goes on later."""

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from audio_datasets import pack as packing
from audio_datasets.audio.codec import encode
from audio_datasets.system.disk_space import readable_bytes, require_space
from kd import finetune as finetuning
from kd import pretrain as pretraining
from kd.training import checkpoint
from kd.training.checkpoint import checkpoints, load_checkpoint
from students import create_student
from students.card import save_student
from students.frontend import LogMelConfig
from teacher_logits import precompute

Full = Callable[[int], AbstractContextManager[None]]
CLASSES = ("hiss", "hum, low", "click")


@pytest.fixture(params=["limit on file size", "small disk"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Full]]:
    """(folder, ``full(bytes)``): within the context about so many bytes fit into the folder, or into any file in it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "limit on file size":

        @contextmanager
        def full(size: int) -> Iterator[None]:
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
            try:
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)

        yield folder, full
        return

    def mount(*options: str) -> bool:
        return subprocess.run(["mount", *options], capture_output=True).returncode == 0

    if os.geteuid() != 0 or not mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)):
        pytest.skip("a small disk needs the right to mount one")

    @contextmanager
    def full(size: int) -> Iterator[None]:
        used = os.statvfs(folder)
        used_bytes = (used.f_blocks - used.f_bfree) * used.f_frsize
        assert mount("-o", f"remount,size={(used_bytes + size) // 1024}k", str(folder))
        try:
            yield
        finally:
            assert mount("-o", "remount,size=64m", str(folder))

    yield folder, full
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def no_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room that is there when a command begins and is taken by others later."""
    for module in (packing, precompute, checkpoint):
        monkeypatch.setattr(module, "require_space", lambda *_: None)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fails_plainly(main: Callable, arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err.rpartition("error: ")
    assert error[1]
    assert "Traceback" not in error[2]
    return error[2].splitlines()[0]


def full_or_too_large(message: str) -> bool:
    return any(words in message for words in ("No space left", "File too large", "cannot be written"))


@pytest.mark.usefixtures("no_forecast")
def test_packing(disk: tuple[Path, Full], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, full = disk
    for index in range(4):
        path = tmp_path / "sounds" / "dog" / f"{index}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = 0.1 * np.random.default_rng(index).standard_normal(100_000)
        path.write_bytes(encode(noise.astype(np.float32), 32000, "wav"))
    command = [str(tmp_path / "sounds"), "--workers", "1", "--shard-clips", "1", "--out"]
    assert packing.main([*command, str(tmp_path / "whole.h5")]) == 0
    # Shards of 0.2 MB and a store of 0.8 MB: the small disk does not take all shards, the limit does not take the store.
    with full(780_000):
        assert full_or_too_large(fails_plainly(packing.main, [*command, str(folder / "clips.h5")], capsys))
        assert not (folder / "clips.h5").exists()
        assert len(list(folder.glob("clips.h5.partial/shard-*.h5"))) >= 2
        assert not list(folder.rglob("*.tmp")), "what could not be finished takes no room"
    assert packing.main([*command, str(folder / "clips.h5")]) == 0
    assert (folder / "clips.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    torch.manual_seed(0)
    save_student(folder, create_student("mn01", 3), CLASSES, LogMelConfig(), {"clip_seconds": 0.5})
    return folder


@pytest.mark.usefixtures("no_forecast")
def test_teaching(
    disk: tuple[Path, Full], tiny_store: Path, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, full = disk
    settings = ["--workers", "0", "--shard-clips", "4", "--batch-size", "4"]
    command = ["--clips", str(tiny_store), "--teacher", str(run_folder), *settings, "--out"]
    assert precompute.main([*command, str(tmp_path / "whole")]) == 0
    # The plan and the shards fit, the store does not; on a disk each file takes whole blocks.
    with full(24_000 if folder.is_mount() else 7_000):
        assert full_or_too_large(fails_plainly(precompute.main, [*command, str(folder)], capsys))
        assert not (folder / "small.h5").exists()
        assert len(list(folder.glob("small.h5.partial/shard-*.npy"))) == 3
    assert precompute.main([*command, str(folder)]) == 0
    assert (folder / "small.h5").read_bytes() == (tmp_path / "whole" / "small.h5").read_bytes()


@pytest.mark.usefixtures("no_forecast")
def test_training(disk: tuple[Path, Full], tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, full = disk
    settings = [
        "--student",
        "mn01",
        "--label-weight",
        "1",
        "--batch-size",
        "4",
        "--clip-seconds",
        "0.3",
        "--workers",
        "0",
        "--log-every-steps",
        "1",
    ]

    def command(out: Path, epochs: int) -> list[str]:
        return [
            "--clips",
            str(tiny_store),
            "--out",
            str(out),
            *settings,
            "--epochs",
            str(epochs),
            "--keep-checkpoints",
            "9",
        ]

    assert pretraining.main(command(tmp_path / "whole", 3)) == 0
    checkpoint_bytes = sum(map(len, files(checkpoints(tmp_path / "whole" / "checkpoints")[-1]).values()))
    # Room for one and a half checkpoints; under the limit on the size of a file, an optimizer's state does not fit.
    limit = 0 if folder.is_mount() else checkpoint_bytes // 2
    room = limit or checkpoint_bytes * 3 // 2
    with full(room):
        assert full_or_too_large(fails_plainly(pretraining.main, command(folder / "run", 3), capsys))
        found = checkpoints(folder / "run" / "checkpoints")
        assert len(found) == (0 if limit else 1)
        for checkpoint in found:
            load_checkpoint(checkpoint)
        assert not list(folder.rglob("*.tmp")), "half a checkpoint takes no room"
    assert pretraining.main(command(folder / "run", 3)) == 0
    for name in ("student.safetensors", "metrics.jsonl"):
        assert (folder / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert load_file(folder / "run" / "student.safetensors")


def test_room_is_asked_for_before_a_long_write(
    tiny_store: Path,
    run_folder: Path,
    make_task_folder: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, int] = {}

    def too_little(folder: Path, needed_bytes: int, what: str) -> None:
        asked[what] = needed_bytes
        require_space(folder, needed_bytes + 10**18, what)

    for module in (packing, precompute, checkpoint):
        monkeypatch.setattr(module, "require_space", too_little)
    sound = tmp_path / "sounds" / "dog" / "a.wav"
    sound.parent.mkdir(parents=True)
    sound.write_bytes(encode(np.full(32000, 0.1, dtype=np.float32), 32000, "wav"))
    pack = [str(tmp_path / "sounds"), "--out", str(tmp_path / "c.h5"), "--workers", "1"]
    teach = [
        "--clips",
        str(tiny_store),
        "--teacher",
        str(run_folder),
        "--out",
        str(tmp_path / "logits"),
        "--workers",
        "0",
    ]
    train = ["--clips", str(tiny_store), "--label-weight", "1", "--student", "mn01", "--out", str(tmp_path / "run")]
    data = str(make_task_folder("esc50"))
    finetune = ["--task", "esc50", "--data", data, "--student", "mn01", "--out", str(tmp_path / "tuned")]
    for main, arguments in (
        (packing.main, pack),
        (precompute.main, teach),
        (pretraining.main, [*train, "--batch-size", "4"]),
        (finetuning.main, finetune),
    ):
        message = fails_plainly(main, arguments, capsys)
        assert "needs about 1000000.0 TB" in message
        assert "are free" in message
    student = create_student("mn01", 3)
    weights = sum(value.nbytes for value in student.state_dict().values())
    checkpoint_bytes = weights + 2 * sum(parameter.nbytes for parameter in student.parameters())  # Adam's moments
    assert asked == {
        "packing 1 clips (shards, then the store)": 2 * sound.stat().st_size,
        "the logits of small for 12 clips": 2 * 2 * 12 * 3,
        "keeping 3 more checkpoints": 3 * checkpoint_bytes,
        "keeping 4 more checkpoints": 4 * checkpoint_bytes,  # two for the first of three folds
    }


def test_a_folder_that_takes_no_files(
    tiny_store: Path, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the place of a folder")
    out = str(tmp_path / "file" / "x")
    teach = ["--clips", str(tiny_store), "--teacher", str(run_folder), "--out", out, "--workers", "0"]
    train = ["--clips", str(tiny_store), "--label-weight", "1", "--student", "mn01", "--out", out, "--batch-size", "4"]
    for main, arguments in ((precompute.main, teach), (pretraining.main, train)):
        assert str(tmp_path / "file") in fails_plainly(main, arguments, capsys)


def test_sizes_for_people() -> None:
    assert [readable_bytes(n) for n in (0, 999, 1500, 2e9, 3e15)] == [
        "0 bytes",
        "999 bytes",
        "1.5 KB",
        "2.0 GB",
        "3000.0 TB",
    ]
