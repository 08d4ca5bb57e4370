"""Files that are small outside and huge inside, through every command that reads such files. Memory and time are measured.

    python tests/robustness/bombs.py                     # all, an hour or more
    python tests/robustness/bombs.py --only flac onnx    # those with one of these words in their names

Each command is a process of its own. It must end in time, with exit code 0 or 2, without a traceback, and no process of it may
have held more than 1.5 GB. Prints a table in Markdown; exit code 1 if anything failed. The short form is
tests/commands/test_bombs.py.
"""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import bomb_files
import numpy as np

import kd  # noqa: F401 - our packages first: tests/ has folders of the same names
import students  # noqa: F401
import teacher_logits  # noqa: F401
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.system.command import parse, run_command

TESTS = Path(__file__).parents[1]
sys.path.append(str(TESTS))
from conftest import write_openmic_layout, write_own_folder, write_tiny_logits, write_tiny_store  # noqa: E402

MOST_BYTES = 1.5e9
STOPPED_BYTES = 3e9
"""A command that takes more is ended, since the machine has to live on."""


@dataclass(frozen=True)
class BombsConfig:
    """Send files that are small outside and huge inside through our commands."""

    only: tuple[str, ...] = ()
    """Words of which a case's name must have one; all cases if left out."""
    seconds: float = 1200.0
    """Time that one command may take. Decoding and resampling 24 hours takes minutes."""
    work: Path | None = None
    """Folder for the files, which are kept there; a temporary one if left out."""


# -- The files that are right ------------------------------------------------------------------------------------------


class Place:
    """A folder with a clip store, logits, a run, a folder of sounds, and bombs as they are asked for."""

    def __init__(self, folder: Path) -> None:
        from students import create_student
        from students.card import save_student
        from students.frontend import LogMelConfig

        self.folder = folder
        self.clips = folder / "good" / "clips.h5"
        self.run = folder / "good" / "run"
        self.sounds = folder / "good" / "sounds"
        self.logits = self.clips.with_name("logits.h5")
        if not self.logits.exists():
            self.clips.parent.mkdir(parents=True, exist_ok=True)
            write_tiny_store(self.clips)
            names = ClipStore.open(self.clips).class_names
            save_student(self.run, create_student("mn01", 3), names, LogMelConfig(), {"clip_seconds": 0.5})
            write_own_folder(self.sounds)
            write_tiny_logits(self.logits, self.clips)

    def bomb(self, name: str, make: Callable[..., Path], *args: object, **options: object) -> Path:
        path = self.folder / "bombs" / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f"unfinished {path.name}")
            make(aside, *args, **options)
            aside.rename(path)
        return path

    def sounds_with(self, bomb: Path) -> Path:
        """A folder of sounds, one of which is the bomb."""
        folder = self.folder / "sounds" / bomb.stem
        if not folder.exists():
            shutil.copytree(self.sounds, folder)
            (folder / "pump" / bomb.name).symlink_to(bomb)
        return folder

    def run_with(self, name: str, content: Path | str) -> Path:
        """A run folder, one file of which is replaced."""
        folder = self.folder / "runs" / f"{name} {content.name if isinstance(content, Path) else len(content)}"
        if not folder.exists():
            shutil.copytree(self.run, folder)
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(content) if isinstance(content, Path) else (folder / name).write_text(content)
        return folder

    def text(self, name: str, content: str | bytes) -> Path:
        def write(path: Path) -> Path:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
            return path

        return self.bomb(name, write)

    def out(self, name: str) -> Path:
        folder = self.folder / "out"
        folder.mkdir(exist_ok=True)
        path = folder / name
        shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(f"{path}.partial", ignore_errors=True)
        for beside in folder.glob(f"{path.stem}*"):  # manifest and lists
            beside.unlink()
        return path


Cases = dict[str, Callable[[], list[object]]]


def audio_cases(place: Place) -> Cases:
    bombs = {
        "flac of 24 h": lambda: place.bomb("silence.flac", bomb_files.silent_flac),
        "flac that claims 2^36 samples": lambda: place.bomb("claim.flac", bomb_files.silent_flac, 0.001, 2**36 - 1),
        "sparse wav of 4 GB": lambda: place.bomb("sparse.wav", bomb_files.sparse_wav),
        "mp3 of 3 h": lambda: place.bomb("long.mp3", bomb_files.long_mp3),
    }
    cases: Cases = {}
    for name, make in bombs.items():
        for audio in ("keep", "flac", "mp3", "pcm16"):
            cases[f"{name}: pack {audio}"] = lambda make=make, audio=audio: [
                "pack",
                place.sounds_with(make()),
                "--out",
                place.out("packed.h5"),
                "--audio",
                audio,
                "--workers",
                1,
            ]
        cases[f"{name}: finetune"] = lambda make=make: [*finetune(place, place.sounds_with(make()))]
        cases[f"{name}: finetune --cache"] = lambda make=make: [
            *finetune(place, place.sounds_with(make())),
            "--cache",
            place.out("cache"),
        ]
        cases[f"{name}: tag"] = lambda make=make: ["tag", "--tagger", place.run, make()]
    for name, file in (("mp3 of 3 h", "long.mp3"), ("flac of 24 h", "silence.flac")):
        cases[f"{name}: packed, evaluate"] = lambda name=name, file=file: [
            "evaluate",
            "--tagger",
            place.run,
            "--clips",
            packed(place, bombs[name]()),
            "--clip-seconds",
            600,
            "--batch-size",
            1,
            "--workers",
            0,
        ]
        cases[f"{name}: packed, teach"] = lambda name=name, file=file: [
            "teach",
            "--clips",
            packed(place, bombs[name]()),
            "--teacher",
            place.run,
            "--out",
            place.out("taught"),
            "--workers",
            0,
        ]
    return cases


def packed(place: Place, bomb: Path) -> Path:
    """A store of the bomb's bytes and a short clip. Not through `kd pack`, which would decode all of it."""
    from audio_datasets.audio.codec import encode
    from audio_datasets.stores.clip_writer import ClipRecord, write_clip_store

    def write(path: Path) -> Path:
        names = ClipStore.open(place.clips).class_names
        short = encode(np.full(16_000, 0.1, np.float32), 32_000, "flac")
        records = [ClipRecord("long", bomb.read_bytes(), names[:2]), ClipRecord("short", short, names[1:])]
        write_clip_store(path, records, names)
        return path

    return place.bomb(f"{bomb.stem}-packed.h5", write)


def finetune(place: Place, data: Path, *options: object) -> list[object]:
    return [
        "finetune", "--task", "folder", "--data", data, "--weights", place.run, "--out", place.out("finetuned"),
        "--epochs", 1, "--clip-seconds", 0.5, "--batch-size", 4, "--workers", 0, *options,
    ]  # fmt: skip


def weight_cases(place: Place) -> Cases:
    weights = {
        "deflated .pt": lambda: place.bomb("deflated.pt", bomb_files.deflated_checkpoint),
        "slow key in a .pt": lambda: place.bomb("slow.pt", bomb_files.slow_checkpoint),
        "wide tensor in a .pt": lambda: place.bomb(
            "wide.pt", bomb_files.stored_checkpoint, {"weight": ("0", 1, (10**9,), (0,))}
        ),
        "many wide tensors in a .pt": lambda: place.bomb(
            "many.pt",
            bomb_files.stored_checkpoint,
            {f"weight{n}": ("0", 1, (10**7,), (0,)) for n in range(1000)},
        ),
        "sparse .safetensors": lambda: place.bomb("sparse.safetensors", bomb_files.sparse_safetensors),
    }
    cases: Cases = {}
    for name, make in weights.items():
        cases[f"{name}: pretrain --weights"] = lambda make=make: [*pretrain(place), "--weights", make()]
        cases[f"{name}: finetune --weights"] = lambda make=make: [
            "finetune",
            "--task",
            "folder",
            "--data",
            place.sounds,
            "--out",
            place.out("finetuned"),
            "--student",
            "mn01",
            "--weights",
            make(),
            "--epochs",
            1,
        ]
        cases[f"{name}: tag"] = lambda make=make: ["tag", "--tagger", f"mn01@{make()}", place.sounds]
        cases[f"{name}: export"] = lambda make=make: [
            "export",
            f"mn01@{make()}",
            "--out",
            place.out("export"),
            "--class-names",
            place.text("classes.txt", "a\nb\nc\n"),
        ]
        cases[f"{name}: teach passt"] = lambda make=make: [
            "teach",
            "--clips",
            place.clips,
            "--teacher",
            f"passt@{make()}",
            "--out",
            place.out("taught"),
        ]
    sparse = weights["sparse .safetensors"]
    for command in ("evaluate", "tag", "export", "teach", "report", "compare", "inspect"):
        cases[f"sparse .safetensors in a run: {command}"] = lambda command=command: of_run(
            place, command, place.run_with("student.safetensors", sparse())
        )
    return cases


def of_run(place: Place, command: str, run: Path) -> list[object]:
    return {
        "evaluate": ["evaluate", "--tagger", run, "--clips", place.clips],
        "tag": ["tag", "--tagger", run, place.sounds],
        "export": ["export", run, "--out", place.out("export")],
        "teach": ["teach", "--clips", place.clips, "--teacher", run, "--out", place.out("taught")],
        "report": ["report", run],
        "compare": ["compare", run, run, "--out", place.out("compared.html")],
        "inspect": ["inspect", "--tagger", run, "--clips", place.clips, "--out", place.out("inspected")],
    }[command]


def pretrain(place: Place, clips: Path | None = None) -> list[object]:
    return [
        "pretrain", "--clips", clips or place.clips, "--label-weight", 1, "--student", "mn01", "--out",
        place.out("pretrained"), "--epochs", 1, "--batch-size", 4, "--clip-seconds", 0.5, "--workers", 0,
    ]  # fmt: skip


def table_cases(place: Place) -> Cases:
    json_bomb = lambda: place.text("nested.json", bomb_files.nested_json())  # noqa: E731
    cases: Cases = {}
    for command in ("evaluate", "tag", "export", "teach", "report", "compare", "inspect"):
        cases[f"nested JSON as student.json: {command}"] = lambda command=command: of_run(
            place, command, place.run_with("student.json", bomb_files.nested_json())
        )
    for command in ("report", "compare"):
        for name in ("results.json", "config.json", "metrics.jsonl", "evaluation.json"):
            cases[f"nested JSON as {name}: {command}"] = lambda command=command, name=name: of_run(
                place, command, place.run_with(name, bomb_files.nested_json())
            )
        cases[f"deflated .npz as predictions: {command}"] = lambda command=command: of_run(
            place, command, place.run_with("predictions.npz", place.bomb("w.npz", bomb_files.deflated_npz, "logits"))
        )
    cases["nested JSON as class list: pack"] = lambda: [
        "pack",
        place.sounds,
        "--out",
        place.out("packed.h5"),
        "--class-names",
        json_bomb(),
        "--workers",
        1,
    ]
    cases["nested JSON as class map: teach"] = lambda: [
        *of_run(place, "teach", place.run),
        "--class-map",
        json_bomb(),
    ]
    array = lambda: place.bomb("rows.npy", lambda path: np.save(open(path, "wb"), np.full((4, 3), -2.0)))  # noqa: E731, SIM115
    for name, content in (
        ("slow key in a pickled index", bomb_files.slow_pickle),
        ("endless message from a pickled index", bomb_files.repeating_pickle),
    ):
        cases[f"{name}: import-logits"] = lambda name=name, content=content: [
            "import-logits",
            "--logits",
            array(),
            "--index",
            place.text(f"{len(name)}.pkl", content()),
            "--clips",
            place.clips,
            "--out",
            place.out("imported.h5"),
        ]
    cases["nested JSON as index: import-logits"] = lambda: [
        "import-logits",
        "--logits",
        array(),
        "--index",
        json_bomb(),
        "--clips",
        place.clips,
        "--out",
        place.out("imported.h5"),
    ]
    cases["deflated .npz of OpenMIC: pack"] = lambda: ["pack", openmic(place), "--out", place.out("packed.h5")]
    cases["deflated .npz of OpenMIC: finetune"] = lambda: [
        "finetune",
        "--task",
        "openmic",
        "--data",
        openmic(place),
        "--out",
        place.out("finetuned"),
        "--student",
        "mn01",
    ]
    table = lambda: place.bomb("rows.parquet", bomb_files.parquet_of_one_row, 2 * 10**8)  # noqa: E731
    cases["parquet of 2 * 10^8 rows: pack"] = lambda: ["pack", table(), "--out", place.out("packed.h5")]
    cases["parquet of 2 * 10^8 rows: finetune"] = lambda: [
        "finetune",
        "--task",
        "manifest",
        "--data",
        table(),
        "--out",
        place.out("finetuned"),
        "--student",
        "mn01",
    ]
    return cases


def openmic(place: Place) -> Path:
    def write(folder: Path) -> None:
        write_openmic_layout(folder)
        with np.load(folder / "openmic-2018.npz", allow_pickle=True) as good:
            others = {name: good[name] for name in ("Y_true", "Y_mask", "sample_key")}
        bomb_files.deflated_npz(folder / "openmic-2018.npz", "X", {**others, "sample_rate": np.zeros(1)})

    return place.bomb("openmic", write)


def store_cases(place: Place) -> Cases:
    cases: Cases = {}
    for layout in ("unwritten", "chunked", "sparse"):
        clips = lambda layout=layout: place.bomb(  # noqa: E731
            f"{layout}-clips.h5", bomb_files.clip_store_of_nothing, layout=layout
        )
        logits = lambda layout=layout: place.bomb(  # noqa: E731
            f"{layout}-logits.h5", bomb_files.logit_store_of_nothing, layout=layout
        )
        name = f"{layout} store of 10^9 clips"
        cases |= of_store(place, name, clips)
        cases[f"{name}, logits: verify"] = lambda logits=logits: [
            "verify",
            "--clips",
            place.clips,
            "--logits",
            logits(),
        ]
        cases[f"{name}, logits: compact-logits"] = lambda logits=logits: [
            "compact-logits",
            "--logits",
            logits(),
            "--out",
            place.out("compact.h5"),
            "--keep",
            1,
        ]
        cases[f"{name}, logits: pretrain"] = lambda logits=logits: [
            *pretrain(place)[:3],
            "--logits",
            logits(),
            *pretrain(place)[5:],
        ]
    cases |= of_store(
        place, "PaSST layout with 10^9 clips", lambda: place.bomb("passt.h5", bomb_files.passt_store_of_nothing),
        "--class-names", place.text("classes.txt", "a\nb\nc\n"),
    )  # fmt: skip
    for name, make in (
        ("with 10^9 clips", bomb_files.panns_of_nothing),
        ("in one chunk", bomb_files.panns_of_one_chunk),
    ):
        panns = lambda name=name, make=make: place.bomb(f"panns {name}.h5", make)  # noqa: E731
        cases[f"PANNs {name}: pack"] = lambda panns=panns: [
            "pack",
            panns(),
            "--out",
            place.out("packed.h5"),
            "--class-names",
            place.text("classes.txt", "a\nb\nc\n"),
            "--workers",
            1,
        ]
    return cases


def of_store(place: Place, name: str, clips: Callable[[], Path], *options: object) -> Cases:
    commands: Cases = {
        "evaluate": lambda: ["evaluate", "--tagger", place.run, "--clips", clips(), *options],
        "teach": lambda: ["teach", "--teacher", place.run, "--clips", clips(), "--out", place.out("taught"), *options],
        "pretrain": lambda: [*pretrain(place, clips()), *options],
        "verify": lambda: ["verify", "--clips", clips(), "--logits", place.logits],
        "export": lambda: ["export", place.run, "--clips", clips(), "--out", place.out("export"), "--int8"],
        "doctor": lambda: ["doctor", "--clips", clips()],
    }
    return {f"{name}: {command}": make for command, make in commands.items()}


def onnx_cases(place: Place) -> Cases:
    cases: Cases = {}
    for operator in ("ConstantOfShape", "Expand", "Tile", "Range"):
        cases[f"onnx {operator} of 20 GB: teach"] = lambda operator=operator: [
            "teach", "--clips", place.clips, "--teacher",
            place.bomb(f"{operator}.onnx", bomb_files.onnx_constant, operator=operator),
            "--out", place.out("taught"), "--workers", 0,
        ]  # fmt: skip
    return cases


# -- Running -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    code: int
    seconds: float
    most_bytes: int
    """The most memory that one process of the command held."""
    message: str
    failure: str


def try_command(arguments: list[object], seconds: float) -> Outcome:
    """Runs a command in a process group of its own, which is ended if it takes too long or too much memory."""
    start = time.monotonic()
    path = os.pathsep.join([*sys.path])
    process = subprocess.Popen(
        [sys.executable, "-m", "kd.cli", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
        errors="replace",
    )
    ended: list[str] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            if time.monotonic() - start > seconds:
                ended.append("takes too long")
            elif memory_of_group(process.pid) > STOPPED_BYTES:
                ended.append("takes too much memory")
            if ended:
                os.killpg(process.pid, signal.SIGKILL)
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    shown = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)  # of the process, and of those of its own that it waited for
    process.returncode = os.waitstatus_to_exitcode(status)
    done.set()
    watcher.join()
    lines = [line for line in re.split(r"[\r\n]+", shown) if line.strip()]
    message = next((line for line in lines if line.startswith("error:")), lines[-1] if lines else "")
    most = usage.ru_maxrss * 1024
    failure = ended[0] if ended else ""
    if "Traceback" in shown or process.returncode not in (0, 1, 2):
        failure = failure or f"ends in a traceback, or with exit code {process.returncode}: {lines[-1][:300]}"
    if most > MOST_BYTES:
        failure = failure or "takes too much memory"
    if "For full helptext" in shown:
        failure = failure or f"the command line is not one of the command: {shown[-300:]}"
    return Outcome(process.returncode, time.monotonic() - start, most, message, failure)


def memory_of_group(group: int) -> int:
    """Bytes of resident memory of the largest process in a process group."""
    most = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getpgid(int(entry.name)) == group:
                    most = max(most, int((entry / "statm").read_text().split()[1]) * resource.getpagesize())
            except (OSError, ValueError, IndexError):
                continue
    return most


def run(config: BombsConfig) -> int:
    with tempfile.TemporaryDirectory() as temporary:
        place = Place(config.work or Path(temporary))
        cases = {}
        for family in (audio_cases, weight_cases, table_cases, store_cases, onnx_cases):
            cases |= family(place)
        failed = 0
        print("| bomb and command | exit code | seconds | MB | result |\n|---|---:|---:|---:|---|")
        for name, make in cases.items():
            if config.only and not any(word in name for word in config.only):
                continue
            found = try_command(make(), config.seconds)
            failed += bool(found.failure)
            result = f"**{found.failure}**" if found.failure else found.message[:160].replace("|", "\\|")
            result = result.replace(str(place.folder), "…")
            print(
                f"| {name} | {found.code} | {found.seconds:.0f} | {found.most_bytes / 1e6:,.0f} | {result} |",
                flush=True,
            )
        return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: run(parse(BombsConfig, None, "bombs"))))
