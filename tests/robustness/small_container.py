"""Every command with its default settings in a container as Docker makes it: 64 MB of shared memory, and 64 open files.

    python tests/robustness/small_container.py ESC-10 OUT        # a folder in ESC-50's layout

Prints a table: command, outcome, seconds. Needs the right to mount a small /dev/shm (root, or user namespaces). Training is cut down
to an epoch or a few steps, and the demo to few clips; nothing else is changed.
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

SECONDS = 900
FILES = 64
SMALL = f'mount -t tmpfs -o size=64m none /dev/shm && ulimit -n {FILES} && exec "$@"'
NAMESPACES = (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"])


def in_container() -> list[str] | None:
    """What to put before a command; None if this machine does not let us."""
    for unshare in NAMESPACES:
        start = [*unshare, "sh", "-c", SMALL, "sh"]
        if shutil.which("unshare") and subprocess.run([*start, "true"], capture_output=True).returncode == 0:
            return start
    return None


def some_clips(source: Path, target: Path, per_class: int) -> None:
    """A data set in ESC-50's layout with the first clips of each class in each fold."""
    (target / "audio").mkdir(parents=True)
    (target / "meta").mkdir()
    with open(source / "meta" / "esc50.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    counts: dict[tuple[str, str], int] = {}
    with open(target / "meta" / "esc50.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        for row in rows:
            key = row["fold"], row["category"]
            counts[key] = counts.get(key, 0) + 1
            if counts[key] <= per_class:
                table.writerow(row)
                for path in (source / "audio").glob(f"{Path(row['filename']).stem}.*"):
                    shutil.copy(path, target / "audio")


def commands(out: Path, python: str) -> dict[str, list[str]]:
    """Each command as it is given, in an order in which each finds what it needs."""
    clips, teacher, logits = out / "clips.h5", out / "teacher", out / "logits" / "teacher.h5"
    run = f"{out}/run --epochs 1 --student mn01"
    save = (
        f"import numpy as np, json; from teacher_logits.store import LogitStore; s = LogitStore.open('{logits}'); "
        f"np.save('{out}/logits.npy', s.read(s.clip_ids)); "
        f"open('{out}/index.json', 'w').write(json.dumps({{c: i for i, c in enumerate(s.clip_ids)}}))"
    )
    lines = {
        "pack": f"pack {out}/data --task esc50 --out {clips}",
        "doctor": f"doctor --clips {clips}",
        "pretrain, labels": f"pretrain --clips {clips} --out {teacher} --label-weight 1 --epochs 1 --folds 1 2 3 4 --student mn01",
        "teach": f"teach --clips {clips} --teacher {teacher} --out {out}/logits --name teacher",
        "teach, views": f"teach --clips {clips} --teacher {teacher} --out {out}/views --views 2 --workers 2",
        "verify": f"verify --clips {clips} --logits {logits}",
        "import-logits": f"import-logits --clips {clips} --logits {out}/logits.npy --index {out}/index.json --out {out}/i.h5",
        "compact-logits": f"compact-logits --logits {logits} --keep 3 --out {out}/compact.h5",
        "pretrain, logits": f"pretrain --clips {clips} --logits {logits} --out {run} --folds 1 2 3 4 --valid-folds 5",
        "finetune": f"finetune --task esc50 --data {out}/data --out {out}/tuned --epochs 1 --fold 1 --init {out}/run",
        "finetune, cache": f"finetune --task esc50 --data {out}/data --out {out}/cached --epochs 1 --fold 1 2 "
        f"--init {out}/run --cache {out}/cache --probe",
        "distill": f"distill --data {out}/data --teacher-weights {teacher} --out {out}/distilled --steps 10 --fold 1",
        "evaluate": f"evaluate --clips {clips} --tagger {out}/run --folds 5 --out {out}/evaluated.json",
        "tag": f"tag {out}/data/audio --tagger {out}/run",
        "export": f"export {out}/run --out {out}/export --allow-difference",
        "report": f"report {out}/tuned",
        "compare": f"compare {out}/tuned {out}/cached --out {out}/compared.html",
        "profile": f"profile --student mn01 --out {out}/profile.json",
        "pretrain, DyMN": f"pretrain --clips {clips} --out {out}/dymn --label-weight 1 --epochs 1 --student dymn04",
        "inspect": f"inspect --tagger {out}/dymn --clips {clips} --out {out}/inspected",
        "demo": f"demo --out {out}/demo --scenes 60 --recordings 240 --test-recordings 32 --teacher-epochs 1 --steps 10",
    }
    found = {name: [python, "-m", "kd.cli", *line.split()] for name, line in lines.items()}
    found["import-logits"] = [
        "sh",
        "-c",
        '"$0" -c "$1" && shift && "$0" "$@"',
        python,
        save,
        *found["import-logits"][1:],
    ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder in ESC-50's layout")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--only", nargs="+", help="some of the commands")
    parser.add_argument("--per-class", type=int, default=3, help="clips of each class in each fold")
    chosen = parser.parse_args()
    container = in_container()
    if container is None:
        print("skipped: this machine does not let us mount a small /dev/shm")
        return 0
    if not (chosen.out / "data").exists():
        some_clips(chosen.data, chosen.out / "data", chosen.per_class)
    print("| command | outcome | seconds |\n|---|---|---:|", flush=True)
    wrong = 0
    for name, command in commands(chosen.out.absolute(), sys.executable).items():
        if chosen.only and name not in chosen.only:
            continue
        start = time.monotonic()
        log = chosen.out / f"{name.replace(', ', '-')}.log"
        with open(log, "w") as output:
            try:
                code = subprocess.run(
                    [*container, *command], stdout=output, stderr=output, timeout=SECONDS, env={**os.environ}
                ).returncode
            except subprocess.TimeoutExpired:
                code = None
        said = log.read_text(errors="replace")
        errors = [line for line in said.splitlines() if line.startswith(("error: ", "note: "))]
        outcome = {0: "done", None: f"still running after {SECONDS} s"}.get(code, f"exit code {code}")
        bad = code not in (0, 1 if name == "doctor" else 0, 2) or "Traceback" in said
        wrong += bad
        outcome += " WITH A TRACEBACK" if "Traceback" in said else ""
        print(f"| {name} | {'; '.join([outcome, *errors])} | {time.monotonic() - start:.0f} |", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
