"""Data-loading workers in tight places: little shared memory, few open files, killed workers, memory that ends, signals."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from audio_datasets.pack import main as pack
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.clip_writer import ClipRecord, write_clip_store
from audio_datasets.system.workers import sharing
from audio_datasets.system.workers.loading import create_loader
from kd.evaluate import main as evaluate
from kd.pretrain import main as pretrain
from students import create_student
from students.card import save_student
from students.frontend import LogMelConfig
from teacher_logits.precompute import main as teach

CLASSES = ("hiss", "hum")
CLIPS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a clip store, ``clips.h5``, and a run to teach with and to evaluate, ``tagger``."""
    folder = tmp_path_factory.mktemp("workers")
    rng = np.random.default_rng(3)
    records = [
        ClipRecord(
            f"clip-{i}", (3000 * rng.standard_normal(16000)).clip(-32768, 32767).astype(np.int16), (CLASSES[i % 2],)
        )
        for i in range(CLIPS)
    ]
    write_clip_store(folder / "clips.h5", records, CLASSES, audio_kind="pcm16", sample_rate_hz=32000)
    torch.manual_seed(0)
    save_student(folder / "tagger", create_student("mn01", 2), CLASSES, LogMelConfig(), {"clip_seconds": 0.5})
    return folder


def commands(place: Path, out: Path, workers: int) -> dict[str, tuple[Callable, list[str]]]:
    """Three commands that load data with workers, on tiny inputs."""
    clips, tagger = str(place / "clips.h5"), str(place / "tagger")
    shared = ["--clips", clips, "--workers", str(workers), "--batch-size", "4"]
    return {
        "teach": (teach, [*shared, "--teacher", tagger, "--out", str(out / "logits"), "--shard-clips", "6"]),
        "pretrain": (
            pretrain,
            [
                *shared,
                "--out",
                str(out / "run"),
                "--label-weight",
                "1",
                "--student",
                "mn01",
                "--epochs",
                "1",
                "--clip-seconds",
                "0.5",
            ],
        ),
        "evaluate": (evaluate, [*shared, "--tagger", tagger, "--out", str(out / "results.json")]),
    }


def results(out: Path) -> tuple[bytes, bytes, dict]:
    return (
        next((out / "logits").glob("*.h5")).read_bytes(),
        (out / "run" / "student.safetensors").read_bytes(),
        {key: value for key, value in json.loads((out / "results.json").read_text()).items() if key != "seconds"},
    )


# -- Little room -------------------------------------------------------------------------------------------------------


def test_no_shared_memory_at_all(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sharing, "shared_memory", lambda: (50_000, 64_000_000))
    for name, (main, arguments) in commands(place, tmp_path, 2).items():
        assert main(arguments) == 2, name
        assert "/dev/shm is full or cannot be written (50.0 KB free)" in capsys.readouterr().err


def test_packing_with_few_open_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in ("a", "b"):
        (tmp_path / "sounds" / name).mkdir(parents=True)
        shutil.copy(Path(__file__).parents[2] / "docs" / "way_of_a_clip.png", tmp_path / "sounds" / name / "x.wav")
    monkeypatch.setattr(sharing, "free_files", lambda: 20)
    command = [str(tmp_path / "sounds"), "--out", str(tmp_path / "c.h5"), "--workers", "2", "--shard-clips", "1"]
    assert pack(command) == 2
    assert "2 worker processes need about 32 open files, but this process may open only 20 more" in (
        message := capsys.readouterr().err
    )
    assert message.rstrip().endswith("or use --workers 1")  # 0 means one for each core


def test_as_many_workers_as_files_allow(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for free, workers in ((1000, 64), (60, 9), (10, 1)):
        monkeypatch.setattr(sharing, "free_files", lambda free=free: free)
        assert sharing.workers_that_fit(64) == workers
        assert (f"note: {workers} worker processes in place of 64" in capsys.readouterr().err) == (workers < 64)


class Batches(torch.utils.data.Dataset):
    """Items of several kinds."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        return {
            "waveform": torch.full((5,), float(index)),
            "known": np.array([index > 1, True]),
            "row": index,
            "empty": torch.zeros(0, 3),
        }


@pytest.mark.parametrize("reason", ["no room", "few files"])
def test_a_batch_through_a_pipe_is_the_same_batch(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = list(create_loader(Batches(), workers=0, batch_size=2))
    if reason == "few files":
        monkeypatch.setattr(sharing, "free_files", lambda: 60)
        monkeypatch.setattr(sharing, "allow_files", lambda workers: None)
    else:
        full = RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

        def no_room(*args: object) -> None:
            raise full

        monkeypatch.setattr(torch.UntypedStorage, "share_memory_", no_room)  # as if another process were quicker
        monkeypatch.setattr(sharing, "default_collate", no_room)
    found = list(create_loader(Batches(), workers=1, batch_size=2))
    assert len(found) == len(expected) == 2
    for got, right in zip(found, expected, strict=True):
        assert got.keys() == right.keys()
        for name, value in right.items():
            assert got[name].dtype == value.dtype
            assert torch.equal(got[name], value)
            assert not got[name].is_shared()
        got["waveform"] += 1  # it can be written to


# -- Workers that end --------------------------------------------------------------------------------------------------


def fails_in_worker(monkeypatch: pytest.MonkeyPatch, failure: Callable[[], None]) -> None:
    """Reading a clip in another process than this one calls ``failure``."""
    parent, read = os.getpid(), ClipStore.waveform

    def waveform(*args: object, **options: object) -> np.ndarray:
        if os.getpid() != parent:
            failure()
        return read(*args, **options)

    monkeypatch.setattr(ClipStore, "waveform", waveform)


def out_of_memory() -> None:
    np.zeros(2**60, dtype=np.uint8)


FAILURES = {
    "SIGKILL": (lambda: os.kill(os.getpid(), signal.SIGKILL), "was ended by a signal: Killed (the system ends processes so when memory runs out)"),
    "SIGSEGV": (lambda: os.kill(os.getpid(), signal.SIGSEGV), "was ended by a signal: Segmentation fault"),
    "exit": (lambda: os._exit(3), "ended with exit code 3"),
    "memory": (out_of_memory, "out of memory in data-loading worker 0"),
}  # fmt: skip


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("command", ["teach", "pretrain", "evaluate"])
def test_a_worker_that_ends_is_one_plain_message(
    command: str,
    failure: str,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    fail, message = FAILURES[failure]
    main, arguments = commands(place, tmp_path, 2)[command]
    with monkeypatch.context() as patched:
        fails_in_worker(patched, fail)
        assert main(arguments) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("error: ") == 1
    assert "What was saved is kept" in error
    assert "Traceback" not in error
    if failure == "SIGKILL":
        assert main(arguments) == 0  # nothing is in its way


def test_memory_that_ends_in_the_main_process(
    monkeypatch: pytest.MonkeyPatch, place: Path, tmp_path: Path, capsys
) -> None:
    def allocate(*args: object) -> None:
        torch.empty(2**58, dtype=torch.uint8)

    monkeypatch.setattr("students.frontend.LogMel.forward", allocate)
    for name, (main, arguments) in commands(place, tmp_path, 0).items():
        assert main(arguments) == 2, name
        error = capsys.readouterr().err
        assert "error: out of memory" in error, error
        assert "Traceback" not in error
