"""Power cuts at any moment: what was flushed before is enough for the same command to go on and end as it would have.

Each test runs a stage once, noting what it asks the disk to flush, and then puts together what the disk may hold after a
cut between any two flushes.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from audio_datasets import pack as packing
from audio_datasets.system.files import read_json
from kd import finetune as finetuning
from kd import pretrain as pretraining
from kd.training.checkpoint import checkpoints, load_checkpoint
from students import create_student
from students.card import save_student
from students.frontend import LogMelConfig
from teacher_logits import precompute


class PowerCut:
    """What a disk may hold after a power cut at any moment, from the flushes that a run asks for.

    A file holds what it held when it was last flushed, or nothing. Of a folder's entries either those of its last flush
    are there (``lazy``), or the current ones: the file system may have written them by itself.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.content: dict[int, bytes] = {}
        self.entries: dict[int, dict[str, int]] = {}
        self.folders = {root.stat().st_ino}
        self.kept_open: dict[int, int] = {}  # descriptors by inode, so that no inode's number is used again
        self.moments: list[tuple[dict, dict, dict]] = []
        fsync = os.fsync

        def recorded(descriptor: int) -> None:
            fsync(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if self.root in (path, *path.parents):
                self._flushed(path)
                self.moments.append((dict(self.content), dict(self.entries), self._tree()))

        monkeypatch.setattr(os, "fsync", recorded)

    def _flushed(self, path: Path) -> None:
        number = path.stat().st_ino
        self._keep(path)
        if path.is_dir():
            self.entries[number] = self._list(path)
        else:
            self.content[number] = path.read_bytes()

    def _keep(self, path: Path) -> None:
        if path.stat().st_ino not in self.kept_open:
            self.kept_open[path.stat().st_ino] = os.open(path, os.O_RDONLY)

    def _list(self, folder: Path) -> dict[str, int]:
        for item in folder.iterdir():
            self._keep(item)
        found = {item.name: item.stat() for item in folder.iterdir()}
        self.folders |= {item.stat().st_ino for item in folder.iterdir() if item.is_dir()}
        return {name: status.st_ino for name, status in found.items()}

    def _tree(self) -> dict[int, dict[str, int]]:
        folders = [self.root, *(path for path in self.root.rglob("*") if path.is_dir())]
        return {folder.stat().st_ino: self._list(folder) for folder in folders}

    def disk_after(self, moment: int, lazy: bool, target: Path) -> Path:
        """Writes to ``target`` what the disk holds if the power fails right after that flush."""
        content, flushed, current = self.moments[moment]

        def write(number: int, path: Path) -> None:
            if number in self.folders:
                path.mkdir()
                for name, inside in (flushed if lazy else current).get(number, {}).items():
                    write(inside, path / name)
            else:
                path.write_bytes(content.get(number, b""))

        write(self.root.stat().st_ino, target)
        return target

    def close(self) -> None:
        for descriptor in self.kept_open.values():
            os.close(descriptor)


def content(folder: Path, *names: str) -> dict[str, bytes]:
    """The files of these names (patterns) that are there."""
    paths = {path for name in names for path in folder.glob(name)}
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


class Stage:
    """A stage under power cuts: ``run(folder)`` gives an exit code; ``result(folder)`` what it ends with, by file name."""

    def __init__(
        self,
        run: Callable[[Path], int],
        result: Callable[[Path], dict[str, bytes]],
        saved: Callable[[Path], int],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """``saved`` counts what a folder holds of work that need not be done again."""
        self.run, self.result, self.saved = run, result, saved
        self.after = tmp_path / "after"
        disk = tmp_path / "disk"
        disk.mkdir()
        with monkeypatch.context() as patch:
            self.power = PowerCut(disk, patch)
            assert run(disk) == 0
        self.whole = result(disk)
        assert self.whole
        assert all(self.whole.values())

    def cuts(self, every: int) -> Iterator[tuple[int, Path]]:
        """Moment and disk after every so manieth flush and the last: with folders as they were, and as they were flushed.

        What is saved must not depend on what the file system writes by itself, and be saved for good.
        """
        last = len(self.power.moments) - 1
        most = 0
        for moment in sorted({*range(0, last, every), last}):
            for lazy in (False, True):
                found = self.power.disk_after(moment, lazy, self.after)
                saved = self.saved(found)
                assert saved >= most, (moment, lazy)
                most = saved
                yield moment, found
                shutil.rmtree(found)

    def goes_on(self, disk: Path) -> None:
        assert self.run(disk) == 0
        assert self.result(disk) == self.whole
        assert not [*disk.rglob("*.tmp"), *disk.rglob("*.partial")]


def test_packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for index in range(6):
        path = tmp_path / "sounds" / ("dog", "rain")[index % 2] / f"{index}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * rng.standard_normal(800), 16000)
    (tmp_path / "sounds" / "dog" / "broken.wav").write_bytes(b"none")

    def run(disk: Path) -> int:
        return packing.main(
            [str(tmp_path / "sounds"), "--out", str(disk / "clips.h5"), "--workers", "1", "--shard-clips", "2"]
        )

    def saved(disk: Path) -> int:
        return 4 if (disk / "clips.h5").exists() else len(list(disk.glob("clips.h5.partial/shard-*.h5")))

    stage = Stage(
        run, lambda disk: content(disk, "clips.h5", "clips.parquet", "clips.skipped.txt"), saved, tmp_path, monkeypatch
    )
    assert len(stage.whole) == 3
    for _, disk in stage.cuts(every=1):
        if (disk / "clips.h5").exists():  # the store comes last, and whole
            assert stage.result(disk) == stage.whole
        stage.goes_on(disk)
    stage.power.close()


def test_teaching(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    student = create_student("mn01", 3)
    save_student(tmp_path / "small", student, ("hiss", "hum, low", "click"), LogMelConfig(), {"clip_seconds": 0.3})
    settings = ["--teacher", str(tmp_path / "small"), "--workers", "0", "--shard-clips", "4", "--batch-size", "4"]

    def run(disk: Path) -> int:
        return precompute.main(["--clips", str(tiny_store), *settings, "--out", str(disk / "logits")])

    def saved(disk: Path) -> int:
        return 4 if (disk / "logits" / "small.h5").exists() else len(list(disk.glob("*/*.partial/shard-*.npy")))

    stage = Stage(run, lambda disk: content(disk, "logits/*.h5"), saved, tmp_path, monkeypatch)
    for moment, disk in stage.cuts(every=1):
        if (disk / "logits" / "small.h5").exists():
            assert stage.result(disk) == stage.whole
        if moment % 3 == 0:
            stage.goes_on(disk)
    stage.power.close()


def newest_steps(disk: Path) -> int:
    """Steps of the newest checkpoints of all runs; each must be whole, and the log must reach as far."""
    total = 0
    for folder in disk.rglob("checkpoints"):
        for newest in checkpoints(folder)[-1:]:
            state = load_checkpoint(newest)["state"]
            log = folder.with_name("metrics.jsonl")
            assert (log.stat().st_size if log.exists() else 0) >= state["metrics_bytes"]
            total += state["step"]
    return total


def test_pretraining(tiny_store: Path, tiny_logits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = "--student mn01 --n-mels 64 --hop-samples 640 --epochs 2 --batch-size 2 --clip-seconds 0.4 --workers 0"
    settings += " --log-every-steps 4 --checkpoint-every-steps 1 --ema-decay 0.9 --valid-folds 1"

    def run(disk: Path) -> int:
        data = ["--clips", str(tiny_store), "--logits", str(tiny_logits)]
        return pretraining.main([*data, "--out", str(disk / "run"), *settings.split()])

    def result(disk: Path) -> dict[str, bytes]:
        return content(disk / "run", "student.safetensors", "metrics.jsonl", "checkpoints/step-00000012/*")

    stage = Stage(run, result, newest_steps, tmp_path, monkeypatch)
    assert len(stage.whole) == 7
    moments = len(stage.power.moments)
    # A checkpoint takes about ten flushes, so that over the run each kind of moment occurs.
    for moment, disk in stage.cuts(every=7):
        config = disk / "run" / "config.json"
        if config.exists() and read_json(config).get("finished"):
            assert stage.result(disk) == stage.whole
        if moment // 7 in (moments // 7 // 3, moments // 7 * 3 // 4):
            stage.goes_on(disk)
    stage.power.close()


def test_fine_tuning(make_task_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_task_folder("esc50")
    settings = "--fold 1 2 --student mn01 --n-mels 64 --hop-samples 640 --epochs 2 --batch-size 4 --clip-seconds 0.4"
    settings += " --workers 0 --no-report --checkpoint-every-steps 2 --ema-decay 0.9 --valid-share 0.3"
    settings += " --early-stopping accuracy --log-every-steps 1 --cache {disk}/cache"

    def run(disk: Path) -> int:
        command = ["--task", "esc50", "--data", str(data), "--out", str(disk / "run")]
        return finetuning.main([*command, *settings.format(disk=disk).split()])

    names = ("student.safetensors", "best.safetensors", "metrics.jsonl", "predictions.npz", "result.json")

    def result(disk: Path) -> dict[str, bytes]:
        return content(disk, "cache/*.h5", *(f"run/fold?/{name}" for name in names))

    stage = Stage(run, result, newest_steps, tmp_path, monkeypatch)
    assert len(stage.whole) == 1 + 2 * len(names)
    moments = len(stage.power.moments)
    for moment, disk in stage.cuts(every=5):
        found = stage.result(disk)
        for fold in ("fold1", "fold2"):
            if f"run/{fold}/result.json" in found:
                there = {name for name in stage.whole if fold in name}
                assert {name: found.get(name) for name in there} == {name: stage.whole[name] for name in there}
        if (disk / "run" / "results.json").exists():
            assert found == stage.whole
        if moment // 5 in (2, moments // 5 // 2, moments // 5 * 3 // 4):
            stage.goes_on(disk)
    stage.power.close()
