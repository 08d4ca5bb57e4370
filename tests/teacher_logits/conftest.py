"""Fixtures for the teacher tests: a student saved as a run folder, and a module with teachers of the user's own."""

import sys
from pathlib import Path

import pytest
import torch

from audio_datasets.stores.clip_store import ClipStore
from students import create_student
from students.card import save_student
from students.frontend import LogMelConfig

OWN_TEACHERS = '''
import os
import time
from pathlib import Path

import torch

from teacher_logits.teachers.base import Teacher

CLASSES = ("hiss", "hum, low", "click")


class Statistics(Teacher):
    """Cheap logits that differ from clip to clip."""

    def __init__(self, name="statistics", classes=CLASSES, scale=1.0, pause_seconds=0.0):
        super().__init__(name, classes, sample_rate_hz=8000, clip_seconds=0.5, architecture={"scale": scale})
        self.register_buffer("scale", torch.tensor(scale))
        self.pause_seconds = pause_seconds

    def forward(self, waveform):
        time.sleep(self.pause_seconds)
        columns = [waveform.std(1), waveform.abs().amax(1), waveform.diff(dim=1).std(1)]
        return torch.stack(columns, dim=1).log() * self.scale


def good():
    return Statistics()


def louder():
    return Statistics("louder", scale=2.0)


def slow():
    """Leaves its process number behind, for a test that kills it."""
    Path(f"pid-{os.environ.get('RANK', '0')}").write_text(str(os.getpid()))
    return Statistics("slow", pause_seconds=0.1)


def other_classes():
    return Statistics(classes=("hiss", "hum", "click"))


def no_teacher():
    return torch.nn.Linear(3, 3)


class Broken(Statistics):
    def forward(self, waveform):
        return super().forward(waveform)[:, :2]


class NotFinite(Statistics):
    def forward(self, waveform):
        logits = super().forward(waveform)
        logits[1, 2] = torch.nan
        return logits
'''


@pytest.fixture
def clips(tiny_store: Path) -> ClipStore:
    """The shared clip store, opened."""
    return ClipStore.open(tiny_store)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a random mn01 for the classes of the shared clip store."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    torch.manual_seed(0)
    student = create_student("mn01", num_classes=3, n_mels=64)
    # With the batch norms' initial statistics the logits of a random network are all but zero, whatever it hears.
    for layer in student.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    student.train()(torch.randn(8, 1, 64, 50))
    torch.nn.init.normal_(student.get_parameter("classifier.5.weight"))
    save_student(folder, student, ("hiss", "hum, low", "click"), LogMelConfig(n_mels=64), {"clip_seconds": 0.5})
    return folder


@pytest.fixture
def own_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the working directory that defines teachers; new for each test."""
    name = f"own_teachers_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(OWN_TEACHERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name
