"""Short runs of every kind of training at a fixed seed, to show that a refactoring leaves each result bit for bit.

    python tests/robustness/reference_runs.py prepare FOLDER     # data sets, clip and logit stores, once
    python tests/robustness/reference_runs.py record FOLDER before.json
    …change the code…
    python tests/robustness/reference_runs.py check FOLDER before.json

A record holds, for each run, its logged losses and metrics and digests of its weights and predictions. The numbers depend on
the processor and on versions, so they are compared on the machine that recorded them. ``check`` also opens the run folders and
stores that ``record`` left in FOLDER, which were written by the older code.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "true",
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'datasets'}",
}

PRETRAIN = "--student mn01 --epochs 2 --batch-size 4 --clip-seconds 0.4 --workers 0 --log-every-steps 1 --seed 3"
FINETUNE = (
    "--student mn01 --epochs 2 --workers 0 --clip-seconds 0.4 --eval-batch-size 4 --no-report --log-every-steps 1"
)
SMALL_DATA = (
    "--fold 1 --seeds 0 5 --valid-share 0.34 --early-stopping accuracy --patience 1 --layer-decay 0.5 --class-weights balanced "
    "--label-smoothing 0.1 --sampler balanced --time-masks 1 --frequency-masks 2 --freq-mixstyle 0.5 --freeze batch-norm "
    "--ema-decay 0.5 --impulse-responses {data}/responses --crop random"
)
DISTILLED = "--clips {data}/clips.h5 --logits {data}/logits.h5"

RUNS: dict[str, str] = {
    "pretrain on labels": f"pretrain {PRETRAIN} --clips {{data}}/clips.h5 --label-weight 1",
    "pretrain on logits": f"pretrain {PRETRAIN} {DISTILLED}:2 {{data}}/other_logits.h5 --split train --valid-split valid",
    "pretrain on probabilities' mean": f"pretrain {PRETRAIN} {DISTILLED} {{data}}/other_logits.h5 --ensemble probabilities",
    "pretrain with mixup of logits": f"pretrain {PRETRAIN} {DISTILLED} --mixup-of-teacher logits --teacher-temperature 2",
    "pretrain without mixup": f"pretrain {PRETRAIN} {DISTILLED} --mixup-alpha 0 --no-mel-jitter --label-weight 0",
    "pretrain on some logits": (
        f"pretrain {PRETRAIN} --clips {{data}}/clips.h5 --logits {{data}}/part_logits.h5 --missing-logits label-only"
    ),
    "pretrain on stored views": f"pretrain {PRETRAIN} {DISTILLED.replace('logits.h5', 'views.h5')} --views stored",
    "pretrain with augmentation": (
        f"pretrain {PRETRAIN} {DISTILLED} --gain-db 6 --roll-seconds 0.1 --crop random --sampler balanced --workers 2"
    ),
    "pretrain with accumulation and EMA": (
        f"pretrain {PRETRAIN} {DISTILLED} --gradient-accumulation-steps 2 --ema-decay 0.5 --max-gradient-norm 1 "
        "--optimizer adamw --weight-decay 0.01 --valid-folds 3"
    ),
    "pretrain dymn04": f"pretrain {PRETRAIN.replace('mn01', 'dymn04')} {DISTILLED} --student-options width=0.1",
    "pretrain mergenet16": f"pretrain {PRETRAIN.replace('mn01', 'mergenet16')} {DISTILLED} --epochs 1",
    "pretrain with two processes": f"2 pretrain {PRETRAIN} {DISTILLED} --batch-size 2 --valid-folds 3",
    "finetune esc50": f"finetune --task esc50 {FINETUNE} --data {{data}}/esc50 --batch-size 8",
    "finetune fsd50k": f"finetune --task fsd50k {FINETUNE} --data {{data}}/fsd50k",
    "finetune openmic": f"finetune --task openmic {FINETUNE} --data {{data}}/openmic",
    "finetune dcase20": f"finetune --task dcase20 {FINETUNE} --data {{data}}/dcase20",
    "finetune folder": f"finetune --task folder {FINETUNE} --data {{data}}/folder --crop random --valid-share 0.3 --probe",
    "finetune with few clips": f"finetune --task esc50 {FINETUNE} --data {{data}}/esc50 {SMALL_DATA}",
    "finetune on logits": (
        f"finetune --task folder {FINETUNE} --data {{data}}/folder --logits {{data}}/folder_logits.h5 --label-weight 0.3 "
        "--teacher-temperature 2"
    ),
    "finetune on masked labels and logits": (
        f"finetune --task openmic {FINETUNE} --data {{data}}/openmic --logits {{data}}/openmic_logits.h5 --class-weights balanced"
    ),
    "finetune on some logits": (
        f"finetune --task folder {FINETUNE} --data {{data}}/folder --logits {{data}}/folder_part_logits.h5 "
        "--missing-logits label-only --label-smoothing 0.1 --class-weights balanced"
    ),
    "finetune a pretrained student": (
        f"finetune --task folder {FINETUNE.replace('--student mn01', '')} --data {{data}}/folder --init {{data}}/student"
    ),
    "finetune only a head": (
        f"finetune --task folder {FINETUNE.replace('--student mn01', '')} --data {{data}}/folder --init {{data}}/student "
        "--freeze backbone --workers 2"
    ),
    "finetune like MergeNet": (
        f"finetune --task folder {FINETUNE.replace('mn01', 'mergenet16')} --data {{data}}/folder --recipe mergenet --epochs 1"
    ),
    "finetune a PaSST": (
        f"finetune --task folder {FINETUNE.replace('mn01', 'passt_tiny')} --data {{data}}/folder "
        "--student-options width=64 depth=2 heads=1 patchout_patches=4"
    ),
    "finetune with two processes": f"2 finetune --task esc50 {FINETUNE} --data {{data}}/esc50 --batch-size 2 --fold 1",
    "pack esc50": "pack {data}/esc50 --out {out}.h5 --workers 1",
    "pack folder": "pack {data}/folder --out {out}.h5 --workers 1 --audio pcm16",
    "teach": "teach --clips {data}/clips.h5 --teacher {data}/student --out {out} --workers 0",
}


# -- Data --------------------------------------------------------------------------------------------------------------


def prepare(data: Path) -> None:
    """Writes everything that the runs read; with today's code, so that later code is shown to read it."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT), str(ROOT / "datasets")]
    import conftest
    import torch

    from students import create_student
    from students.card import save_student
    from students.frontend import LogMelConfig
    from teacher_logits.store import write_logit_store

    data.mkdir(parents=True)
    clips = conftest.write_tiny_store(data / "clips.h5", clips=24)
    conftest.write_tiny_logits(data / "logits.h5", clips)
    conftest.write_tiny_logits(data / "other_logits.h5", clips, scale=1.0)
    conftest.write_tiny_logits(data / "part_logits.h5", clips, rows=range(0, 24, 2))
    for task, write in conftest.LAYOUTS.items():
        write(data / task, **({"per_fold": 4} if task == "esc50" else {}))
    (data / "responses").mkdir()
    shutil.copy(data / "esc50" / "audio" / "2-2000-A-0.wav", data / "responses" / "phone.wav")
    torch.manual_seed(0)
    save_student(data / "student", create_student("mn01", 3), conftest.CLASS_NAMES, LogMelConfig())
    torch.manual_seed(1)

    def own_logits(path: Path, ids: list[str], class_names: tuple[str, ...]) -> None:
        values = np.eye(len(class_names), dtype=np.float16)[
            [sum(map(ord, clip_id)) % len(class_names) for clip_id in ids]
        ]
        write_logit_store(
            path,
            clip_ids=ids,
            audio_digests=np.zeros((len(ids), 16), dtype=np.uint8),
            logit_blocks=[values * np.float16(3.0) - np.float16(1.0)],
            class_names=class_names,
            teacher={"name": "own", "fingerprint": "0" * 32, "link": "sigmoid"},
            clip_store_fingerprint="0" * 32,
        )

    folder = data / "folder"
    ids = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    own_logits(data / "folder_logits.h5", ids, ("fan", "pump"))
    own_logits(data / "folder_part_logits.h5", ids[::2], ("fan", "pump"))
    own_logits(
        data / "openmic_logits.h5",
        sorted(path.stem for path in (data / "openmic" / "audio").rglob("*.ogg")),
        ("accordion", "banjo", "bass"),
    )
    teach = f"teach --clips {data}/clips.h5 --teacher {data}/student --out {data}/views --workers 0 --views 3 --view-seconds 0.4"
    run(teach)
    next((data / "views").glob("*.h5")).rename(data / "views.h5")


# -- Runs --------------------------------------------------------------------------------------------------------------


def run(line: str) -> None:
    """Runs a command of kd; "2 pretrain …" with two processes. RuntimeError, with what it printed, if it fails."""
    words = line.split()
    start = ["-m", "kd.cli"]
    if words[0] == "2":
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", words.pop(0), "-m", "kd.cli"]
    done = subprocess.run([sys.executable, *start, *words], env=ENVIRONMENT, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{line}\n{done.stdout}\n{done.stderr}")


def digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def result_of(out: Path) -> dict[str, Any]:
    """What a run left: text of its logs, digests of its weights, its predictions and its stores."""
    found: dict[str, Any] = {}
    for path in [*sorted(out.rglob("*")), out.with_suffix(".h5")]:
        name = path.relative_to(out.parent).as_posix()
        if path.name == "metrics.jsonl":
            found[name] = path.read_text().splitlines()
        elif path.name in ("student.safetensors", "best.safetensors") or path.suffix == ".h5":
            if path.is_file() and "checkpoints" not in path.parts:
                found[name] = digest(path.read_bytes())
        elif path.name in ("predictions.npz", "validation_predictions.npz"):
            with np.load(path, allow_pickle=False) as arrays:
                for array in sorted(arrays.files):
                    if array != "source":
                        found[f"{name}: {array}"] = digest(np.ascontiguousarray(arrays[array]).tobytes())
        elif path.name == "results.json":
            found[name] = json.loads(path.read_text())["headline"]
    return found


def run_all(data: Path, outputs: Path, only: str) -> dict[str, dict[str, Any]]:
    """Every run whose name holds ``only``, two at a time."""
    shutil.rmtree(outputs, ignore_errors=True)
    outputs.mkdir()

    def one(name: str) -> dict[str, Any]:
        out = outputs / name.replace(" ", "_").replace("'", "")
        line = RUNS[name].format(data=data, out=out)
        run(line if "--out" in line else f"{line} --out {out}")
        print(f"done: {name}", flush=True)
        return result_of(out)

    names = [name for name in RUNS if only in name]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs between the results of one run, each as a line."""
    lines = []
    for name in sorted(before.keys() | after.keys()):
        one, other = before.get(name), after.get(name)
        if one != other:
            if isinstance(one, list) and isinstance(other, list):
                one, other = next(
                    (pair for pair in zip(one, other, strict=False) if pair[0] != pair[1]), (len(one), len(other))
                )
            lines.append(f"{name}: {one} -> {other}")
    return lines


def open_old_outputs(data: Path) -> list[str]:
    """Run folders and stores that older code wrote, opened by today's; what fails, each as a line."""
    failed = []
    for folder in sorted((data / "recorded").iterdir()):
        try:
            if folder.name.startswith(("pretrain", "finetune")):
                run(f"report {folder}")
            elif folder.name == "teach":
                run(f"verify --logits {next(folder.glob('*.h5'))} --clips {data}/clips.h5")
        except RuntimeError as error:
            failed.append(str(error))
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("prepare", "record", "check"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("record", type=Path, nargs="?")
    parser.add_argument("--only", default="", help="runs whose name holds this")
    parser.add_argument("--open", action="store_true", help="check: also open what record left")
    chosen = parser.parse_args()
    data = chosen.folder.resolve()
    if chosen.action == "prepare":
        prepare(data)
        return 0
    if chosen.record is None:
        parser.error("give the file of the record")
    if chosen.action == "record":
        chosen.record.write_text(json.dumps(run_all(data, data / "recorded", chosen.only), indent=1))
        return 0
    before = json.loads(chosen.record.read_text())
    after = run_all(data, data / f"checked-{os.getpid()}", chosen.only)
    wrong = 0
    for name, result in after.items():
        changed = differences(before[name], result)
        wrong += bool(changed)
        print(f"{'same' if not changed else 'DIFFERS'}: {name}", *changed, sep="\n    ")
    failed = open_old_outputs(data) if chosen.open else []
    print(*failed, sep="\n")
    print(f"{len(after) - wrong} runs agree, {wrong} differ, {len(failed)} old outputs cannot be opened")
    return 1 if wrong or failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
