"""The commands that ``disk_faults.py`` disturbs, on inputs as small as they get."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch

from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.clip_writer import ClipRecord, write_clip_store
from audio_datasets.stores.manifest import ManifestRow, manifest_path, write_manifest
from students import create_student
from students.card import save_student
from students.frontend import LogMelConfig
from teacher_logits.store import write_logit_store

CLASSES = ("hiss", "hum", "click")
CLIPS = 6
RATE_HZ = 32000
SMALL = "--student mn01 --n-mels 32 --hop-samples 640 --clip-seconds 0.2 --batch-size 2 --workers 0 --epochs 1"


@dataclass(frozen=True)
class Stage:
    """One command under test. It writes below the folder ``out`` of a disk that holds what ``prepare`` wrote."""

    module: str
    prepare: Callable[[Path], None]
    options: str
    """The arguments; ``{disk}`` stands for the disk."""

    def arguments(self, disk: Path) -> list[str]:
        return [argument.format(disk=disk) for argument in self.options.split()]


def write_sounds(disk: Path) -> None:
    """Two folders of noise, and a file that is none."""
    rng = np.random.default_rng(0)
    for index in range(4):
        path = disk / "sounds" / CLASSES[index % 2] / f"{index}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * rng.standard_normal(4000), 8000)
    (disk / "sounds" / "hum" / "broken.wav").write_bytes(b"no sound")
    (disk / "out").mkdir()


def write_clips(disk: Path) -> None:
    """A clip store, and a student that knows its classes."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 2000, (CLIPS, RATE_HZ // 5)).astype(np.int16)
    records = [ClipRecord(f"clip{row}", samples, (CLASSES[row % 3],)) for row, samples in enumerate(noise)]
    write_clip_store(disk / "clips.h5", records, CLASSES, audio_kind="pcm16", sample_rate_hz=RATE_HZ)
    rows = [ManifestRow(f"clip{row}", fold=1 + (row >= 4)) for row in range(CLIPS)]
    write_manifest(manifest_path(disk / "clips.h5"), rows)
    torch.manual_seed(0)
    frontend = LogMelConfig(n_mels=32, hop_samples=640)
    student = create_student("mn01", len(CLASSES), n_mels=32)
    save_student(disk / "tagger", student, CLASSES, frontend, {"clip_seconds": 0.2})
    (disk / "out").mkdir()


def write_predictions(disk: Path) -> None:
    """The clip store with an array of logits for it and their index."""
    write_clips(disk)
    np.save(disk / "logits.npy", np.random.default_rng(1).normal(0, 2, (CLIPS, len(CLASSES))).astype(np.float32))
    (disk / "index.json").write_text(json.dumps({f"clip{row}": row for row in range(CLIPS)}))


def write_logits(disk: Path) -> None:
    """The clip store with a logit store for it."""
    write_clips(disk)
    clips = ClipStore.open(disk / "clips.h5")
    write_logit_store(
        disk / "logits.h5",
        clip_ids=clips.clip_ids,
        audio_digests=clips.audio_digests(np.arange(CLIPS)),
        logit_blocks=[np.random.default_rng(1).normal(0, 2, (CLIPS, len(CLASSES))).astype(np.float16)],
        class_names=CLASSES,
        teacher={"name": "noise", "fingerprint": "0" * 32, "link": "sigmoid"},
        clip_store_fingerprint=clips.fingerprint,
    )


def write_esc50(disk: Path) -> None:
    """ESC-50's layout: three classes, two folds, two recordings of each class in each."""
    (disk / "data" / "audio").mkdir(parents=True)
    (disk / "data" / "meta").mkdir()
    rng = np.random.default_rng(0)
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    for number in range(12):
        fold, target = 1 + number % 2, number // 2 % 3
        name = f"{fold}-{number}-A-{target}.wav"
        lines.append(f"{name},{fold},{target},{CLASSES[target]},True,{number},A")
        soundfile.write(disk / "data" / "audio" / name, 0.1 * rng.standard_normal(1600), 8000)
    (disk / "data" / "meta" / "esc50.csv").write_text("\n".join(lines) + "\n")
    (disk / "out").mkdir()


def write_finished_run(disk: Path) -> None:
    """ESC-50's layout, and a run on it."""
    from kd.finetune import main  # here, because it takes seconds

    write_esc50(disk)
    assert main(STAGES["finetune"].arguments(disk)) == 0


CLIPS_IN = "--clips {disk}/clips.h5"
STAGES = {
    "pack": Stage(
        "audio_datasets.pack",
        write_sounds,
        "{disk}/sounds --out {disk}/out/clips.h5 --shard-clips 3 --workers 1 --audio flac",
    ),
    "teach": Stage(
        "teacher_logits.precompute",
        write_clips,
        f"{CLIPS_IN} --teacher {{disk}}/tagger --out {{disk}}/out --name t --shard-clips 3 --workers 0",
    ),
    "import": Stage(
        "teacher_logits.import_logits",
        write_predictions,
        f"{CLIPS_IN} --logits {{disk}}/logits.npy --index {{disk}}/index.json --out {{disk}}/out/imported.h5",
    ),
    "compact": Stage(
        "teacher_logits.compact", write_logits, "--logits {disk}/logits.h5 --keep 2 --out {disk}/out/compact.h5"
    ),
    "pretrain": Stage(
        "kd.pretrain",
        write_logits,
        f"{CLIPS_IN} --logits {{disk}}/logits.h5 --out {{disk}}/out/run {SMALL} --folds 1 --valid-folds 2 --ema-decay 0.9 "
        "--checkpoint-every-steps 1 --log-every-steps 1",
    ),
    "finetune": Stage(
        "kd.finetune",
        write_esc50,
        f"--task esc50 --data {{disk}}/data --out {{disk}}/out/run --cache {{disk}}/out/cache {SMALL} --fold 1 "
        "--valid-share 0.4 --early-stopping accuracy --patience 2 --checkpoint-every-steps 2 --no-report",
    ),
    "evaluate": Stage(
        "kd.evaluate", write_clips, f"{CLIPS_IN} --tagger {{disk}}/tagger --out {{disk}}/out/results.json --workers 0"
    ),
    "report": Stage("kd.report", write_finished_run, "{disk}/out/run"),
}
