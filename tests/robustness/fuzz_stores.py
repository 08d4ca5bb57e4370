"""Targets of tests/robustness/fuzz.py: audio, clip stores, logit stores, lists and weights."""

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import soundfile
import torch
from fuzz_damage import change_content
from fuzz_targets import Target, need, noise

from audio_datasets.audio.codec import LOUDEST, decode, to_pcm16
from audio_datasets.pack import PackConfig, pack
from audio_datasets.stores.class_lists import read_class_names, read_label_map
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.clip_writer import ClipRecord, write_clip_store
from audio_datasets.stores.manifest import ManifestRow, manifest_path, select_rows, write_manifest
from audio_datasets.system.randomness import generator
from audio_datasets.tasks.catalog import read_listing
from audio_datasets.tasks.label_space import LabelGroup, LabelSpace
from students import create_student
from students.card import load_student, save_student
from students.frontend import LogMelConfig
from students.weights import read_state_dict
from teacher_logits.precompute import TeachConfig, teach
from teacher_logits.store import LogitStore, write_logit_store
from teacher_logits.teachers.base import Teacher
from teacher_logits.teachers.loaders import load_teacher
from teacher_logits.verify import VerifyConfig, verify

CLASSES = ("hiss", 'hum, "low"', "ключ")
RATE = 8000


def audio_files(suffix: str, **options: str) -> Callable[[Path], list[Path]]:
    def prepare(folder: Path) -> list[Path]:
        paths = []
        for channels in (1, 2):
            path = folder / f"{channels}{suffix}"
            rate = 48000 if options.get("subtype") == "OPUS" else RATE
            soundfile.write(path, np.stack([noise(channel) for channel in range(channels)], axis=1), rate, **options)
            paths.append(path)
        return paths

    return prepare


def read_audio(path: Path, good: Path) -> None:
    """Decodes all and a part; a part must have no more samples than asked for, and all be fit for training."""
    for waveform in (decode(path, 32000), decode(path, 16000, start_seconds=0.1, seconds=0.2)):
        need(waveform.dtype == np.float32 and waveform.ndim == 1, "not a float32 waveform")
        # A little above: resampling may overshoot.
        need(np.isfinite(waveform).all() and np.abs(waveform).max(initial=0) < 2 * LOUDEST, "samples unfit for use")
    need(len(waveform) <= 3200, "more than was asked for")


def read_packed(path: Path, good: Path) -> None:
    """Packs the damaged file beside a good one, which must come out whole whatever became of the other."""
    folder = path.parent / "sounds" / "dog"
    folder.mkdir(parents=True)
    shutil.copy(path, folder / f"damaged{path.suffix}")
    shutil.copy(good, folder / f"good{good.suffix}")
    kind = ("keep", "pcm16", "flac", "mp3")[len(path.read_bytes()) % 4]
    result = pack(PackConfig(folder.parent, path.parent / "clips.h5", audio=kind, workers=1), show_progress=False)
    store = ClipStore.open(result.store)
    row = int(store.rows([f"dog/good{good.suffix}"])[0])
    if kind == "keep":
        need(store.encoded(row) == good.read_bytes(), "the good clip has changed")
    need(result.clips + len(result.skipped) == 2, "a clip is lost")
    for row in range(len(store)):
        store.verify_audio(row)
        need(np.isfinite(store.waveform(row, 32000)).all(), "samples unfit for use")
    store.manifest()


def clip_stores(folder: Path) -> list[Path]:
    labels = [CLASSES[:1], CLASSES[1:], (), CLASSES, CLASSES[2:]]
    pcm = [ClipRecord(f"clip {i}", to_pcm16(noise(i)), names) for i, names in enumerate(labels)]
    write_clip_store(folder / "pcm.h5", pcm, CLASSES, audio_kind="pcm16", sample_rate_hz=RATE)
    encoded = []
    for index, names in enumerate(labels):
        buffer = io.BytesIO()
        soundfile.write(buffer, noise(index), RATE, format="FLAC")
        encoded.append(ClipRecord(f"clip {index}", buffer.getvalue(), names))
    write_clip_store(folder / "encoded.h5", encoded, CLASSES)
    known = [CLASSES, CLASSES[1:], None, CLASSES, CLASSES[2:]]
    masked = [ClipRecord(clip.clip_id, clip.audio, clip.labels, names) for clip, names in zip(pcm, known, strict=True)]
    space = LabelSpace((LabelGroup("low", CLASSES[:1], False), LabelGroup("high", CLASSES[1:], True)))
    settings = {"audio_kind": "pcm16", "sample_rate_hz": RATE, "label_space": space}
    write_clip_store(folder / "masked.h5", masked, CLASSES, **settings)
    return [folder / "pcm.h5", folder / "encoded.h5", folder / "masked.h5"]


def read_clip_store(path: Path, good: Path) -> None:
    """Everything that is accepted equals what was written; a clip's audio may instead be told to have changed."""
    store, original = ClipStore.open(path), ClipStore.open(good)
    rows = np.arange(len(original))
    need(store.class_names == original.class_names, "other class names")
    need(store.clip_ids == original.clip_ids, "other clip ids")
    need(np.array_equal(store.targets(rows), original.targets(rows)), "other targets")
    need(np.array_equal(store.mask(rows), original.mask(rows)), "other known labels")
    need(store.label_space == original.label_space, "other groups of classes")
    need(np.array_equal(store.rows(original.clip_ids), rows), "ids lead to other rows")
    need(store.audio_kind == original.audio_kind and store.sample_rate_hz == original.sample_rate_hz, "another kind")
    for row in rows:
        try:
            store.verify_audio(row)
        except ValueError:
            continue
        need(np.array_equal(store.waveform(row, 16000), original.waveform(row, 16000)), "other audio")


def foreign_stores(folder: Path) -> list[Path]:
    source, path = clip_stores(folder)[1], folder / "foreign.h5"
    store = ClipStore.open(source)
    with h5py.File(path, "w") as file:
        file["audio_name"] = np.array([clip_id.encode() for clip_id in store.clip_ids], dtype="S20")
        mp3 = file.create_dataset("mp3", shape=(len(store),), dtype=h5py.vlen_dtype(np.uint8))
        for row in range(len(store)):
            mp3[row] = np.frombuffer(store.encoded(row), np.uint8)
        file["target"] = np.packbits(store.targets(np.arange(len(store))).astype(bool), axis=1)
    return [path]


def read_foreign_store(path: Path, good: Path) -> None:
    """This layout has no digests: what is accepted must be fit for use."""
    store = ClipStore.open(path, CLASSES)
    need(len(set(store.clip_ids)) == len(store), "ids that are not unique")
    need(store.targets(np.arange(len(store))).shape == (len(store), len(CLASSES)), "targets of another shape")
    for row in range(len(store)):
        try:
            waveform = store.waveform(row, 16000)
        except ValueError:
            continue
        need(np.isfinite(waveform).all(), "samples unfit for use")


def logit_stores(folder: Path) -> list[Path]:
    clips = ClipStore.open(clip_stores(folder)[0])
    rows = np.arange(len(clips))
    for name, scale in (("logits.h5", 1.0), ("louder.h5", 3.0)):
        logits = scale * generator(5, "fuzz logits").standard_normal((len(clips), len(CLASSES)))
        write_logit_store(
            folder / name,
            clip_ids=clips.clip_ids,
            audio_digests=clips.audio_digests(rows),
            logit_blocks=[logits.astype(np.float16)],
            class_names=CLASSES,
            teacher={"name": "t", "fingerprint": "0" * 32, "link": "sigmoid"},
            clip_store_fingerprint=clips.fingerprint,
        )
    return [folder / "logits.h5", folder / "louder.h5"]


def read_logit_store(path: Path, good: Path) -> None:
    """``kd verify`` accepts nothing but the very logits that were written."""
    LogitStore.open(path)
    verify(VerifyConfig(logits=(str(path),), clips=(good.with_name("pcm.h5"),)))
    ids = ClipStore.open(good.with_name("pcm.h5")).clip_ids
    need(np.array_equal(LogitStore.open(path).read(ids), LogitStore.open(good).read(ids)), "other logits")


class FuzzTeacher(Teacher):
    """Cheap logits that differ from clip to clip."""

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        return torch.stack([waveform.std(1), waveform.abs().amax(1), waveform.diff(dim=1).std(1)], dim=1)


def fuzz_teacher() -> Teacher:
    return FuzzTeacher("fuzz", CLASSES, sample_rate_hz=RATE, clip_seconds=0.5)


def read_taught(path: Path, good: Path) -> None:
    """Teaches a damaged clip store: clips are refused or skipped, or have the logits that they have in the good one."""

    def taught(clips: Path, out: Path, on_bad_clip: str) -> LogitStore:
        spec = f"{Path(__file__).stem}:fuzz_teacher"
        config = TeachConfig(clips=clips, teacher=(spec,), out=out, workers=0, on_bad_clip=on_bad_clip, restart=True)
        return LogitStore.open(teach(config)[0])

    policy = ("refuse", "skip")[len(path.read_bytes()) % 2]
    store = taught(path, path.parent / "logits", policy)
    reference = good.with_name(good.stem)
    if not reference.exists():
        taught(good, reference, "refuse")
    expected = LogitStore.open(reference / "fuzz.h5")
    need(policy == "skip" or len(store) == len(expected), "clips are missing")
    need(np.array_equal(store.read(store.clip_ids), expected.read(store.clip_ids)), "other logits")


def manifests(folder: Path) -> list[Path]:
    rows = {
        "clip_id": ["a", "b", "ü"],
        "path": ["x/a.wav", "b, c.wav", 'd "e".wav'],
        "labels": ["dog;cat", "", "ключ"],
        "split": ["train", "valid", "train"],
        "fold": [1, 2, 3],
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), folder / "m.parquet")
    lists = {**rows, "labels": [["dog"], [], ["ключ"]], "fold": [1.0, None, 3.0]}
    pyarrow.parquet.write_table(pyarrow.table(lists), folder / "lists.parquet")
    pyarrow.csv.write_csv(pyarrow.table(rows), folder / "m.csv")
    return [folder / "m.parquet", folder / "lists.parquet", folder / "m.csv"]


def read_source_manifest(path: Path, good: Path) -> None:
    """Text has no checksum: what is accepted has unique, printable ids and stays in its folder."""
    source = read_listing(path)
    ids = [clip.clip_id for clip in source.clips]
    need(len(set(ids)) == len(ids) and all(ids), "ids that are not unique or empty")
    need(all(clip_id.isprintable() for clip_id in ids), "ids that cannot be printed")
    for clip in source.clips:
        inside = os.path.normpath(path.parent / clip.source)
        need(inside.startswith(f"{path.parent}{os.sep}") or inside == str(path.parent), "a path that leads out")
        need(all(isinstance(label, str) and label for label in clip.labels), "labels that are no text")
        need(clip.fold is None or isinstance(clip.fold, int), "a fold that is no number")
    json.dumps([clip.split for clip in source.clips]).encode()


def store_manifests(folder: Path) -> list[Path]:
    clips = ClipStore.open(clip_stores(folder)[0])
    write_manifest(
        folder / "manifest.parquet",
        [
            ManifestRow(clip_id, labels=("a",), split="train", fold=row % 2)
            for row, clip_id in enumerate(clips.clip_ids)
        ],
    )
    return [folder / "manifest.parquet"]


def read_store_manifest(path: Path, good: Path) -> None:
    store_path = path.parent / "pcm.h5"
    shutil.copy(good.with_name("pcm.h5"), store_path)
    path.rename(manifest_path(store_path))
    store = ClipStore.open(store_path)
    need(store.manifest().column("clip_id").to_pylist() == store.clip_ids, "other clips")
    for chosen in (select_rows(store, split="train"), select_rows(store, folds=[0])):
        need(0 < len(chosen) <= len(store), "rows that are not there")


def class_lists(folder: Path) -> list[Path]:
    (folder / "names.txt").write_text("\n".join(CLASSES), encoding="utf-8")
    (folder / "names.json").write_text(json.dumps(CLASSES), encoding="utf-8")
    (folder / "index.json").write_text(json.dumps({name: i for i, name in enumerate(CLASSES)}), encoding="utf-8")
    (folder / "names.csv").write_text(
        'index,mid,display_name\n0,/m/0,hiss\n1,/m/1,"hum, ""low"""\n2,/m/2,ключ\n', encoding="utf-8"
    )
    return [folder / name for name in ("names.txt", "names.json", "index.json", "names.csv")]


def read_class_list(path: Path, good: Path) -> None:
    names = read_class_names(path)
    need(names and len(set(names)) == len(names), "names that are not unique")
    need(all(isinstance(name, str) and name.strip() for name in names), "names that are no text")
    "\n".join(names).encode()


def label_maps(folder: Path) -> list[Path]:
    (folder / "map.csv").write_text('label,class\ndog,Dog\nhen,"Chicken, rooster"\ndog,Bark\n', encoding="utf-8")
    return [folder / "map.csv"]


def read_map(path: Path, good: Path) -> None:
    for label, names in read_label_map(path).items():
        need(label and names and all(names), "an empty entry")


def weights_files(folder: Path) -> list[Path]:
    torch.manual_seed(0)
    student = create_student("mn01", num_classes=3, width=0.1)
    save_student(folder, student, CLASSES, LogMelConfig())
    few = dict(list(student.state_dict().items())[:20])
    torch.save(few, folder / "few.pt")
    torch.save(few, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    return [folder / "student.safetensors", folder / "few.pt", folder / "legacy.pt"]


def read_weights(path: Path, good: Path) -> None:
    """A bare state dict has no checksum: tensors by name. In a run folder the weights are those of the card."""
    state = read_state_dict(path)
    need(all(isinstance(value, torch.Tensor) for value in state.values()), "what is no tensor")
    if path.suffix == ".safetensors":
        shutil.copy(good.with_name("student.json"), path.parent)
        loaded = load_student(path.rename(path.with_name("student.safetensors")).parent).state_dict()
        expected = load_student(good.parent).state_dict()
        need(all(torch.equal(loaded[name], expected[name]) for name in expected), "other weights")


def cards(folder: Path) -> list[Path]:
    weights_files(folder)
    return [folder / "student.json"]


def read_card(path: Path, good: Path) -> None:
    shutil.copy(good.with_name("student.safetensors"), path.parent)
    teacher = load_teacher(path.rename(path.with_name("student.json")).parent)
    need(len(teacher.class_names) == 3 and all(isinstance(name, str) for name in teacher.class_names), "no class names")
    need(next(teacher.parameters()).isfinite().all(), "weights unfit for use")
    waveform = torch.from_numpy(noise(1, 8000))[None]
    need(teacher(waveform).shape == (1, 3), "logits of another shape")


TARGETS = {
    "wav": Target(audio_files(".wav"), read_audio, 8, names_file=False),
    "float wav": Target(audio_files(".wav", subtype="FLOAT"), read_audio, 6, names_file=False),
    "flac": Target(audio_files(".flac"), read_audio, 8, names_file=False),
    "mp3": Target(audio_files(".mp3"), read_audio, 10, names_file=False),
    "vorbis": Target(audio_files(".ogg"), read_audio, 8, names_file=False),
    "opus": Target(audio_files(".opus", format="OGG", subtype="OPUS"), read_audio, 6, names_file=False),
    "aiff, caf, au, w64": Target(
        lambda folder: [
            audio_files(suffix)(folder)[index] for index, suffix in enumerate((".aiff", ".caf"))
        ] + [audio_files(suffix)(folder)[index] for index, suffix in enumerate((".au", ".w64"))],
        read_audio,
        8,
        names_file=False,
    ),
    "pack": Target(lambda folder: audio_files(".mp3")(folder) + audio_files(".flac")(folder), read_packed, 8),
    "clip store": Target(clip_stores, read_clip_store, 14, change=change_content),
    "foreign clip store": Target(foreign_stores, read_foreign_store, 6, change=change_content),
    "teach": Target(clip_stores, read_taught, 5, change=change_content),
    "logit store": Target(logit_stores, read_logit_store, 12, change=change_content),
    "manifest": Target(manifests, read_source_manifest, 10, change=change_content),
    "store manifest": Target(store_manifests, read_store_manifest, 6, change=change_content),
    "class list": Target(class_lists, read_class_list, 6, change=change_content),
    "label map": Target(label_maps, read_map, 3, change=change_content),
    "weights": Target(weights_files, read_weights, 10, change=change_content),
    "student card": Target(cards, read_card, 4, change=change_content),
}  # fmt: skip
