"""Fixtures for all tests: where the reference data lie, and tiny clip and logit stores."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import av
import h5py
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import settings

from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.clip_writer import ClipRecord, write_clip_store
from audio_datasets.stores.manifest import ManifestRow, manifest_path, write_manifest
from audio_datasets.system.randomness import generator
from teacher_logits.store import write_logit_store

# A slow machine must not fail a test, and an example's first run imports and compiles.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

CLASS_NAMES = ("hiss", "hum, low", "click")
TINY_CLIPS = 12
TINY_SECONDS = 0.5
SAMPLE_RATE_HZ = 32000


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tests run side by side: threads of one would wait for those of another."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Folder with real audio, a real checkpoint and numeric references; the test is skipped where it is absent."""
    folder = Path(os.environ.get("KD_REFERENCE_DIR", Path(__file__).parents[2] / "shared"))
    if not (folder / "reference").is_dir():
        pytest.skip(f"no reference data in {folder} (set KD_REFERENCE_DIR)")
    return folder


def tiny_waveform(index: int, seconds: float = TINY_SECONDS) -> np.ndarray:
    """int16 samples whose sound depends on the labels of ``tiny_labels``: noise, a hum, a click, or several."""
    rng = generator(7, "tiny clip", 0, index)
    time = np.arange(round(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    wave = 0.001 * rng.standard_normal(len(time))
    labels = tiny_labels(index)
    if "hiss" in labels:
        wave += 0.1 * rng.standard_normal(len(time))
    if "hum, low" in labels:
        wave += 0.3 * np.sin(2 * np.pi * rng.uniform(80, 200) * time)
    if "click" in labels:
        wave[:: round(0.1 * SAMPLE_RATE_HZ)] += 0.9
    return np.round(32767 * np.clip(wave, -1, 1)).astype(np.int16)


def tiny_labels(index: int) -> tuple[str, ...]:
    """One to three of the classes; all seven combinations in turn."""
    bits = index % 7 + 1
    return tuple(name for place, name in enumerate(CLASS_NAMES) if bits >> place & 1)


def write_tiny_store(
    path: Path, clips: int = TINY_CLIPS, seconds: float = TINY_SECONDS, class_names: tuple[str, ...] = CLASS_NAMES
) -> Path:
    """A clip store of short PCM clips with a manifest: folds 1 to 3 in turn, the last third of the clips in "valid".

    ``class_names`` are three other names for the same sounds.
    """
    name_of = dict(zip(CLASS_NAMES, class_names, strict=True))
    records = [
        ClipRecord(f"clip-{i:04d}", tiny_waveform(i, seconds), tuple(name_of[label] for label in tiny_labels(i)))
        for i in range(clips)
    ]
    write_clip_store(path, records, class_names, audio_kind="pcm16", sample_rate_hz=SAMPLE_RATE_HZ)
    write_manifest(
        manifest_path(path),
        [
            ManifestRow(
                record.clip_id,
                labels=record.labels,
                source_labels=record.labels,
                fold=index % 3 + 1,
                split="train" if index < 2 * clips // 3 else "valid",
            )
            for index, record in enumerate(records)
        ],
    )
    return path


def steps(seconds: float, rate_hz: int, seed: int = 0) -> np.ndarray:
    """float32 (samples,): a tone that changes its loudness every half second, so that what is heard tells where it was."""
    rng = generator(13, "steps", seed)
    loudness = np.repeat(rng.uniform(0.05, 0.5, size=round(2 * seconds)), rate_hz // 2)
    time = np.arange(len(loudness)) / rate_hz
    return (loudness * np.sin(2 * np.pi * 440 * time) + 0.001 * rng.standard_normal(len(time))).astype(np.float32)


def levels(waveform: np.ndarray, rate_hz: int) -> np.ndarray:
    """The loudness in the middle of each half second of ``steps``: whatever an encoder does to single samples, it keeps that."""
    half, quarter = rate_hz // 2, rate_hz // 8
    whole = waveform[: len(waveform) // half * half].reshape(-1, half)
    return whole[:, quarter:-quarter].std(axis=1) * np.sqrt(2)


def encode_with_ffmpeg(waveform: np.ndarray, rate_hz: int, container: str, codec: str) -> bytes:
    """The file that FFmpeg makes of a mono waveform, at 64 kbit/s where the codec has a bit rate."""
    target = io.BytesIO()
    with av.open(target, "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate_hz, layout="mono")
        stream.bit_rate = 64_000
        context = stream.codec_context
        context.open()
        frame = av.AudioFrame.from_ndarray(waveform[None], format="fltp", layout="mono")
        frame.sample_rate = rate_hz
        to_codec = av.AudioResampler(context.format.name, "mono", rate_hz, frame_size=context.frame_size or None)
        for part in (frame, None):
            for packed in to_codec.resample(part):
                file.mux(stream.encode(packed))
        file.mux(stream.encode(None))
    return target.getvalue()


@pytest.fixture(scope="session")
def sound_steps() -> SimpleNamespace:
    """``wave(seconds, rate_hz, seed)`` with steps of loudness, its ``levels(waveform, rate_hz)``, and ``encode`` through FFmpeg."""
    return SimpleNamespace(wave=steps, levels=levels, encode=encode_with_ffmpeg)


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shared clip store; tests only read it."""
    return write_tiny_store(tmp_path_factory.mktemp("clips") / "tiny.h5")


def write_tiny_logits(
    path: Path, store_path: Path, rows: range | None = None, scale: float = 3.0, link: object = "sigmoid"
) -> Path:
    """A logit store for the clips of a tiny store: ``scale`` where a clip has the label, ``-scale`` elsewhere, some noise."""
    store = ClipStore.open(store_path)
    chosen = np.arange(len(store)) if rows is None else np.array(rows)
    noise = generator(11, "tiny logits").standard_normal((len(chosen), len(store.class_names)))
    write_logit_store(
        path,
        clip_ids=[store.clip_id(int(row)) for row in chosen],
        audio_digests=store.audio_digests(chosen),
        logit_blocks=[(scale * (2 * store.targets(chosen) - 1) + noise).astype(np.float16)],
        class_names=store.class_names,
        teacher={"name": "tiny", "fingerprint": "0" * 32} | ({} if link is None else {"link": link}),
        clip_store_fingerprint=store.fingerprint,
    )
    return path


@pytest.fixture(scope="session")
def tiny_logits(tiny_store: Path) -> Path:
    """Logits for every clip of ``tiny_store``; tests only read them."""
    return write_tiny_logits(tiny_store.with_name("tiny-logits.h5"), tiny_store)


def command_environment() -> dict[str, str]:
    """Environment for commands that a test starts: one thread (others share the machine), no trackers' network."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


@pytest.fixture
def make_tiny_store(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tiny clip store of its own for a test: ``make_tiny_store("a.h5", clips=20)``."""
    return lambda name, **options: write_tiny_store(tmp_path / name, **options)


@pytest.fixture
def make_tiny_logits(tmp_path: Path) -> Callable[..., Path]:
    """Writes logits for a tiny clip store: ``make_tiny_logits("a-logits.h5", store, rows=range(4))``."""
    return lambda name, store, **options: write_tiny_logits(tmp_path / name, store, **options)


@pytest.fixture
def environment() -> dict[str, str]:
    """Environment for a command started as a process of its own."""
    return command_environment()


# -- Small copies of the data sets that `kd finetune` reads, in exactly their official layouts -------------------------


def write_sound(path: Path, pitch_hz: float, seconds: float, sample_rate_hz: int = 8000) -> None:
    """A tone in noise; which noise depends on the file's name."""
    rng = generator(5, f"sound {path.name}")
    time = np.arange(round(seconds * sample_rate_hz)) / sample_rate_hz
    wave = 0.3 * np.sin(2 * np.pi * pitch_hz * time) + 0.03 * rng.standard_normal(len(time))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, sample_rate_hz)


def write_esc50_layout(folder: Path, per_fold: int = 2, folds: int = 3) -> Path:
    """Three classes; each recording gives two clips (takes A and B) of one fold; one file is Ogg in place of WAV."""
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    for fold in range(1, folds + 1):
        for target, category in enumerate(("dog", "rain", "clock_tick")):
            for recording in range(per_fold // 2):
                source = 1000 * fold + 10 * target + recording
                for take in "AB":
                    name = f"{fold}-{source}-{take}-{target}.wav"
                    lines.append(f"{name},{fold},{target},{category},True,{source},{take}")
                    stored = Path(name).with_suffix(".ogg" if name == "1-1000-A-0.wav" else ".wav")
                    write_sound(folder / "audio" / stored, 200.0 * 3**target, 0.5)
    (folder / "meta").mkdir()
    (folder / "meta" / "esc50.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_fsd50k_layout(folder: Path) -> Path:
    """Three classes, clips of 0.3 s to 30 s; "Rain" has no training clip."""
    truth = folder / "FSD50K.ground_truth"
    truth.mkdir(parents=True)
    classes = {"Accordion": 300.0, "Bark": 900.0, "Rain": 2500.0}
    truth.joinpath("vocabulary.csv").write_text(
        "".join(f"{index},{name},/m/0{index}\n" for index, name in enumerate(classes))
    )
    clips = [
        ("dev", "64760", ("Accordion",), "train", 0.3),
        ("dev", "16399", ("Bark", "Accordion"), "train", 30.0),
        ("dev", "16401", ("Bark",), "train", 1.2),
        ("dev", "16402", ("Accordion",), "train", 1.0),
        ("dev", "345111", ("Accordion",), "val", 1.5),
        ("dev", "389607", ("Bark",), "val", 0.7),
        ("eval", "37199", ("Accordion", "Rain"), None, 2.6),
        ("eval", "175151", ("Bark",), None, 0.3),
        ("eval", "253463", ("Accordion",), None, 30.0),
    ]
    tables = {"dev": ["fname,labels,mids,split"], "eval": ["fname,labels,mids"]}
    for part, name, labels, split, seconds in clips:
        write_sound(folder / f"FSD50K.{part}_audio" / f"{name}.wav", classes[labels[0]], seconds)
        quoted = ",".join(labels)
        tables[part].append(f'{name},"{quoted}","/m/00"' + (f",{split}" if split else ""))
    for part, lines in tables.items():
        truth.joinpath(f"{part}.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_openmic_layout(folder: Path, keys_as_objects: bool = True) -> Path:
    """Three instruments, of each clip one or two known; the keys as a pickled array of objects, as in the official file."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("accordion", "banjo", "bass")
    keys = [
        "000046_3840",
        "000135_483840",
        "000139_119040",
        "001000_0",
        "001001_0",
        "001002_0",
        "001003_0",
        "999_left_out",
    ]
    likelihood = np.full((len(keys), 3), 0.5)
    mask = np.zeros((len(keys), 3), dtype=bool)
    for index, key in enumerate(keys):
        present, absent = index % 3, (index + 1) % 3
        likelihood[index, present], likelihood[index, absent] = 0.9, 0.1
        mask[index, [present, absent]] = True
        write_sound(folder / "audio" / key[:3] / f"{key}.ogg", 300.0 * 2**present, 0.6)
    np.savez(
        folder / "openmic-2018.npz",
        X=np.zeros((len(keys), 10, 128), dtype=np.uint8),
        Y_true=likelihood,
        Y_mask=mask,
        sample_key=np.array(keys, dtype=object if keys_as_objects else None),
    )
    (folder / "class-map.json").write_text(json.dumps({name: index for index, name in enumerate(names)}))
    (folder / "partitions").mkdir()
    (folder / "partitions" / "split01_train.csv").write_text("\n".join(keys[:4]) + "\n")
    (folder / "partitions" / "split01_test.csv").write_text("\n".join(keys[4:7]) + "\n")
    return folder


def write_dcase20_layout(folder: Path) -> Path:
    """Two scenes; devices a and s1 in training and test, s4 only in the test; one clip of meta.csv is in no list."""
    meta = ["filename\tscene_label\tidentifier\tsource_label"]
    lists = {"train": ["filename\tscene_label"], "test": ["filename"], "evaluate": ["filename\tscene_label"]}
    for pitch, scene in ((300.0, "airport"), (1200.0, "bus")):
        for place, (city, split) in enumerate((("barcelona", "train"), ("helsinki", "train"), ("lyon", "evaluate"))):
            for device in ("a", "s1") if split == "train" else ("a", "s1", "s4"):
                name = f"audio/{scene}-{city}-{place}-{place}-{device}.wav"
                write_sound(folder / name, pitch, 0.5, 44100)
                meta.append(f"{name}\t{scene}\t{city}-{place}\t{device}")
                lists[split].append(f"{name}\t{scene}")
                if split == "evaluate":
                    lists["test"].append(name)
    meta.append("audio/bus-lyon-9-9-b.wav\tbus\tlyon-9\tb")
    (folder / "meta.csv").write_text("\n".join(meta) + "\n")
    (folder / "evaluation_setup").mkdir()
    for name, lines in lists.items():
        (folder / "evaluation_setup" / f"fold1_{name}.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_own_folder(folder: Path, clips: int = 5) -> Path:
    """Two classes with files of several formats, rates and lengths."""
    for name, pitch in (("fan", 300.0), ("pump", 1500.0)):
        for index in range(clips):
            suffix, rate = ((".wav", 8000), (".mp3", 44100), (".flac", 22050))[index % 3]
            write_sound(folder / name / f"take {index}{suffix}", pitch, 0.4 + 0.3 * index, rate)
    return folder


def write_own_manifest(folder: Path) -> Path:
    """The same files in a list, with splits, groups and devices; one clip has two labels and one has none."""
    write_own_folder(folder)
    lines = ["clip_id,path,labels,split,group,device"]
    for number, file in enumerate(sorted(folder.rglob("take *"))):
        labels = {3: "fan;loud", 8: ""}.get(number, file.parent.name)
        split = ("train", "val", "Training", "eval")[number % 4]
        lines.append(
            f"{file.parent.name}-{number},{file.relative_to(folder).as_posix()},{labels},{split},g{number},phone"
        )
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return folder / "list.csv"


def write_audioset_layout(folder: Path) -> Path:
    """Two lists of segments, three classes, and audio named by YouTube id below a folder."""
    classes = {
        "/m/09x0r": ("Speech", 300.0),
        "/m/05zppz": ("Male speech, man speaking", 900.0),
        "/m/0bt9lr": ("Dog", 2500.0),
    }
    folder.mkdir(parents=True)
    rows = "".join(f'{index},{class_id},"{name}"\n' for index, (class_id, (name, _)) in enumerate(classes.items()))
    (folder / "class_labels_indices.csv").write_text(f"index,mid,display_name\n{rows}")
    for number, (name, count) in enumerate({"balanced_train": 6, "eval": 3}.items()):
        lines = [
            "# Segments csv created Sun Mar  5 10:54:31 2017",
            "# YTID, start_seconds, end_seconds, positive_labels",
        ]
        for index in range(count):
            class_id, youtube_id = list(classes)[index % 3], f"{'-_'[number]}{'abcdefghi'}{index}"
            lines.append(f'{youtube_id}, 30.000, 40.000, "{class_id}"')
            write_sound(folder / "audio" / f"{index % 2:02d}" / f"Y{youtube_id}.flac", classes[class_id][1], 0.5)
        (folder / f"{name}_segments.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_panns_layout(folder: Path, clips: int = 6, sample_rate_hz: int = 16000) -> Path:
    """Waveforms as PANNs' ``pack_waveforms_to_hdf5`` writes them, with the class list beside; returns the HDF5 file."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = ['0,/m/09x0r,"Speech"', '1,/m/05zppz,"Male speech, man speaking"', '2,/m/0bt9lr,"Dog"']
    (folder / "class_labels_indices.csv").write_text("index,mid,display_name\n" + "\n".join(rows) + "\n")
    noise = generator(19, "panns layout").standard_normal((clips, sample_rate_hz // 2))
    waveforms = np.zeros((clips, sample_rate_hz), np.int16)  # padded with zeros to one length
    waveforms[:, : sample_rate_hz // 2] = np.round(8000 * noise.clip(-3, 3))
    targets = np.zeros((clips, 3), bool)
    targets[np.arange(clips), np.arange(clips) % 3] = True
    targets[1, 0] = True
    path = folder / "balanced_train.h5"
    with h5py.File(path, "w") as file:
        file["audio_name"] = np.array([f"Yabcdefgh-{index}_.wav".encode() for index in range(clips)], "S20")
        file["waveform"], file["target"] = waveforms, targets
        file.attrs.create("sample_rate", data=sample_rate_hz, dtype=np.int32)
    return path


LAYOUTS = {
    "panns": write_panns_layout,
    "esc50": write_esc50_layout,
    "fsd50k": write_fsd50k_layout,
    "openmic": write_openmic_layout,
    "dcase20": write_dcase20_layout,
    "folder": write_own_folder,
    "manifest": write_own_manifest,
    "audioset": write_audioset_layout,
}


@pytest.fixture
def make_task_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a task's layout: ``make_task_folder("esc50")``; the folder is called like the task. For "manifest" it is a file."""
    return lambda task, **options: LAYOUTS[task](tmp_path / "data" / task, **options)
