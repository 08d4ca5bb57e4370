"""Files from a stranger: whichever command is pointed at a malicious pickle, the pickle does not run."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kd.cli import main
from kd.training.checkpoint import checkpoints
from students import create_student
from students.card import save_student
from students.frontend import LogMelConfig
from students.weights import load_weights, read_state_dict
from teacher_logits.store import LogitStore
from teacher_logits.stores.shards import ShardFolder

CLASSES = ("hiss", "hum, low", "click")


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.write_text, (self.path, "the pickle ran")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """The file that no test may find."""
    return tmp_path / "written"


def as_pickle(written: Path) -> bytes:
    return pickle.dumps(Evil(written))


def as_checkpoint(written: Path, path: Path) -> bytes:
    torch.save({"features.0.0.weight": Evil(written), "optimizer": Evil(written)}, path)
    return path.read_bytes()


def as_npy(written: Path, path: Path) -> bytes:
    with open(path, "wb") as file:
        np.save(file, np.array([Evil(written)], dtype=object), allow_pickle=True)
    return path.read_bytes()


@pytest.fixture(params=["pickle", "checkpoint", "npy"])
def evil(request: pytest.FixtureRequest, written: Path, tmp_path: Path) -> bytes:
    """The content of a file that runs code if it is loaded carelessly."""
    make = {"pickle": lambda path: as_pickle(written), "checkpoint": lambda path: as_checkpoint(written, path)}
    content = make.get(request.param, lambda path: as_npy(written, path))(tmp_path / "scratch")
    (tmp_path / "scratch").unlink(missing_ok=True)
    return content


def test_the_pickle_would_run_if_it_were_loaded(written: Path) -> None:
    pickle.loads(as_pickle(written))
    assert written.exists()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    save_student(folder, create_student("mn01", 3), CLASSES, LogMelConfig(), {"clip_seconds": 0.5})
    return folder


def swapped(run_folder: Path, target: Path, name: str, content: bytes) -> Path:
    """A copy of a run folder with one of its files replaced."""
    shutil.copytree(run_folder, target)
    (target / name).write_bytes(content)
    return target


def array_of_logits(path: Path) -> Path:
    np.save(path, np.zeros((12, 3), dtype=np.float32))
    return path


COMMANDS: dict[str, Callable[[Path, Path, Path, Path], list]] = {
    "evaluate .pt": lambda evil, store, run, logits: ["evaluate", "--tagger", f"mn01@{evil}", "--clips", store],
    "evaluate .safetensors": lambda evil, store, run, logits: ["evaluate", "--tagger", f"mn01@{evil}", "--clips", store],
    "teach .pt": lambda evil, store, run, logits: [
        "teach", "--teacher", f"mn01@{evil}", "--clips", store, "--out", evil.parent / "out"
    ],
    "teach clips": lambda evil, store, run, logits: [
        "teach", "--teacher", run, "--clips", evil, "--out", evil.parent / "out"
    ],
    "pretrain weights": lambda evil, store, run, logits: [
        "pretrain", "--clips", store, "--label-weight", 1, "--student", "mn01", "--weights", evil, "--out",
        evil.parent / "out", "--batch-size", 4
    ],
    "pretrain logits": lambda evil, store, run, logits: [
        "pretrain", "--clips", store, "--logits", evil, "--out", evil.parent / "out", "--batch-size", 4
    ],
    "verify logits": lambda evil, store, run, logits: ["verify", "--logits", evil, "--clips", store],
    "verify teacher": lambda evil, store, run, logits: [
        "verify", "--logits", logits, "--clips", store, "--teacher", f"mn01@{evil}"
    ],
    "verify clips": lambda evil, store, run, logits: ["verify", "--logits", logits, "--clips", evil],
    "pack manifest": lambda evil, store, run, logits: ["pack", evil, "--layout", "manifest", "--out", evil.parent / "c.h5"],
    "import-logits array": lambda evil, store, run, logits: [
        "import-logits", "--logits", evil, "--index", store.with_suffix(".parquet"), "--clips", store, "--out", evil.parent / "l.h5"
    ],
    "import-logits index": lambda evil, store, run, logits: [
        "import-logits", "--logits", array_of_logits(evil.with_name("a.npy")), "--index", evil, "--clips", store, "--out",
        evil.parent / "l.h5"
    ],
    "class names": lambda evil, store, run, logits: [
        "evaluate", "--tagger", run, "--clips", store, "--class-names", evil
    ],
}  # fmt: skip


NATURAL_SUFFIX = {
    "import-logits array": ".npy",
    "import-logits index": ".pkl",
    "pack manifest": ".parquet",
    "class names": ".csv",
    "evaluate .safetensors": ".safetensors",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_given_to_a_command(
    command: str, evil: bytes, written: Path, tiny_store: Path, tiny_logits: Path, run_folder: Path,
    tmp_path: Path, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    path = tmp_path / f"evil{NATURAL_SUFFIX.get(command, '.h5' if command.endswith(('clips', 'logits')) else '.pt')}"
    path.write_bytes(evil)
    assert main([str(part) for part in COMMANDS[command](path, tiny_store, run_folder, tiny_logits)]) == 2
    assert not written.exists()
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["student.safetensors", "student.json"])
@pytest.mark.parametrize("command", ["evaluate", "teach", "profile", "inspect"])
def test_a_run_folder(
    command: str, name: str, evil: bytes, written: Path, tiny_store: Path, run_folder: Path, tmp_path: Path
) -> None:
    folder = swapped(run_folder, tmp_path / "run", name, evil)
    arguments = {
        "evaluate": ["--tagger", folder, "--clips", tiny_store],
        "teach": ["--teacher", folder, "--clips", tiny_store, "--out", tmp_path / "out"],
        "profile": ["--student", folder],
        "inspect": ["--tagger", folder, "--clips", tiny_store, "--out", tmp_path / "out"],
    }[command]
    assert main([command, *map(str, arguments)]) == 2
    assert not written.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "student.safetensors", "state.json"])
def test_the_checkpoint_of_a_run_that_goes_on(
    name: str, evil: bytes, written: Path, tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = "--label-weight 1 --student mn01 --batch-size 6 --clip-seconds 0.3 --workers 0 --epochs 1"
    command = ["pretrain", "--clips", str(tiny_store), "--out", str(tmp_path / "run"), *settings.split()]
    assert main(command) == 0
    (checkpoints(tmp_path / "run" / "checkpoints")[-1] / name).write_bytes(evil)
    (tmp_path / "run" / "student.safetensors").unlink()
    assert main(command) == 2
    assert "damaged" in capsys.readouterr().err
    assert not written.exists()


def test_the_shard_of_an_unfinished_teacher(
    evil: bytes, written: Path, tiny_store: Path, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["teach", "--teacher", str(run_folder), "--clips", str(tiny_store), "--out", str(tmp_path)]
    command += ["--workers", "0", "--shard-clips", "6"]
    with monkeypatch.context() as patched:
        patched.setattr(ShardFolder, "publish", lambda *_: (_ for _ in ()).throw(ValueError("stopped")))
        assert main(command) == 2
    shard = next(tmp_path.glob("small.h5.partial/shard-*.npy"))
    shard.write_bytes(evil)
    assert main(command) == 2
    assert not written.exists()
    shard.unlink()
    assert main(command) == 0
    assert len(LogitStore.open(tmp_path / "small.h5")) == 12


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
def test_weights_by_themselves(suffix: str, evil: bytes, written: Path, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(evil)
    for read in (read_state_dict, lambda path: load_weights(create_student("mn01", 3), path)):
        with pytest.raises(ValueError, match="weights"):
            read(path)
    assert not written.exists()
