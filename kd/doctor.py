"""``kd doctor``: is this machine fit for training, are the data whole, and what will training wait for?

Each check gives findings, and each finding says what was found and, unless all is well, what to do about it. Measurements
are bounded in time, so that the whole takes less than a minute; docs/doctor.md tells what is measured.
"""

import math
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from packaging.requirements import Requirement
from torch.utils.data import default_collate

from audio_datasets.audio.augment import AugmentConfig
from audio_datasets.audio.bad_clips import BadClipError, summary
from audio_datasets.audio.codec import encode
from audio_datasets.stores.class_lists import read_class_names
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.clip_writer import ClipRecord, write_clip_store
from audio_datasets.system.command import parse, progress, run_command
from audio_datasets.system.disk_space import readable_bytes
from audio_datasets.system.files import json_text
from audio_datasets.system.randomness import generator
from audio_datasets.system.workers.sharing import (
    FILES_BESIDE,
    FILES_OF_A_WORKER,
    FILES_OF_SHARED_BATCHES,
    SHARED_MEMORY,
    free_files,
)
from audio_datasets.tasks.label_space import LabelSpace
from kd.data.examples import TrainingExamples
from kd.data.sampling import ClipRequest, are_labelled
from kd.data.windows import Window
from kd.objectives.base import ObjectiveSettings
from kd.objectives.distillation import DistillationObjective
from kd.training.learner import Learner
from kd.training.optimization import OptimizerConfig, create_optimizer
from students import create_student
from students.frontend import LogMel, LogMelConfig
from teacher_logits.stores.ensemble import LogitEnsemble

Status = Literal["ok", "warning", "problem"]

LITTLE_SHARED_MEMORY = 2**30  # containers often have 64 MB, and data-loading workers hand over batches there
WORKERS_LOOKED_AT = 4
LITTLE_DISK = 5 * 10**9
SLOW_DISK = 100e6  # bytes a second
PROBE_BYTES = 256 * 2**20
SYNTHETIC_CLIPS = 8
MARGIN = 1.2  # how much faster than computing the loading of data should be


@dataclass(frozen=True)
class DoctorConfig:
    """Check versions, GPU, disk and data, and predict the bottleneck of training.

    Exit code 0: no problems (perhaps warnings); 1: at least one problem; 2: a wrong command line.
    """

    clips: Path | None = None
    """Clip store to check and to measure with (default: synthetic clips)."""
    logits: tuple[str, ...] = ()
    """Logit stores to check against the clip store, each PATH or PATH:WEIGHT."""
    class_names: Path | None = None
    """Class list for clip stores without one (the PaSST layout)."""
    student: str = "mn10"
    """Student whose training step is measured."""
    clip_seconds: float = 10.0
    """Length of the clips."""
    batch_size: int | None = None
    """Clips in the measured training step (default: 32 on a GPU, 4 on a CPU)."""
    out: Path = Path(".")
    """Folder that runs will be written to; its free space is checked."""
    every_clip: bool = False
    """Decode every clip of the clip store rather than a random sample, however long it takes."""
    seconds: float = 5.0
    """Duration of each measurement."""
    json: bool = False
    """Print the findings as JSON."""

    def __post_init__(self) -> None:
        if not (self.clip_seconds > 0 and self.seconds > 0):
            raise ValueError(f"clip_seconds and seconds must be positive; found {self.clip_seconds} and {self.seconds}")
        if self.batch_size is not None and self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2 (for batch normalisation); found {self.batch_size}")
        if self.logits and self.clips is None:
            raise ValueError("--logits needs --clips, the clip store that the logits are for")
        if self.every_clip and self.clips is None:
            raise ValueError("--every-clip needs --clips")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    topic: str
    status: Status
    found: str
    advice: str = ""
    """What to do about it; empty if there is nothing to do."""
    numbers: dict[str, float] = field(default_factory=dict)


# -- Software and machine ----------------------------------------------------------------------------------------------


def check_versions() -> Iterator[Finding]:
    """Whether the installed packages are those that this one asks for."""
    try:
        requirements = [Requirement(text) for text in metadata.requires("audio-kd") or ()]
    except metadata.PackageNotFoundError:
        yield Finding("versions", "warning", "audio-kd is not installed", "install it with pip install -e .")
        return
    versions, wrong = {"python": platform.python_version()}, []
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            versions[requirement.name] = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(versions[requirement.name], prereleases=True):
            wrong.append(f"{requirement.name} {versions[requirement.name]} (needed: {requirement.specifier})")
    listed = ", ".join(f"{name} {number}" for name, number in versions.items())
    if wrong:
        advice = "install the versions of constraints.txt: pip install -c constraints.txt -e ."
        yield Finding("versions", "problem", f"{'; '.join(wrong)}. All: {listed}", advice)
    else:
        yield Finding("versions", "ok", listed)


def check_companions() -> Iterator[Finding]:
    """Whether torchaudio and torchvision were built for the installed torch."""
    for name in ("torchaudio", "torchvision"):
        try:
            import_module(name)
        except (ImportError, OSError, RuntimeError) as error:  # a shared library or an operator is missing
            found = f"{name} does not fit torch {torch.__version__}: {error}"
            yield Finding(
                name, "problem", found, "install torch, torchaudio and torchvision from one index (docs/install.md)"
            )


def check_gpu() -> Iterator[Finding]:
    """GPUs, and whether PyTorch can compute on them."""
    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    built_for = torch.version.cuda
    if torch.cuda.is_available():
        try:
            for index in range(torch.cuda.device_count()):
                one = torch.ones(64, 64, device=f"cuda:{index}")
                assert float((one @ one).sum()) == 64**3
        except RuntimeError as error:
            advice = "update the driver, or install a PyTorch that was built for this GPU"
            yield Finding("GPU", "problem", f"does not compute: {str(error).splitlines()[0]}", advice)
            return
        described = []
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            described.append(f"{card.name}, {readable_bytes(card.total_memory)}, compute {card.major}.{card.minor}")
        bf16 = "bf16 works" if torch.cuda.is_bf16_supported() else "no bf16: use --mixed-precision fp16"
        yield Finding("GPU", "ok", f"{'; '.join(described)}; CUDA {built_for}; {bf16}")
    elif driver and built_for is None:
        advice = "install PyTorch with CUDA (pip's default on Linux)"
        yield Finding("GPU", "problem", "there is an NVIDIA driver, but this PyTorch is built without CUDA", advice)
    elif driver:
        advice = f"check that nvidia-smi works and that the driver is new enough for CUDA {built_for}"
        yield Finding(
            "GPU", "problem", f"there is an NVIDIA driver, but PyTorch (CUDA {built_for}) finds no GPU", advice
        )
    else:
        advice = "a CPU is enough for small students and tests; pretraining on AudioSet needs a GPU"
        yield Finding("GPU", "warning", "none: training runs on the CPU", advice)


def check_machine(config: DoctorConfig) -> Iterator[Finding]:
    """Cores, shared memory, and room on disk."""
    yield Finding("cores", "ok", f"{cores()} for this process ({platform.machine()})", numbers={"cores": cores()})
    shared = SHARED_MEMORY
    if shared.is_dir():
        room = shutil.disk_usage(shared)
        little = room.free < LITTLE_SHARED_MEMORY
        advice = "batches without room go through pipes, which is slower; give the container more (docker run --shm-size 8g, or --ipc host)"
        found = f"{readable_bytes(room.free)} of {readable_bytes(room.total)} free in {shared} for batches from data-loading workers"
        yield Finding("shared memory", "warning" if little else "ok", found, advice if little else "")
    yield check_open_files()
    folder = config.out.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    advice = "free some space, or write runs to another disk with --out" if free < LITTLE_DISK else ""
    yield Finding("free space", "warning" if advice else "ok", f"{readable_bytes(free)} in {folder}", advice)
    if not os.access(folder, os.W_OK):
        yield Finding("folder", "problem", f"{folder} cannot be written", "choose another folder with --out")


def check_open_files() -> Finding:
    """Whether this process may open enough files for data-loading workers."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    free = (
        math.inf
        if hard == resource.RLIM_INFINITY
        else free_files() + hard - resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    )
    found = "any number" if free == math.inf else f"{max(0, free)} more"
    found += f" may be opened; {WORKERS_LOOKED_AT} workers need {FILES_BESIDE + WORKERS_LOOKED_AT * FILES_OF_A_WORKER}"
    if free < FILES_BESIDE + WORKERS_LOOKED_AT * FILES_OF_A_WORKER:
        advice = "raise the limit (ulimit -n 1024; docker run --ulimit nofile=1024), or use --workers 0"
        return Finding("open files", "problem", found, advice)
    if free < FILES_BESIDE + WORKERS_LOOKED_AT * (FILES_OF_A_WORKER + FILES_OF_SHARED_BATCHES):
        advice = "batches go through pipes, which is slower than shared memory; raise the limit (ulimit -n 1024)"
        return Finding("open files", "warning", found, advice)
    return Finding("open files", "ok", found)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- Data --------------------------------------------------------------------------------------------------------------


def check_clips(config: DoctorConfig, clips: ClipStore) -> Iterator[Finding]:
    """The clip store, its manifest, and as many clips as there is time for; or every clip."""
    empty_classes = len(clips.class_names) - int((clips.class_counts() > 0).sum())
    unlabelled = int((~are_labelled(clips, np.arange(len(clips)))).sum())
    kind = "PCM" if clips.audio_kind == "pcm16" else "encoded files"
    found = f"{len(clips)} clips ({kind}) of {len(clips.class_names)} classes in {clips.path}"
    found += f"; {unlabelled} clips have no labels" if unlabelled else ""
    yield Finding("clip store", "ok", found + (f"; {empty_classes} classes have no clip" if empty_classes else ""))
    try:
        has_manifest = clips.manifest() is not None
        advice = "" if has_manifest else "without a manifest there are no splits and folds; kd pack writes one"
        found = "one row for each clip" if has_manifest else "none beside the clip store"
        yield Finding("manifest", "ok" if has_manifest else "warning", found, advice)
    except ValueError as error:
        yield Finding("manifest", "problem", str(error), "pack the clips again")
    rows = generator(0, "doctor").permutation(len(clips))
    bad: dict[str, str] = {}
    deadline, looked_at = time.perf_counter() + config.seconds, 0
    for row in progress(rows, desc="clips", unit="clip", leave=False, shown=config.every_clip):
        if not config.every_clip and time.perf_counter() > deadline:
            break
        looked_at += 1
        try:
            clips.verify_audio(int(row))
            clips.waveform(int(row), LogMelConfig().sample_rate_hz)
        except BadClipError as error:
            bad[clips.clip_id(int(row))] = error.reason
    numbers = {"clips_looked_at": looked_at, "bad_clips": len(bad)}
    if bad:
        advice = "leave them out with --on-bad-clip skip, or pack the clips again without them"
        advice += "" if config.every_clip else "; --every-clip finds all of them"
        yield Finding("audio", "problem", summary(bad, looked_at, "cannot be used"), advice, numbers)
    else:
        chosen = "all" if looked_at == len(clips) else f"{looked_at} drawn at random"
        yield Finding(
            "audio", "ok", f"{chosen} can be decoded and are unchanged since they were packed", numbers=numbers
        )


def check_logits(config: DoctorConfig, clips: ClipStore) -> Iterator[Finding]:
    """Whether the logits belong to the clips. Their values are what ``kd verify`` checks, which takes longer."""
    teachers = LogitEnsemble.open(config.logits)
    missing = int(teachers.check_against(clips).sum())
    found = f"{len(teachers.stores)} teachers for {len(clips)} clips"
    if missing:
        advice = "run kd teach over this clip store, or choose what to do with them with --missing-logits"
        yield Finding("logits", "warning", f"{found}; {missing} clips have none", advice)
    else:
        yield Finding("logits", "ok", f"{found}, all made from the same audio (kd verify also checks the values)")


def measure_disk(path: Path, seconds: float) -> Iterator[Finding]:
    """Speed of reading pieces of 1 MB from random places of a file, past the cache as far as the system allows."""
    size, piece = path.stat().st_size, 2**20
    places = generator(0, "disk probe").permutation(max(1, size // piece))[: PROBE_BYTES // piece] * piece
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start, total = time.perf_counter(), 0
        for place in places.tolist():
            total += len(os.pread(file.fileno(), piece, place))
            if time.perf_counter() - start > seconds:
                break
        rate = total / max(time.perf_counter() - start, 1e-9)
    slow = rate < SLOW_DISK and total > 8 * piece
    advice = "copy the clip store to a faster (local) disk before training" if slow else ""
    found = f"{readable_bytes(rate)}/s for random reads from {path} ({readable_bytes(total)} read)"
    yield Finding("disk", "warning" if slow else "ok", found, advice, {"disk_bytes_per_second": rate})


# -- Speed -------------------------------------------------------------------------------------------------------------


def made_up_clips(folder: Path, seconds: float) -> ClipStore:
    """A few MP3 clips of noise, in place of a clip store that is not given."""
    rate = LogMelConfig().sample_rate_hz
    clips = [
        ClipRecord(
            f"clip {index}",
            encode(
                generator(0, "doctor clip", 0, index).normal(0, 0.1, round(seconds * rate)).astype("f4"), rate, "mp3"
            ),
            (str(index),),
        )
        for index in range(SYNTHETIC_CLIPS)
    ]
    write_clip_store(folder / "made_up.h5", clips, [str(index) for index in range(SYNTHETIC_CLIPS)])
    return ClipStore.open(folder / "made_up.h5")


def rate_of(work: Callable[[], Any], clips: int, seconds: float, warm_up: int = 1) -> float:
    """Clips a second of repeated ``work`` on so many clips; at least one repetition after the warm-up."""
    for _ in range(warm_up):
        work()
    start, repeats = time.perf_counter(), 0
    while repeats == 0 or time.perf_counter() - start < seconds:
        work()
        repeats += 1
    return repeats * clips / (time.perf_counter() - start)


def measure_speed(config: DoctorConfig, clips: ClipStore) -> Iterator[Finding]:
    """What a worker can load, what a training step can use, and so what training will wait for."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch_size = config.batch_size or (32 if device.type == "cuda" else 4)
    frontend_config = LogMelConfig()
    dataset = TrainingExamples(
        clips,
        np.arange(len(clips)),
        Window(frontend_config.sample_rate_hz, config.clip_seconds),
        frontend=frontend_config,
        augment=AugmentConfig(mixup_alpha=0),
        seed=0,
    )
    usable = usable_examples(dataset, len(clips), batch_size)
    if not usable:
        yield Finding("speed", "problem", "no clip can be decoded, so nothing was measured", "pack the clips again")
        return
    loaded = loading_rate(dataset, [example["row"] for example in usable], config.seconds)
    yield Finding("decoding", "ok", f"{loaded:.0f} clips/s per worker", numbers={"clips_per_second": loaded})

    batch = {
        key: value.to(device)
        for key, value in default_collate([usable[index % len(usable)] for index in range(batch_size)]).items()
    }
    frontend = LogMel(frontend_config).to(device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def hear() -> None:
        with torch.inference_mode():
            frontend(batch["waveform"], batch["band_edges"])
        wait()

    heard = rate_of(hear, batch_size, config.seconds / 2)
    yield Finding("front end", "ok", f"{heard:.0f} clips/s on {device.type}", numbers={"clips_per_second": heard})

    step = training_step(config.student, clips.class_names, frontend_config, batch)

    def train() -> None:
        step()
        wait()

    trained = rate_of(train, batch_size, config.seconds)
    found = f"{trained:.1f} clips/s on {device.type} (front end, forward, backward, in batches of {batch_size})"
    yield Finding(f"training {config.student}", "ok", found, numbers={"clips_per_second": trained})
    yield bottleneck(loaded, trained, cores(), clips.audio_kind)


def usable_examples(dataset: TrainingExamples, num_clips: int, most: int) -> list[dict[str, Any]]:
    """Examples of clips drawn at random, without those that cannot be decoded; at most so many."""
    usable: list[dict[str, Any]] = []
    for row in generator(0, "doctor rows").permutation(num_clips):
        try:
            usable.append(dataset[ClipRequest(0, len(usable), int(row))])
        except BadClipError:
            continue
        if len(usable) == most:
            break
    return usable


def loading_rate(dataset: TrainingExamples, rows: Sequence[int], seconds: float) -> float:
    """Clips a second that one data-loading worker makes ready for training."""
    requests = iter(range(10**9))

    def load() -> None:
        position = next(requests)
        dataset[ClipRequest(0, position, rows[position % len(rows)])]

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a data-loading worker
    loaded = rate_of(load, 1, seconds)
    torch.set_num_threads(before)
    return loaded


def training_step(
    student_name: str, class_names: tuple[str, ...], frontend: LogMelConfig, batch: dict[str, torch.Tensor]
) -> Callable[[], None]:
    """A function that trains a new student on ``batch`` for one step, on the device of the batch."""
    device = batch["waveform"].device
    student = create_student(student_name, len(class_names)).to(device).train()
    label_space = LabelSpace.single(class_names, exclusive=False)
    objective = DistillationObjective(ObjectiveSettings(frontend, label_space, student.embedding_dim))
    learner = Learner(student, objective).to(device).train()
    optimizer = create_optimizer(OptimizerConfig(), student)

    def step() -> None:
        learner(batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bottleneck(loaded: float, trained: float, available_cores: int, audio_kind: str) -> Finding:
    """What training will wait for, from clips a second of one worker and of the training step."""
    needed = math.ceil(MARGIN * trained / loaded)
    numbers = {"workers_needed": needed}
    spare = max(1, available_cores - 1)
    if needed <= spare:
        found = f"computing: {needed} worker{'s' if needed > 1 else ''} can load the data fast enough"
        return Finding("bottleneck", "ok", found, f"train with --workers {needed}", numbers)
    advice = f"train with --workers {spare}; more cores per GPU would help"
    if audio_kind == "encoded":
        advice += ", and so would packing with --audio pcm16, which takes more disk space but needs hardly any decoding"
    found = f"loading data: training needs {needed} workers, but only {spare} cores are free for them"
    return Finding("bottleneck", "warning", found, advice, numbers)


# -- Command -----------------------------------------------------------------------------------------------------------


def examine(config: DoctorConfig) -> list[Finding]:
    """All findings, in the order of the report. ValueError for an unknown student."""
    with torch.device("meta"):
        create_student(config.student, num_classes=1)  # a wrong name shows before anything is measured
    findings = [*check_versions(), *check_companions(), *check_gpu(), *check_machine(config)]
    clips = None
    if config.clips is not None:
        try:
            class_names = read_class_names(config.class_names) if config.class_names else None
            clips = ClipStore.open(config.clips, class_names=class_names)
            findings += check_clips(config, clips)
            findings += measure_disk(config.clips, config.seconds)
        except (ValueError, OSError) as error:
            findings.append(Finding("clip store", "problem", str(error), "create it again with kd pack"))
    if config.logits and clips is not None:
        try:
            findings += check_logits(config, clips)
        except (ValueError, OSError) as error:
            findings.append(Finding("logits", "problem", str(error), "create them again with kd teach"))
    with tempfile.TemporaryDirectory() as folder:
        if clips is None or len(clips) == 0:
            clips = made_up_clips(Path(folder), config.clip_seconds)
            made_up = "no --clips: speed is measured with synthetic MP3 clips"
            findings.append(Finding("clips", "ok", made_up, "give --clips to measure with your own"))
        findings += measure_speed(config, clips)
    return findings


def report(findings: Sequence[Finding]) -> str:
    """The findings for people: a line for each, and below it what to do."""
    width = max(len(finding.topic) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:8} {finding.topic:{width}}  {finding.found}")
        if finding.advice:
            lines.append(f"{'':8} {'':{width}}  → {finding.advice}")
    counts = {status: sum(finding.status == status for finding in findings) for status in ("problem", "warning")}
    return "\n".join([*lines, f"{counts['problem']} problems, {counts['warning']} warnings"])


def doctor(config: DoctorConfig) -> int:
    """Prints the findings; 1 if one of them is a problem, else 0."""
    torch.set_flush_denormal(True)
    findings = examine(config)
    print(json_text([asdict(finding) for finding in findings], indent=2) if config.json else report(findings))
    return int(any(finding.status == "problem" for finding in findings))


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(lambda: doctor(parse(DoctorConfig, arguments, "kd doctor")))


if __name__ == "__main__":
    raise SystemExit(main())
