"""The main job on embedded data: a big network that knows the classes, a label for each class, many recordings without, and a small student.

Every stage is one of our ordinary commands, printed before it runs, so the demo is also the example to copy from. A demo that
was stopped continues when it is called again.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from audio_datasets.audio.synth import CLASS_NAMES, SynthConfig, write_source
from audio_datasets.system.command import parse, run_command
from audio_datasets.system.files import read_json
from kd.distilling.arms import DISTILLED, LABELS_ALONE, TEACHER
from kd.distilling.commands import run

# A quarter of the spectrogram that students have otherwise: fast, and enough for these sounds.
FRONTEND = ("--n-mels", 64, "--hop-samples", 640)
SOUND_SEED = 1_000_000
"""Added to the seed for the user's recordings, so that they are others than those that the teacher was trained on."""


@dataclass(frozen=True)
class DemoConfig:
    """Distil a student for sounds of which few are labelled, and compare it with one that learnt from the labels alone.

    All sounds are synthetic. First a teacher is trained on labelled scenes, as public networks are on AudioSet.
    """

    out: Path = Path("demo")
    """Folder to write everything into; a demo that was stopped continues here."""
    scenes: int = 2000
    """Labelled scenes to train the teacher on."""
    recordings: int = 1200
    """Recordings to train the students on, nearly all without labels."""
    test_recordings: int = 320
    """Labelled recordings to test on."""
    labels_per_class: int = 1
    """Labels for each of the 16 kinds of sound."""
    clip_seconds: float = 1.0
    """Length of a scene or recording."""
    teacher: str = "mn02"
    """Network to train as the teacher."""
    student: str = "mn01"
    """Student to distil into."""
    teacher_epochs: int = 16
    """Epochs of the teacher."""
    steps: int = 1000
    """Training steps of each student."""
    seed: int = 0
    """Seed of the sounds, of the choice of labels and of all training."""
    workers: int = 1
    """Data-loading processes."""


def demo(config: DemoConfig) -> dict:
    """Runs all stages and returns the results of the distillation."""
    started = time.monotonic()
    out, teacher, distilled = config.out, config.out / "teacher", config.out / "distill"
    print(
        f"1. A teacher is trained on labelled scenes of {len(CLASS_NAMES)} kinds of sound, as others are on AudioSet."
    )
    scenes = SynthConfig(
        seed=config.seed, clip_seconds=config.clip_seconds, max_events=2, min_snr_db=0.0, label_dropout=0.1
    )
    manifest = written(out / "scenes", scenes, {"train": config.scenes})
    run(
        *("pack", manifest, "--out", out / "scenes.h5", "--audio", "pcm16", "--class-names"),
        manifest.with_name("class_names.txt"),
    )
    run(
        *("pretrain", "--clips", out / "scenes.h5", "--out", teacher, "--student", config.teacher, "--label-weight", 1),
        *("--epochs", config.teacher_epochs, "--seed", config.seed, "--batch-size", 32, "--learning-rate", 3e-3),
        *("--clip-seconds", config.clip_seconds, *FRONTEND, "--workers", config.workers, "--log-every-steps", 10),
    )
    print(
        f"\n2. You have {config.recordings} recordings of one sound each; of each kind, {config.labels_per_class} "
        f"{'is' if config.labels_per_class == 1 else 'are'} labelled."
    )
    sounds = SynthConfig(seed=config.seed + SOUND_SEED, clip_seconds=config.clip_seconds, max_events=1, min_snr_db=6.0)
    manifest = written(out / "recordings", sounds, {"train": config.recordings, "test": config.test_recordings})
    run(
        *("distill", "--data", manifest, "--teacher-weights", teacher, "--teacher", "given", "--out", distilled),
        *("--labels-per-class", config.labels_per_class, "--label-seed", config.seed, "--seed", config.seed),
        *("--student", config.student, "--steps", config.steps, "--clip-seconds", config.clip_seconds),
        *(*FRONTEND, "--learning-rate", 4e-3, "--workers", config.workers),
    )
    print("\n3. The student tags a recording that nobody has labelled.")
    run("tag", out / "recordings" / "audio" / "test" / "test-000000.wav", "--tagger", distilled / DISTILLED)
    results = read_json(distilled / "results.json")
    print(f"\n{in_words(results)}\nAll of this took {(time.monotonic() - started) / 60:.1f} minutes.")
    print(f"The reports: {distilled / 'report.html'}, {distilled / DISTILLED / 'report.html'}")
    return results


def written(folder: Path, config: SynthConfig, clips_per_split: dict[str, int]) -> Path:
    """The manifest of synthetic sounds, which are written unless they are there."""
    manifest = folder / "manifest.csv"
    if not manifest.exists():
        print(f"writing {' + '.join(map(str, clips_per_split.values()))} synthetic clips to {folder}")
        write_source(folder, config, clips_per_split, show_progress=True)
    return manifest


def in_words(results: dict) -> str:
    """The gain of distillation, and what the teacher itself reaches."""
    alone, distilled, teacher = (results[arm]["mean"] for arm in (LABELS_ALONE, DISTILLED, TEACHER))
    return (
        f"On the labels alone the student is right about {alone:.1%} of the test recordings; distilled, about {distilled:.1%} "
        f"({100 * (distilled - alone):+.1f} points, after the same number of steps). Its teacher reaches {teacher:.1%}."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(lambda: demo(parse(DemoConfig, arguments, "kd demo")))


if __name__ == "__main__":
    raise SystemExit(main())
