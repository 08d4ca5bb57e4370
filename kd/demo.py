"""The main job on embedded data: synthetic scenes → teachers → stored logits → students with and without distillation.

Every stage is one of our ordinary commands, printed before it is run, so the demo is also the example to copy from. A demo
that was stopped goes on when it is called again.
"""

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from audio_datasets.audio.synth import SynthConfig, write_source
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.manifest import select_rows
from audio_datasets.system.command import parse, run_command
from audio_datasets.system.files import read_json, write_json
from audio_datasets.system.text_tables import text_table
from kd import cli
from kd.evaluation.metrics import tagging_metrics
from students.card import load_student
from students.profile import profile_student
from teacher_logits.stores.ensemble import LogitEnsemble

TEACHER_SEEDS = (11, 12)


@dataclass(frozen=True)
class DemoConfig:
    """Run every stage on synthetic sound scenes and compare a distilled student with one trained on labels alone."""

    out: Path = Path("demo")
    """Folder for all results. The same command continues a demo that was stopped."""
    train_clips: int = 1500
    """Number of training scenes. Some of their labels are missing, as in AudioSet."""
    test_clips: int = 500
    """Number of test scenes, which are fully labelled."""
    clip_seconds: float = 2.0
    """Length of a scene."""
    teacher: str = "mn02"
    """Student from the catalog to use as the teacher; two are trained."""
    student: str = "mn01"
    """Student to train with and without the teachers."""
    teacher_epochs: int = 30
    """Epochs for each teacher."""
    student_epochs: int = 12
    """Epochs for each student."""
    seed: int = 0
    """Seed of the scenes and of both students."""
    workers: int = 1
    """Data-loading processes."""


def demo(config: DemoConfig) -> list[dict]:
    """Runs all stages, prints the table, and returns its rows."""
    started = time.monotonic()
    out, clips, logits = config.out, config.out / "clips.h5", config.out / "logits"
    pack_scenes(config, clips)
    teachers = [out / f"teacher-{number}" for number in range(1, len(TEACHER_SEEDS) + 1)]
    for folder, seed in zip(teachers, TEACHER_SEEDS, strict=True):
        pretrain(
            config,
            clips,
            folder,
            config.teacher,
            "--label-weight",
            1,
            "--epochs",
            config.teacher_epochs,
            "--seed",
            seed,
        )
    run("teach", "--clips", clips, "--teacher", *teachers, "--out", logits, "--workers", config.workers)
    stores = [logits / f"{folder.name}.h5" for folder in teachers]
    run("verify", "--clips", clips, "--logits", *stores)

    students = {"labels only": out / "student-labels", "distilled": out / "student-distilled"}
    for folder, loss in zip(students.values(), (("--label-weight", 1), ("--logits", *stores)), strict=True):
        pretrain(config, clips, folder, config.student, *loss, "--epochs", config.student_epochs, "--seed", config.seed)

    models = {
        **{f"teacher {number}": folder for number, folder in enumerate(teachers, 1)},
        **{f"student, {how}": folder for how, folder in students.items()},
    }
    rows = [tested(config, clips, name, folder) for name, folder in models.items()]
    rows.insert(len(teachers), {"model": "ensemble of both", **ensemble_metrics(clips, stores), "folder": str(logits)})
    write_json(out / "results.json", rows)
    print("\n" + table(rows))
    gain = rows[-1]["mAP"] - rows[-2]["mAP"]
    print(
        f"\nDistillation {'gains' if gain > 0 else 'loses'} {abs(gain):.3f} mAP over labels alone, at the same steps and "
        f"seed.\nThis took {(time.monotonic() - started) / 60:.1f} minutes; the table is also in {out / 'results.json'}"
    )
    return rows


def pack_scenes(config: DemoConfig, clips: Path) -> None:
    """Writes the synthetic scenes, unless they are there, and packs them into the clip store ``clips``."""
    manifest = config.out / "scenes" / "manifest.csv"
    if not manifest.exists():
        print(f"writing {config.train_clips} + {config.test_clips} synthetic sound scenes to {manifest.parent}")
        scenes = SynthConfig(seed=config.seed, clip_seconds=config.clip_seconds, label_dropout=0.3)
        write_source(
            manifest.parent, scenes, {"train": config.train_clips, "test": config.test_clips}, show_progress=True
        )
    run("pack", manifest, "--out", clips, "--audio", "pcm16", "--class-names", manifest.with_name("class_names.txt"))


def pretrain(config: DemoConfig, clips: Path, folder: Path, student: str, *arguments: object) -> None:
    """``kd pretrain`` on the training scenes, with the settings that all models of the demo share."""
    run(
        *("pretrain", "--out", folder, "--student", student, *arguments),
        *("--clips", clips, "--split", "train", "--clip-seconds", config.clip_seconds, "--batch-size", 32),
        # Half the bands and frames: fast, and good enough.
        *("--n-mels", 64, "--hop-samples", 640, "--learning-rate", 3e-3),
        *("--workers", config.workers, "--log-every-steps", 10),
    )


def tested(config: DemoConfig, clips: Path, name: str, folder: Path) -> dict:
    """The row of one model in the table: its size, and its metrics on the test scenes."""
    results = folder / "test.json"
    run(
        *("evaluate", "--tagger", folder, "--clips", clips, "--split", "test", "--out", results),
        *("--workers", config.workers),
    )
    return {"model": name, **size_of(folder), **read_json(results), "folder": str(folder)}


def run(command: str, *arguments: object) -> None:
    """Prints and runs ``kd COMMAND ARGUMENTS``.

    Raises:
        ValueError: the command failed (it has said why).
    """
    words = [command, *map(str, arguments)]
    print(f"\n$ kd {shlex.join(words)}", flush=True)
    code = cli.main(words)
    if code != 0:
        raise ValueError(f"kd {command} ended with exit code {code}")


def size_of(folder: Path) -> dict[str, float]:
    """Parameters, and MACs for ten seconds of sound, of the student in a run folder."""
    student = load_student(folder)
    card = student.card
    profile = profile_student(student, card.frontend.n_mels, card.frontend.frames(10 * card.frontend.sample_rate_hz))
    return {"parameters": profile.parameters, "macs": profile.macs}


def ensemble_metrics(clips_path: Path, stores: Sequence[Path]) -> dict[str, float]:
    """Test metrics of the ensemble, from its stored logits alone."""
    clips = ClipStore.open(clips_path)
    rows = select_rows(clips, split="test")
    logits, _ = LogitEnsemble.open(stores).read([clips.clip_id(int(row)) for row in rows])
    return tagging_metrics(clips.targets(rows), logits, clips.class_names).summary()


def table(rows: Sequence[dict]) -> str:
    """The results as aligned text."""
    cells = [("model", "parameters", "MMACs/10 s", "mAP", "ROC AUC", "d′", "where")]
    for row in rows:
        size = (f"{row['parameters']:,}", f"{row['macs'] / 1e6:.1f}") if "parameters" in row else ("", "")
        measured = (f"{row['mAP']:.3f}", f"{row['roc_auc']:.3f}", f"{row['d_prime']:.2f}")
        cells.append((row["model"], *size, *measured, str(row["folder"])))
    return text_table(cells, "<>>>>><")


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(lambda: demo(parse(DemoConfig, arguments, "kd demo")))


if __name__ == "__main__":
    raise SystemExit(main())
