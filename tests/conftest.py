"""Fixtures for all tests: where the reference data lie, and tiny clip and logit stores."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from audio_datasets.clip_store import ClipRecord, ClipStore, write_clip_store
from audio_datasets.manifest import ManifestRow, manifest_path, write_manifest
from audio_datasets.randomness import generator
from teacher_logits.store import write_logit_store

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


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shared clip store; tests only read it."""
    return write_tiny_store(tmp_path_factory.mktemp("clips") / "tiny.h5")


def write_tiny_logits(path: Path, store_path: Path, rows: range | None = None, scale: float = 3.0) -> Path:
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
        teacher={"name": "tiny", "fingerprint": "0" * 32},
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
