"""The stages that ``soak.py`` kills: what each works on, how it is started, and what it ends with."""

import csv
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.clip_writer import ClipRecord, write_clip_store
from audio_datasets.stores.manifest import ManifestRow, manifest_path, write_manifest
from audio_datasets.system.files import read_json
from kd.training.checkpoint import checkpoints
from teacher_logits.store import write_logit_store

CLASSES = ("a", "b", "c")
SAMPLE_RATE_HZ = 32000
CLIPS = 40
SOUNDS = 160


@dataclass(frozen=True)
class Stage:
    """One command under test. ``out`` is the folder that a run of it writes."""

    module: str
    """What holds its ``main``."""
    launched: bool
    """Whether several processes are launched, each a run of the command; or one, which starts workers of its own."""
    write_scene: Callable[[Path], None]
    """Writes its input into a folder."""
    arguments: Callable[[Path, Path, int, int], list[str]]
    """Of the scene's folder, ``out``, the number of processes that share the work, and epochs."""
    result: Callable[[Path], dict[str, str]]
    """Digest of each file that a run ends with. Of a file that names the run's own folder, only that it is there."""
    being_written: Callable[[Path], bool]
    """Whether something large is being written, or was when its process ended."""


def digests(out: Path, files: Iterable[Path], *only_there: str) -> dict[str, str]:
    found = {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    leftovers = sorted(str(path.relative_to(out)) for path in out.rglob("*.tmp"))
    return found | {name: str((out / name).exists()) for name in only_there} | {"leftovers": str(leftovers)}


# -- kd pretrain -------------------------------------------------------------------------------------------------------


def write_pretrain_scene(folder: Path) -> None:
    """Clips with labels and folds, and a teacher's logits for them."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 2000, (CLIPS, round(0.4 * SAMPLE_RATE_HZ))).astype(np.int16)
    records = [ClipRecord(f"clip{index}", samples, tuple(CLASSES[index % 3 :])) for index, samples in enumerate(noise)]
    store = folder / "clips.h5"
    write_clip_store(store, records, CLASSES, audio_kind="pcm16", sample_rate_hz=SAMPLE_RATE_HZ)
    write_manifest(
        manifest_path(store),
        [ManifestRow(record.clip_id, fold=1 + (index >= 32)) for index, record in enumerate(records)],
    )
    clips = ClipStore.open(store)
    write_logit_store(
        folder / "logits.h5",
        clip_ids=clips.clip_ids,
        audio_digests=clips.audio_digests(np.arange(CLIPS)),
        logit_blocks=[rng.normal(0, 2, (CLIPS, len(CLASSES))).astype(np.float16)],
        class_names=CLASSES,
        teacher={"name": "noise", "fingerprint": "0" * 32, "link": "sigmoid"},
        clip_store_fingerprint=clips.fingerprint,
    )


def pretrain_arguments(folder: Path, out: Path, processes: int, epochs: int) -> list[str]:
    """Of a run whose step has eight clips, however many processes share it."""
    return [
        *("--clips", str(folder / "clips.h5"), "--logits", str(folder / "logits.h5"), "--out", str(out)),
        *("--student", "mn01", "--n-mels", "64", "--hop-samples", "640", "--clip-seconds", "0.4"),
        *("--folds", "1", "--valid-folds", "2", "--epochs", str(epochs), "--ema-decay", "0.9", "--workers", "1"),
        *("--batch-size", str(4 // processes), "--gradient-accumulation-steps", "2"),
        *("--checkpoint-every-steps", "1", "--log-every-steps", "3"),
    ]


def pretrain_result(out: Path) -> dict[str, str]:
    newest = checkpoints(out / "checkpoints")[-1]
    return digests(out, [out / "student.safetensors", out / "metrics.jsonl", *newest.iterdir()], "student.json")


# -- kd finetune -------------------------------------------------------------------------------------------------------


def write_finetune_scene(folder: Path) -> None:
    """ESC-50's layout: three classes, two folds, 12 recordings of each class in each."""
    (folder / "data" / "audio").mkdir(parents=True)
    (folder / "data" / "meta").mkdir()
    rng = np.random.default_rng(0)
    with open(folder / "data" / "meta" / "esc50.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("filename", "fold", "target", "category", "esc10", "src_file", "take"))
        for number in range(72):
            fold, target = 1 + number % 2, number // 2 % 3
            name = f"{fold}-{number}-A-{target}.wav"
            table.writerow((name, fold, target, CLASSES[target], True, number, "A"))
            soundfile.write(folder / "data" / "audio" / name, 0.1 * rng.standard_normal(3200), 8000)


def finetune_arguments(folder: Path, out: Path, processes: int, epochs: int) -> list[str]:
    """Of four runs, two folds by two seeds, and a linear probe, from a cache that is filled first."""
    return [
        *("--task", "esc50", "--data", str(folder / "data"), "--out", str(out), "--cache", str(out / "cache")),
        *("--student", "mn01", "--n-mels", "64", "--hop-samples", "640", "--clip-seconds", "0.4", "--probe"),
        *("--seeds", "0", "1", "--valid-share", "0.25", "--early-stopping", "log_loss", "--patience", "2"),
        *("--epochs", str(epochs), "--ema-decay", "0.9", "--workers", "1", "--learning-rate", "1e-3"),
        *("--batch-size", str(4 // processes), "--gradient-accumulation-steps", "2"),
        *("--checkpoint-every-steps", "1", "--log-every-steps", "2", "--no-report"),
    ]


def finetune_result(out: Path) -> dict[str, str]:
    runs = [out / f"seed{seed}" / f"fold{fold}" for seed in (0, 1) for fold in (1, 2)]
    files = [*out.glob("cache/*.h5"), *out.glob("probe/fold?/*")]
    names = ("student", "best", "metrics", "predictions", "validation_predictions", "result")
    for run in runs:
        files += [path for path in run.iterdir() if path.stem in names and path.name != "student.json"]
        files += checkpoints(run / "checkpoints")[-1].iterdir()
    found = digests(out, files, *(f"{run.relative_to(out)}/student.json" for run in runs))
    for name in ("results.json", "probe/results.json"):  # both hold the command
        found[name] = json.dumps({key: value for key, value in read_json(out / name).items() if key != "command"})
    return found


# -- kd pack -----------------------------------------------------------------------------------------------------------


def write_pack_scene(folder: Path) -> None:
    """A folder of short noises, one sub-folder for each class, and a file that is none."""
    rng = np.random.default_rng(0)
    for index in range(SOUNDS):
        path = folder / "sounds" / CLASSES[index % 3] / f"{index}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * rng.standard_normal(48000), 16000)
    (folder / "sounds" / "a" / "broken.wav").write_bytes(b"no sound")


def pack_arguments(folder: Path, out: Path, processes: int, epochs: int) -> list[str]:
    output = ("--out", str(out / "clips.h5"), "--audio", "mp3", "--shard-clips", "4", "--workers", str(processes))
    return [str(folder / "sounds"), *output]


def pack_result(out: Path) -> dict[str, str]:
    return digests(out, out.iterdir())  # nothing else may be there


STAGES = {
    "pretrain": Stage(
        "kd.pretrain",
        True,
        write_pretrain_scene,
        pretrain_arguments,
        pretrain_result,
        lambda out: any(out.glob("checkpoints/.step-*.tmp")),
    ),
    "finetune": Stage(
        "kd.finetune",
        True,
        write_finetune_scene,
        finetune_arguments,
        finetune_result,
        lambda out: any(out.glob("seed?/fold?/checkpoints/.step-*.tmp")),
    ),
    "pack": Stage(
        "audio_datasets.pack",
        False,
        write_pack_scene,
        pack_arguments,
        pack_result,
        lambda out: any(out.glob("*.partial/.*.tmp")),
    ),
}
