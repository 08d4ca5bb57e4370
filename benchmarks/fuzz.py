"""Damaged and generated files through pack, open, teach, verify and the loading of weights.

    python benchmarks/fuzz.py                                  # 10,000 inputs
    python benchmarks/fuzz.py --inputs 500 --only mp3 --keep failures/

Each input is made from a good file by a number and a seed alone: bits are flipped, bytes overwritten, runs of them removed,
doubled, moved or taken from another file, the end cut off, numbers in headers made absurd, or single attributes and arrays
of a store replaced by others. Each is then refused with a ValueError or OSError that names the file, or accepted, and
then what is read must be right: equal to what was written, or, where a format has no checksum, fit to be used (finite, of the
right shape). Anything else is a failure: another exception, a process that crashes, one that takes longer than the limit or
more than 4 GB.

Prints a table in Markdown and the failures; exit code 1 if there are any.
"""

import io
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import h5py
import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import soundfile
import torch

from audio_datasets.audio import LOUDEST, decode, to_pcm16
from audio_datasets.class_lists import read_class_names, read_label_map
from audio_datasets.clip_store import ClipRecord, ClipStore, write_clip_store
from audio_datasets.command import parse, progress
from audio_datasets.manifest import ManifestRow, manifest_path, select_rows, write_manifest
from audio_datasets.pack import PackConfig, pack
from audio_datasets.randomness import generator
from audio_datasets.sources import read_source
from students import create_student
from students.frontend import LogMelConfig
from students.weights import load_student, read_state_dict, save_student
from teacher_logits.precompute import TeachConfig, teach
from teacher_logits.store import LogitStore, write_logit_store
from teacher_logits.teachers import Teacher
from teacher_logits.verify import VerifyConfig, verify

CLASSES = ("hiss", 'hum, "low"', "ключ")
RATE = 8000
MOST_MEMORY = 4 * 2**30
LONGEST_MESSAGE = 2000


@dataclass(frozen=True)
class FuzzConfig:
    """Send damaged and generated files through our readers."""

    inputs: int = 10_000
    """Inputs in all, shared by the targets according to their weight."""
    seed: int = 0
    """Seed of the damage."""
    only: tuple[str, ...] = ()
    """Names of targets to try; all if left out."""
    seconds: float = 30.0
    """Time that one input may take."""
    keep: Path | None = None
    """Folder for the inputs that failed."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.only if name not in TARGETS]
        if unknown:
            raise ValueError(f"there are no targets {unknown}; known: {sorted(TARGETS)}")
        if self.inputs < 1 or not self.seconds > 0:
            raise ValueError(f"inputs and seconds must be positive; found {self.inputs} and {self.seconds}")


# -- Damage ------------------------------------------------------------------------------------------------------------

ABSURD = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**62, 2**64 - 1)


def damage(content: bytes, others: list[bytes], draws: np.random.Generator) -> bytes:
    """One to three kinds of damage in a file's bytes."""
    data = bytearray(content)
    for _ in range(int(draws.integers(1, 4))):
        if not data:
            break
        # Half of the damage lies near the beginning, where headers are.
        place = int(draws.integers(len(data)))
        if draws.random() < 0.5:
            place = min(place, int(draws.integers(1, 2049)))
            place = min(place, len(data) - 1)
        length = int(min(len(data) - place, 2 ** draws.integers(0, 12)))
        kind = int(draws.integers(9))
        if kind == 0:
            for _ in range(int(draws.integers(1, 9))):
                data[int(draws.integers(len(data)))] ^= 1 << int(draws.integers(8))
        elif kind == 1:
            data[place : place + length] = draws.bytes(length)
        elif kind == 2:
            del data[place:]
        elif kind == 3:
            del data[place : place + length]
        elif kind == 4:
            data[place:place] = data[place : place + length]
        elif kind == 5:
            other = others[int(draws.integers(len(others)))]
            start = int(draws.integers(max(1, len(other))))
            data[place : place + length] = other[start : start + length]
        elif kind == 6:
            data[place : place + length] = bytes([int(draws.choice([0, 255]))]) * length
        elif kind == 7:
            size = int(draws.choice([1, 2, 4, 8]))
            number = int(draws.choice(len(ABSURD)))
            value = (ABSURD[number] % 2 ** (8 * size)).to_bytes(size, draws.choice(["little", "big"]))
            data[place : place + size] = value
        else:
            data[place] = int(draws.integers(256))
    return bytes(data)


def change_store(path: Path, draws: np.random.Generator) -> None:
    """Replaces an attribute or an array of an HDF5 file by another value, type or shape, or removes it."""
    values = (
        "", "kd-clip-store", "[]", '["a", "a"]', "[1, 2]", "{}", "null", "[" * 3000, -1, 0, 1, 2**40, 1.5, float("nan"),
        np.arange(5), b"\xff\xfe", "\ud7ff" * 10, True,
    )  # fmt: skip
    with h5py.File(path, "r+") as file:
        for _ in range(int(draws.integers(1, 3))):
            names = [("attribute", name) for name in file.attrs] + [("array", name) for name in file]
            if not names:
                return
            kind, name = names[int(draws.integers(len(names)))]
            if kind == "attribute":
                del file.attrs[name]
                if draws.random() < 0.8:
                    file.attrs[name] = values[int(draws.integers(len(values)))]
                continue
            old, kept_type = np.atleast_1d(file[name][()]), file[name].dtype
            del file[name]
            change = int(draws.integers(7 if old.dtype.kind != "O" else 5))
            if change == 0:
                continue
            changed = {
                1: lambda old=old: old[: len(old) // 2],
                2: lambda old=old: np.concatenate([old, old]),
                3: lambda old=old: old[None],
                4: lambda old=old: old[::-1],
                5: lambda old=old: old.astype("S3") if old.dtype.kind == "S" else old.astype(np.float32),
                6: lambda old=old: np.asarray(old.reshape(-1)[0]),
            }[change]()
            file.create_dataset(name, data=changed, dtype=kept_type if changed.dtype.kind == "O" else None)


# -- Targets -----------------------------------------------------------------------------------------------------------


class Wrong(Exception):
    """Accepted, and wrong."""


@dataclass(frozen=True)
class Target:
    """A reader, and the good files that it is given damaged."""

    prepare: Callable[[Path], list[Path]]
    """Writes good files into a folder; each is damaged in turn, with parts of the others."""
    read: Callable[[Path, Path], None]
    """(damaged file, good file): reads it, and raises ``Wrong`` for what should not have been accepted."""
    weight: int
    """Share of the inputs."""
    structured: bool = False
    """Whether every third input is made by ``change_store``."""
    names_file: bool = True
    """Whether a refusal names the file; decoding alone does not know it."""


def noise(number: int, samples: int = 4000) -> np.ndarray:
    return (0.1 * generator(5, "fuzz noise", 0, number).standard_normal(samples)).astype(np.float32)


def need(condition: object, what: str) -> None:
    if not condition:
        raise Wrong(what)


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
    return [folder / "pcm.h5", folder / "encoded.h5"]


def read_clip_store(path: Path, good: Path) -> None:
    """Everything that is accepted equals what was written; a clip's audio may instead be told to have changed."""
    store, original = ClipStore.open(path), ClipStore.open(good)
    rows = np.arange(len(original))
    need(store.class_names == original.class_names, "other class names")
    need(store.clip_ids == original.clip_ids, "other clip ids")
    need(np.array_equal(store.targets(rows), original.targets(rows)), "other targets")
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
            teacher={"name": "t", "fingerprint": "0" * 32},
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
    source = read_source(path)
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
        loaded = load_student(path.rename(path.with_name("student.safetensors")).parent)[0].state_dict()
        expected = load_student(good.parent)[0].state_dict()
        need(all(torch.equal(loaded[name], expected[name]) for name in expected), "other weights")


def cards(folder: Path) -> list[Path]:
    weights_files(folder)
    return [folder / "student.json"]


def read_card(path: Path, good: Path) -> None:
    shutil.copy(good.with_name("student.safetensors"), path.parent)
    student, card = load_student(path.rename(path.with_name("student.json")).parent)
    need(len(card.class_names) == 3 and all(isinstance(name, str) for name in card.class_names), "no class names")
    need(next(student.parameters()).isfinite().all(), "weights unfit for use")


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
    "clip store": Target(clip_stores, read_clip_store, 14, structured=True),
    "foreign clip store": Target(foreign_stores, read_foreign_store, 6, structured=True),
    "teach": Target(clip_stores, read_taught, 5, structured=True),
    "logit store": Target(logit_stores, read_logit_store, 12, structured=True),
    "manifest": Target(manifests, read_source_manifest, 10),
    "store manifest": Target(store_manifests, read_store_manifest, 6),
    "class list": Target(class_lists, read_class_list, 6),
    "label map": Target(label_maps, read_map, 3),
    "weights": Target(weights_files, read_weights, 10),
    "student card": Target(cards, read_card, 4),
}  # fmt: skip


# -- Running -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of one input."""

    kind: str
    """``accepted``, ``refused`` or ``failed``."""
    detail: str = ""


def make_input(
    target: Target, good_files: list[Path], folder: Path, name: str, seed: int, number: int
) -> tuple[Path, Path]:
    """Writes input ``number`` into an empty folder: (damaged file, the good file it was made from)."""
    draws = generator(seed, f"fuzz {name}", 0, number)
    good = good_files[number % len(good_files)]
    path = folder / f"input{good.suffix}"
    if target.structured and number % 3 == 0:
        shutil.copy(good, path)
        change_store(path, draws)
    else:
        path.write_bytes(damage(good.read_bytes(), [file.read_bytes() for file in good_files], draws))
    return path, good


def try_input(target: Target, path: Path, good: Path) -> Outcome:
    """Reads one input; what is printed is thrown away."""
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            target.read(path, good)
    except (ValueError, OSError) as error:
        message = str(error)
        named = not target.names_file or str(path.parent) in message
        if not message or not named or len(message) > LONGEST_MESSAGE or "Traceback" in message:
            return Outcome("failed", f"no plain message: {message[:300]!r}")
        return Outcome("refused", message)
    except Wrong as error:
        return Outcome("failed", f"accepted, but {error}")
    except BaseException as error:
        frame = error.__traceback__
        while frame.tb_next is not None:
            frame = frame.tb_next
        where = f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}"
        return Outcome("failed", f"{type(error).__name__} in {where}: {str(error)[:300]}")
    return Outcome("accepted")


def work(connection: Connection, name: str, good_files: list[Path], seed: int, numbers: range, scratch: Path) -> None:
    """A process that tries some inputs of one target and reports the outcome of each."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY + memory_in_use(), resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # libmpg123 writes to standard error by itself.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))
    for number in numbers:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        path, good = make_input(TARGETS[name], good_files, scratch, name, seed, number)
        connection.send(try_input(TARGETS[name], path, good))
    connection.close()


def memory_in_use() -> int:
    """Bytes of address space of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def outcomes(name: str, good_files: list[Path], count: int, config: FuzzConfig, scratch: Path) -> Iterator[Outcome]:
    """The outcomes of all inputs of a target, in order; a process that crashes or hangs is replaced by another."""
    context = multiprocessing.get_context("fork")
    number = 0
    while number < count:
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(
            target=work, args=(sending, name, good_files, config.seed, range(number, count), scratch)
        )
        process.start()
        sending.close()
        try:
            while number < count:
                if not receiving.poll(config.seconds):
                    yield Outcome("failed", f"hangs: more than {config.seconds:g} s")
                    number += 1
                    break
                yield receiving.recv()
                number += 1
        except EOFError:
            process.join()
            yield Outcome("failed", f"crashes: exit code {process.exitcode}")
            number += 1
        finally:
            process.kill()
            process.join()
            receiving.close()


def fuzz(config: FuzzConfig) -> int:
    """Tries all inputs, prints the table and the failures, and returns how many there are."""
    targets = {name: target for name, target in TARGETS.items() if not config.only or name in config.only}
    total = sum(target.weight for target in targets.values())
    counts = {name: max(1, round(config.inputs * target.weight / total)) for name, target in targets.items()}
    rows, failures = [], []
    with tempfile.TemporaryDirectory() as scratch, progress(total=sum(counts.values()), unit="input") as bar:
        for name, target in targets.items():
            bar.set_description(name)
            folder = Path(scratch) / name.replace(" ", "_")
            folder.mkdir()
            good_files = target.prepare(folder)
            for good in good_files:
                (folder / "check").mkdir()
                copy = Path(shutil.copy(good, folder / "check" / f"input{good.suffix}"))
                sys.path.insert(0, str(Path(__file__).parent))
                found = try_input(target, copy, good)
                assert found.kind == "accepted", (name, good, found)
                shutil.rmtree(folder / "check")
            start, kinds = time.perf_counter(), Counter()
            for number, outcome in enumerate(outcomes(name, good_files, counts[name], config, folder / "scratch")):
                kinds[outcome.kind] += 1
                bar.update()
                if outcome.kind == "failed":
                    failures.append(f"{name} {number}: {outcome.detail}")
                    keep_input(config, target, good_files, name, number)
            seconds = time.perf_counter() - start
            rows.append((name, counts[name], kinds["refused"], kinds["accepted"], kinds["failed"], f"{seconds:.0f}"))
    rows.append(
        ("all", *(sum(row[column] for row in rows) for column in range(1, 5)), sum(int(row[5]) for row in rows))
    )
    print("| input | tried | refused | accepted, and right | failures | seconds |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    for failure in failures:
        print(failure)
    return len(failures)


def keep_input(config: FuzzConfig, target: Target, good_files: list[Path], name: str, number: int) -> None:
    """Writes an input that failed to ``config.keep``, if that is given."""
    if config.keep is None:
        return
    folder = config.keep / f"{name.replace(' ', '_')}-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    make_input(target, good_files, folder, name, config.seed, number)


def main() -> int:
    return min(1, fuzz(parse(FuzzConfig, None, "fuzz.py")))


if __name__ == "__main__":
    raise SystemExit(main())
