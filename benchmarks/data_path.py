"""The data path of pretraining: clips per second and core from store to example, and how long training steps wait for it.

    python benchmarks/data_path.py

First the time of the processor that one example takes, by how the clips are kept: decoding (10 s at 32 kHz), the logits of
three teachers (527 classes), labels, and the rest (crop, mixup weight, mel jitter, tensors). Then whole training steps on
this machine (log-mel, student, losses, backward, Adam) with data-loading workers, and the share of their time in which
the step waits for its batch. A step as fast as a GPU's waits unless workers × clips/s exceed its own rate: the first table
tells how many cores that takes.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from decoding import CLIP_SECONDS, write_stores
from machine import machine
from torch import Tensor
from torch.utils.data import DataLoader

from audio_datasets.audio.augment import AugmentConfig
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.system.command import parse
from audio_datasets.tasks.label_space import LabelSpace
from kd.data.examples import TrainingExamples
from kd.data.sampling import ClipRequest
from kd.data.windows import Window
from kd.objectives.base import ObjectiveSettings
from kd.objectives.distillation import DistillationObjective
from kd.training.learner import Learner
from kd.training.optimization import OptimizerConfig, create_optimizer
from kd.training.threads import leave_a_core_to_the_workers
from students import create_student
from students.frontend import LogMelConfig
from teacher_logits.store import write_logit_store
from teacher_logits.stores.ensemble import LogitEnsemble

WARM_UP_STEPS = 3
STORED_AS = ("MP3", "Ogg Vorbis", "FLAC", "int16 PCM")


@dataclass(frozen=True)
class DataPathConfig:
    """Measure the data path of pretraining."""

    clips: int = 48
    """Clips in each store."""
    teachers: int = 3
    """Logit stores of the ensemble."""
    classes: int = 527
    """Classes."""
    students: tuple[str, ...] = ("none", "mn01", "mn10")
    """Students whose training steps are measured; with "none" a step takes no time."""
    batch_size: int = 12
    """Clips in a training step."""
    steps: int = 12
    """Steps measured, after a few that are not."""
    workers: int = 1
    """Data-loading workers."""
    rounds: int = 5
    """Rounds over the clips; the median counts."""


def write_logits(folder: Path, clips: ClipStore, teachers: int) -> LogitEnsemble:
    rng = np.random.default_rng(0)
    paths = [folder / f"teacher-{number}.h5" for number in range(teachers)]
    for path in paths:
        write_logit_store(
            path,
            clip_ids=clips.clip_ids,
            audio_digests=clips.audio_digests(np.arange(len(clips))),
            logit_blocks=[rng.normal(-6, 2, (len(clips), len(clips.class_names))).astype(np.float16)],
            class_names=clips.class_names,
            teacher={"name": path.stem, "fingerprint": path.stem, "link": "sigmoid"},
            clip_store_fingerprint=clips.fingerprint,
        )
    return LogitEnsemble.open(paths)


def training_clips(clips: ClipStore, teachers: LogitEnsemble) -> TrainingExamples:
    frontend = LogMelConfig()
    window = Window(frontend.sample_rate_hz, CLIP_SECONDS)
    return TrainingExamples(
        clips, np.arange(len(clips)), window, frontend=frontend, augment=AugmentConfig(), seed=0, teachers=teachers
    )


def milliseconds(function: Callable[[int], object], config: DataPathConfig) -> float:
    """Time of the processor for one row, the median over rounds."""
    rounds = []
    for _ in range(config.rounds + 1):
        start = time.process_time()
        for row in range(config.clips):
            function(row)
        rounds.append((time.process_time() - start) / config.clips * 1e3)
    return float(np.median(rounds[1:]))  # the first fills caches


def print_examples(stores: dict[str, ClipStore], teachers: dict[str, LogitEnsemble], config: DataPathConfig) -> None:
    print(f"| stored as | clips/s and core | decoding, ms | {config.teachers} teachers' logits | labels | the rest |")
    print("|---|---|---|---|---|---|")
    for name, clips in stores.items():
        whole, *parts = (
            milliseconds(function, config) for function in parts_of_example(training_clips(clips, teachers[name]))
        )
        cells = [f"{part:.2f}" for part in (*parts, max(0.0, whole - sum(parts)))]
        print(f"| {name} | {1e3 / whole:,.0f} | {' | '.join(cells)} |")


def parts_of_example(dataset: TrainingExamples) -> list[Callable[[int], object]]:
    """Functions of a row: the whole example, its waveform, its logits, its labels."""
    clips, teachers, rate = dataset.clips, dataset.teachers, dataset.frontend.sample_rate_hz
    return [
        lambda row: dataset[ClipRequest(0, row, row)],
        lambda row: clips.waveform(row, rate, seconds=CLIP_SECONDS),
        lambda row: teachers.read([clips.clip_id(row)]),
        lambda row: clips.targets(np.array([row])),
    ]


def training_step(student_name: str, config: DataPathConfig) -> Callable[[dict[str, Tensor]], None]:
    """A function that trains the student on one batch."""
    if student_name == "none":
        return lambda batch: None
    torch.manual_seed(0)
    student = create_student(student_name, config.classes)
    optimizer = create_optimizer(OptimizerConfig(), student)
    label_space = LabelSpace.single([f"class {number}" for number in range(config.classes)], exclusive=False)
    objective = DistillationObjective(ObjectiveSettings(LogMelConfig(), label_space, student.embedding_dim))
    learner = Learner(student, objective).train()

    def step(batch: dict[str, Tensor]) -> None:
        learner(batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_steps(
    step: Callable[[dict[str, Tensor]], None], dataset: TrainingExamples, config: DataPathConfig
) -> tuple[float, float]:
    """Clips per second, and the share of the time in which steps wait for their batch."""
    positions = np.arange((config.steps + WARM_UP_STEPS) * config.batch_size)
    requests = [ClipRequest(0, position, position % len(dataset.clips)) for position in positions.tolist()]
    batches = [requests[start : start + config.batch_size] for start in range(0, len(requests), config.batch_size)]
    loader = iter(DataLoader(dataset, batch_sampler=batches, num_workers=config.workers))
    for _ in range(WARM_UP_STEPS):
        step(next(loader))
    waited, start = 0.0, time.perf_counter()
    for _ in range(config.steps):
        asked = time.perf_counter()
        batch = next(loader)
        waited += time.perf_counter() - asked
        step(batch)
    seconds = time.perf_counter() - start
    return config.steps * config.batch_size / seconds, waited / seconds


def main(arguments: Sequence[str] | None = None) -> int:
    config = parse(DataPathConfig, arguments, "data_path.py")
    torch.set_flush_denormal(True)
    leave_a_core_to_the_workers(Accelerator(cpu=True))
    with tempfile.TemporaryDirectory() as folder:
        class_names = [f"class {index}" for index in range(config.classes)]
        every = write_stores(Path(folder), config.clips, class_names)
        stores = {name: every[name] for name in STORED_AS}
        teachers = {}
        for name, clips in stores.items():
            (Path(folder) / name).mkdir()
            teachers[name] = write_logits(Path(folder) / name, clips, config.teachers)
        print(f"{machine()}, PyTorch {torch.__version__}\n")
        print_examples(stores, teachers, config)
        print(
            f"\n{torch.get_num_threads()} thread(s) for steps of {config.batch_size} clips, {config.workers} worker(s)\n\n"
            "| student | stored as | clips/s | waiting for data |\n|---|---|---|---|"
        )
        for student in config.students:
            step = training_step(student, config)
            for name, clips in stores.items():
                rate, share = measure_steps(step, training_clips(clips, teachers[name]), config)
                print(f"| {student} | {name} | {rate:,.0f} | {share:.1%} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
