"""Kills ``kd distill`` at random moments, gives the same command again, and compares all that came of it with an uninterrupted run.

    python tests/robustness/kill_distill.py --kills 20

A folder is killed several times (``--kills-per-run``) before it may end. Each time a moment is drawn evenly from the time that an
uninterrupted run takes, divided by the number of kills; a run that ends before its moment counts no kill. In turn the process is
killed with all its workers, killed alone, and sent SIGTERM. Sounds are synthetic, the pretrained network is a random mn01. Exits with 1
if a file differs by a byte or a command fails, whose output it shows.
"""

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import psutil
import soundfile
import torch

from audio_datasets.audio.synth import SynthConfig, synthesise_clip
from audio_datasets.system.command import STOPPED, parse
from students import create_student, save_student
from students.frontend import LogMelConfig

COMPARED = (
    *("teacher/probe/student.safetensors", "labels_alone/student.safetensors", "distilled/student.safetensors"),
    *("labels_alone/predictions.npz", "distilled/predictions.npz", "logits/teacher.h5", "all_clips.h5", "results.json"),
)


@dataclass(frozen=True)
class KillConfig:
    """Kill kd distill again and again."""

    kills: int = 20
    """How many kills."""
    kills_per_run: int = 5
    """Kills before a run may end."""
    steps: int = 160
    """Training steps of each student."""
    seed: int = 0
    """Seed of the moments."""


class Scene:
    """A folder of sounds and a pretrained network, and the command that distils from them."""

    def __init__(self, folder: Path, config: KillConfig) -> None:
        self.folder, self.steps, self.output = folder, config.steps, folder / "output.txt"
        sounds = SynthConfig(clip_seconds=0.5, max_events=1, min_snr_db=10.0)
        found: dict[str, int] = {}
        for index in range(400):
            clip = synthesise_clip(sounds, index)
            (name,) = clip.labels
            found[name] = found.get(name, 0) + 1
            place = name if found[name] <= 6 else "unlabelled"
            if name not in ("Siren", "Rising chirp", "Beeps") or found[name] > 14:
                continue
            path = folder / "sounds" / place / f"{clip.clip_id}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, clip.waveform, sounds.sample_rate_hz, subtype="PCM_16")
        torch.manual_seed(0)
        network = create_student("mn01", 2)
        (folder / "network").mkdir()
        save_student(folder / "network", network, ["x", "y"], LogMelConfig(), {"clip_seconds": 0.5})

    def start(self, out: Path) -> subprocess.Popen:
        """Starts ``kd distill`` into ``out``, in a process group of its own; what it prints goes into the file ``output``."""
        words = [
            *(
                "--data",
                str(self.folder / "sounds"),
                "--teacher-weights",
                str(self.folder / "network"),
                "--out",
                str(out),
            ),
            *("--steps", str(self.steps), "--batch-size", "8", "--workers", "1", "--n-mels", "32"),
        ]
        with open(self.output, "wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "kd.cli", "distill", *words],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )


def kill(process: subprocess.Popen, what: str) -> None:
    """SIGTERM or SIGKILL for a process, or SIGKILL for it and all below it; returns when it has ended."""
    if what == "all":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.send_signal(signal.SIGTERM if what == "SIGTERM" else signal.SIGKILL)
    process.wait()
    for other in psutil.process_iter(["pid"]):  # workers of a process that was killed alone see it within seconds
        try:
            if os.getpgid(other.pid) == process.pid:
                other.wait(timeout=60)
        except (ProcessLookupError, psutil.Error):
            continue


def digests(out: Path) -> dict[str, str]:
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in COMPARED}


def step_of(out: Path) -> str:
    """The last trace of a run on disk."""
    files = [path for path in out.rglob("*") if path.is_file()]
    return str(max(files, key=lambda path: path.stat().st_mtime).relative_to(out)) if files else "nothing"


def main(arguments: Sequence[str] | None = None) -> int:
    config = parse(KillConfig, arguments, "kill_distill.py")
    random = Random(config.seed)
    with tempfile.TemporaryDirectory() as name:
        scene = Scene(Path(name), config)
        whole = scene.folder / "whole"
        started = time.monotonic()
        if scene.start(whole).wait() != 0:
            print(scene.output.read_text(errors="replace")[-5000:])
            return 1
        seconds = time.monotonic() - started
        expected = digests(whole)
        print(f"uninterrupted: {seconds:.0f} s")
        print("| kill | how | after s | exit code | last file written |")
        print("|---|---|---|---|---|")
        failures = done = runs = 0
        while done < config.kills:
            out = scene.folder / f"killed-{runs}"
            runs += 1
            left = min(config.kills_per_run, config.kills - done)
            while left:
                what = ("all", "alone", "SIGTERM")[done % 3]
                moment = random.uniform(0, 2 * seconds / config.kills_per_run)
                run = scene.start(out)
                try:
                    code = run.wait(moment)
                except subprocess.TimeoutExpired:
                    kill(run, what)
                    done, left = done + 1, left - 1
                    # A signal may come when all is done, and SIGTERM is then too late to stop anything.
                    allowed = (-signal.SIGKILL, STOPPED, *((0,) if (out / "results.json").is_file() else ()))
                    failures += run.returncode not in allowed
                    print(f"| {done} | {what} | {moment:.1f} | {run.returncode} | {step_of(out)} |", flush=True)
                else:
                    failures += code != 0
                    break
            code = scene.start(out).wait()
            different = [] if code else [name for name, digest in digests(out).items() if digest != expected[name]]
            failures += bool(code or different)
            told = (
                f"exit code {code}" if code else f"differs: {', '.join(different)}" if different else "all files equal"
            )
            print(f"| | run {runs} to its end | | {code} | {told} |", flush=True)
            if code:
                print(scene.output.read_text(errors="replace")[-5000:], flush=True)
    print(f"{done} kills in {runs} runs, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
