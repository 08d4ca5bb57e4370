"""What a distillation will take, from a few measured steps: for ``kd distill --dry-run``."""

import time
from collections.abc import Callable, Sequence

import torch

from audio_datasets.system.text_tables import text_table
from audio_datasets.tasks.task import TaskClips, usable_durations
from kd.distilling.arms import Distillation
from kd.stages.finetuning_config import window_for
from kd.training.transfer import Start, starting_student
from students import create_student
from students.card import read_card
from students.catalog import family_of
from students.frontend import LogMel
from students.interface import Student

MEASURED_STEPS = 2
TEACHER_SECONDS = 10.0


def plan_in_words(clips: TaskClips, distillations: Sequence[Distillation]) -> str:
    """A table of what is to be done, with time and disk space as estimated on this machine."""
    config = distillations[0].config
    durations = usable_durations(clips, config.on_bad_clip)
    seconds = sum(durations)
    window = config.clip_seconds or window_for(durations, "pad")
    step = seconds_per_step(distillations[0], len(clips.class_names), window)
    heard = seconds_per_teacher_clip(distillations[0])
    passes = 1 + (config.teacher_epochs * 3 if config.teacher == "finetune" else 0)
    rows = [("trained for", "labelled", "unlabelled", "test clips", "steps per student", "students", "minutes")]
    total = 0.0
    for one in distillations:
        students = 2 if config.labels_alone and one.is_tested else 1
        part = one.clip_list.part
        minutes = (students * one.steps * step + (len(clips) + passes * len(part.train)) * heard) / 60
        total += minutes
        rows.append(
            (
                one.clip_list.name or "use",
                *map(str, (len(part.train), len(part.unlabelled), len(part.test), one.steps, students)),
                f"{minutes:.1f}",
            )
        )
    disk = seconds * 2 * config.frontend.sample_rate_hz + sum(clip.path.stat().st_size for clip in clips.clips)
    return (
        f"{text_table(rows, '<>>>>>>')}\n\n{len(clips)} clips, {seconds / 3600:.2f} hours of sound. Measured here: {1000 * step:.0f} ms for "
        f"a step of {config.batch_size} clips, {1000 * heard:.0f} ms for the teacher to hear a clip.\n"
        f"About {max(1, round(total))} minutes (evaluation included roughly) and {disk / 1e6:,.0f} MB in {config.out}. Nothing was written."
    )


def seconds_per_step(one: Distillation, classes: int, window_seconds: float) -> float:
    """Seconds for a training step of the student on random sound."""
    config = one.config
    frontend = LogMel(config.frontend)
    start = Start(config.student, family_of(config.student).options_for_training({}, 1))
    student = starting_student(start, [str(index) for index in range(classes)], config.frontend, seed=config.seed)
    samples = round(window_seconds * config.frontend.sample_rate_hz)
    waveform = torch.randn(config.batch_size, samples)
    return fastest(lambda: student(frontend(waveform)).logits.mean().backward())


def seconds_per_teacher_clip(one: Distillation) -> float:
    """Seconds that the teacher needs for ten seconds of random sound."""
    name, folder = one.start.name, one.start.run_folder
    card = read_card(folder) if folder is not None else None
    student: Student = (
        create_student(name, num_classes=1)
        if card is None
        else create_student(card.config.name, 1, **card.config.options)
    )
    config = family_of(name).published_frontend() if card is None else card.frontend
    frontend = LogMel(config).eval()
    waveform = torch.randn(1, round(TEACHER_SECONDS * config.sample_rate_hz))
    with torch.inference_mode():
        return fastest(lambda: student.eval()(frontend(waveform)))


def fastest(function: Callable[[], object]) -> float:
    """Seconds for one call, the least of a few after one to warm up."""
    torch.set_flush_denormal(True)
    function()
    found = []
    for _ in range(MEASURED_STEPS):
        started = time.perf_counter()
        function()
        found.append(time.perf_counter() - started)
    return min(found)
