"""Estimates steps, hours, memory and disk space of a training run from a few measured steps on the machine that will run it.

The measured steps use the run's own data, loader and processes. Nothing is written.
"""

import itertools
import math
import multiprocessing
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset

from audio_datasets.system.command import progress
from kd.stages.build_run import BuiltRun
from kd.stages.pretraining import Pretraining
from kd.stages.pretraining_config import PretrainConfig
from kd.training.checkpoint import checkpoint_bytes
from kd.training.loop import train_on_batch
from teacher_logits.stores.ensemble import LogitEnsemble

MEASURED_STEPS = 5
CLIPS_TO_DECODE = 16


def estimate(config: PretrainConfig, stage: Pretraining) -> dict[str, Any]:
    """The resources that a run needs on this machine; docs/audioset.md explains the entries. Trains the student for a few steps.

    Called by all processes.
    """
    built, loop = stage.built, config.loop
    accelerator, batches, state = built.accelerator, built.batches, built.state
    learner = state.trained(accelerator)
    learner.student.start_epoch(0)
    measured = measure_steps(built)
    needed = memory(accelerator.device)
    validation_hours = None
    evaluator = stage.evaluator()
    if evaluator is not None:
        once = validation_seconds(
            accelerator, built.tagger(learner.student), evaluator.windows, loop.batch_size, config.workers
        )
        validation_hours = math.ceil(loop.epochs / loop.validate_every_epochs) * once / 3600
    steps = loop.epochs * batches.steps_per_epoch
    checkpoint = checkpoint_bytes(state)
    kept = min(loop.keep_checkpoints, loop.epochs if loop.checkpoint_every_steps is None else steps)
    return {
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "student_parameters": sum(parameter.numel() for parameter in learner.student.parameters()),
        "training_clips": len(built.data.rows),
        "training_clips_without_labels": len(batches.unlabelled),
        "clips_per_step": measured.clips_per_step * accelerator.num_processes,
        "steps_per_epoch": batches.steps_per_epoch,
        "steps": steps,
        "measured_steps": len(measured.seconds),
        "seconds_per_step": measured.seconds_per_step,
        "share_waiting_for_data": measured.waiting_share,
        "seconds_per_clip_read": measured.clip_seconds,
        "training_hours": steps * measured.seconds_per_step / 3600,
        "validation_hours": validation_hours,
        "memory": needed,
        "disk": {
            "clips_bytes": size_on_disk(config.clips),
            "logits_bytes": size_on_disk(files_of(built.data.teachers)),
            "checkpoint_bytes": checkpoint,
            # While the newest checkpoint is written, there is one more than will be kept.
            "run_folder_peak_bytes": (kept + 1) * checkpoint,
            "free_bytes": free_bytes(config.out),
        },
    }


def files_of(teachers: LogitEnsemble | None) -> list[Path]:
    """The files behind the teachers' stores."""
    stores = teachers.stores if teachers is not None else ()
    return [Path(part.path) for store in stores for part in getattr(store, "stores", (store,))]


@dataclass(frozen=True)
class MeasuredSteps:
    """Timings of the steps of one process."""

    seconds: tuple[float, ...]
    """Duration of each step, including waiting for data."""
    waited_seconds: tuple[float, ...]
    """Time that each step spent waiting for data."""
    clip_seconds: float
    """Time to create one clip's example (decoding, augmentation, labels, logits) on one core."""
    clips_per_step: int
    """Clips per step of this process."""
    workers: int

    @property
    def seconds_per_step(self) -> float:
        """Mean of the measured steps, or the time that workers need for the clips of a step if that is longer.

        Loaders read ahead, so a few steps do not show whether they keep up.
        """
        by_workers = self.clip_seconds * self.clips_per_step / self.workers if self.workers else 0.0
        return max(fmean(self.seconds), by_workers)

    @property
    def waiting_share(self) -> float:
        """Share of a run's time in which it waits for data."""
        computing = fmean(self.seconds) - fmean(self.waited_seconds)
        return 1.0 - computing / self.seconds_per_step


def measure_steps(built: BuiltRun, steps: int = MEASURED_STEPS) -> MeasuredSteps:
    """Trains for one warm-up step and ``steps`` more (fewer in a shorter epoch), and times the latter.

    Called by all processes.
    """
    accelerator, state, batches = built.accelerator, built.state, built.batches
    batches.start_at(epoch=0, step=0)
    state.learner.train()
    steps = min(steps, max(1, batches.steps_per_epoch - 1))
    warm_up = min(1, batches.steps_per_epoch - steps)
    accumulation = accelerator.gradient_accumulation_steps
    loaded, seconds, waited = iter(built.loader), [], []
    for _ in progress(range(warm_up + steps), shown=accelerator.is_main_process, desc="measuring", unit="step"):
        started, waiting = time.perf_counter(), 0.0
        for _ in range(accumulation):
            asked = time.perf_counter()
            batch = next(loaded)
            waiting += time.perf_counter() - asked
            train_on_batch(accelerator, state, batch, built.config.loop.max_gradient_norm)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        waited.append(waiting)
    return MeasuredSteps(
        tuple(seconds[warm_up:]),
        tuple(waited[warm_up:]),
        clip_seconds=seconds_each(built.examples, itertools.islice(next(iter(batches)), CLIPS_TO_DECODE)),
        clips_per_step=batches.batch_size * accumulation,
        workers=built.loader.num_workers,
    )


def seconds_each(dataset: Dataset, items: Iterable[Any]) -> float:
    """Seconds per item when the data set is read in this process."""
    items = list(items)
    started = time.perf_counter()
    for item in items:
        dataset[item]
    return (time.perf_counter() - started) / len(items)


@torch.inference_mode()
def validation_seconds(
    accelerator: Accelerator, tagger: Callable[[Tensor], Tensor], dataset: Dataset, batch_size: int, workers: int
) -> float:
    """Seconds for one validation with all processes, estimated from one batch."""
    clips = len(dataset)
    items = [dataset[index] for index in range(min(batch_size, clips))]
    by_data = seconds_each(dataset, range(min(CLIPS_TO_DECODE, clips)))
    waveforms = torch.stack([waveform for _, waveform in items]).to(accelerator.device)
    started = time.perf_counter()
    with accelerator.autocast():
        tagger(waveforms).float().cpu()
    by_student = (time.perf_counter() - started) / len(items)
    each = max(by_student, by_data / workers) if workers else by_student + by_data
    return clips * each / accelerator.num_processes


def memory(device: torch.device) -> dict[str, int | None]:
    """Peak memory of this process, current memory of its data-loading workers, and peak memory of the GPU, in bytes.

    Memory shared between processes is counted in equal parts. None if the system does not provide a value.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "process_peak_bytes": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "workers_bytes": _proportional_bytes([child.pid for child in multiprocessing.active_children()]),
        "gpu_peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def _proportional_bytes(process_ids: Sequence[int]) -> int | None:
    total = 0
    for process_id in process_ids:
        try:
            lines = Path(f"/proc/{process_id}/smaps_rollup").read_text().splitlines()
        except OSError:
            return None
        total += next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def free_bytes(folder: Path) -> int:
    """Free disk space where ``folder`` is or will be."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def size_on_disk(paths: Iterable[str | Path]) -> int:
    """Bytes of these files together."""
    return sum(os.stat(path).st_size for path in paths)
