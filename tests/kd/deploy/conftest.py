"""A run folder with a tiny student, and sounds of several rates, lengths and formats."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from audio_datasets.tasks.label_space import LabelSpace
from students import create_student
from students.card import save_student
from students.frontend import LogMel, LogMelConfig

NAMES = ("dog", "rain, heavy", "clock")
FRONTEND = LogMelConfig(sample_rate_hz=16000, n_fft=512, window_samples=400, hop_samples=160, n_mels=24, fmax_hz=7000.0)


def write_tiny_run(folder: Path, exclusive: bool = False, short_clips: str = "pad") -> Path:
    """A run folder with a student of three classes and windows of 1 s, which says different things of different sounds."""
    torch.manual_seed(1)
    student = create_student("mn01", len(NAMES), n_mels=FRONTEND.n_mels).eval()
    norms = [module for module in student.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:  # without statistics of its inputs a student says the same of every sound
        norm.train().momentum = None
    time = torch.arange(16000) / 16000
    sweeps = torch.sin(torch.tensor([800.0, 2000.0, 4000.0, 8000.0])[:, None] * time * (1 + time)) * time
    heard = (0.4 * sweeps + 0.1 * torch.randn(4, 16000)) * torch.tensor([[1.0], [0.3], [1.0], [1.0]])
    heard[3, 5000:] = 0
    with torch.no_grad():
        logits = student(LogMel(FRONTEND)(heard)).logits
        student.classifier[-1].weight.div_(8 * logits.std())
    provenance = {
        "clip_seconds": 1.0,
        "label_groups": LabelSpace.single(NAMES, exclusive).to_json(),
        "config": {"short_clips": short_clips},
    }
    save_student(folder, student, NAMES, FRONTEND, provenance)
    return folder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multi-label run folder; tests only read it."""
    return write_tiny_run(tmp_path_factory.mktemp("runs") / "mine")


@pytest.fixture(scope="session")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with five sounds, one of them in a folder of its own, and a text file."""
    folder = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    for name, rate, seconds, channels in (
        ("short.wav", 16000, 0.3, 1),
        ("stereo.wav", 44100, 2.6, 2),
        ("long.ogg", 22050, 4.4, 1),
        ("inside/odd.flac", 11025, 1.01, 1),
        ("speech.mp3", 32000, 3.3, 1),
    ):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        time = np.arange(round(rate * seconds)) / rate
        swept = np.sin(2 * np.pi * (200 + 400 * time) * time) * (time % 1.0)
        wave = 0.4 * swept[:, None] + 0.1 * rng.standard_normal((len(time), channels))
        soundfile.write(path, wave, rate)
    (folder / "notes.txt").write_text("no audio")
    return folder


@pytest.fixture
def make_tagging_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run folder of its own for a test: ``make_tagging_run("a", exclusive=True)``."""
    return lambda name, **options: write_tiny_run(tmp_path / name, **options)
