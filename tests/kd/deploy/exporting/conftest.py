"""A run folder with a student of two layers and six validation clips, whose exports are traced once."""

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from audio_datasets.tasks.label_space import LabelSpace
from kd.deploy.exporting import export_student as exporting
from kd.run_folder.predictions import VALIDATION_FILE, write_predictions
from students import create_student
from students.card import save_student
from students.frontend import LogMel, LogMelConfig

NAMES = ("dog", "rain, heavy", "clock")
FRONTEND = LogMelConfig(sample_rate_hz=16000, n_fft=512, window_samples=400, hop_samples=160, n_mels=24, fmax_hz=7000.0)
STUDENT = "tiny_student:Tiny"
_traced: dict[object, object] = {}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run folder with six validation clips of three classes, whose labels are what the student says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1])
        patch.setenv("KD_ALLOW_STUDENTS", STUDENT)
        from tiny_student import train_batch_norms

        folder = tmp_path_factory.mktemp("runs") / "mine"
        torch.manual_seed(1)
        student = train_batch_norms(create_student(STUDENT, len(NAMES)))
        torch.nn.init.normal_(student.classifier[-1].weight, std=2.0)
        provenance = {
            "clip_seconds": 1.0,
            "task": "folder",
            "label_groups": LabelSpace.single(NAMES, exclusive=False).to_json(),
            "config": {"data": "/home/somebody/private/sounds", "short_clips": "pad"},
        }
        save_student(folder, student, NAMES, FRONTEND, provenance)
        rng = np.random.default_rng(0)
        sources, logits = [], []
        for number in range(6):
            path = folder.parent / f"clip {number}.wav"
            samples = [16000, 16000, 7000, 40000, 16000, 22050][number]
            noise = 0.2 * rng.standard_normal(samples) * np.cos(np.arange(samples) * 0.01 * (number + 1))
            soundfile.write(path, noise, 22050 if number == 5 else 16000)
            sources.append(str(path))
        clips = exporting.clips_at(folder.parent, exporting.read_subject(str(folder), None))
        with torch.inference_mode():
            for number in range(6):
                windows = torch.from_numpy(clips.windows(number))
                logits.append(student(LogMel(FRONTEND)(windows)).logits.mean(0).numpy())
        logits = np.stack(logits)
        write_predictions(
            folder / VALIDATION_FILE,
            clip_ids=[f"clip {number}" for number in range(6)],
            logits=logits,
            targets=(logits >= np.median(logits, axis=0)).astype(np.float32),
            mask=np.ones(logits.shape, bool),
            class_names=NAMES,
            columns={"source": sources},
        )
        yield folder


@pytest.fixture(scope="module", autouse=True)
def traced_once() -> Iterator[None]:
    """Tracing takes most of an export's time: each kind of graph is traced once, and later exports get a copy of it."""
    trace = exporting.onnx_model

    def cached(network, example, **options):
        key = (type(network.student), example.ndim, len(example))
        if key not in _traced:
            _traced[key] = trace(network, example, **options)
        return copy.deepcopy(_traced[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "onnx_model", cached)
        yield
