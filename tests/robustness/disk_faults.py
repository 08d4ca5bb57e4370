"""Makes single disk operations of our commands fail, and then gives the same command again.

    python tests/robustness/disk_faults.py                          # about 300 operations of each command
    python tests/robustness/disk_faults.py --only pack --points 0   # every one

An operation fails with EIO (once), or ENOSPC (the disk stays full), or EROFS (it stays read-only), or the process is killed there.
Reading fails with EIO. The command must then end with exit code 2 and a plain message, or have done its work all the same. Given
again, it must end with the result of a run without faults, and leave nothing else behind. Needs a C compiler and Linux.
"""

import argparse
import ctypes
import errno
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from io import StringIO
from mmap import mmap
from pathlib import Path

from disk_fault_stages import STAGES, Stage
from preloaded import Preloaded

SOURCE = Path(__file__).with_suffix(".c")
KILL = -1
FAULTS = {
    "EIO": (errno.EIO, False, False),
    "ENOSPC": (errno.ENOSPC, True, False),
    "EROFS": (errno.EROFS, True, False),
    "kill": (KILL, False, False),
    "EIO on reading": (errno.EIO, False, True),
}
"""Of each kind of fault: errno, whether it lasts, whether it concerns reading."""


class Control(ctypes.Structure):
    """What ``disk_faults.c`` is to do; it shares this memory."""

    _fields_ = (
        ("count", ctypes.c_long),
        ("target", ctypes.c_long),
        ("error", ctypes.c_int),
        ("lasts", ctypes.c_int),
        ("reads", ctypes.c_int),
        ("fired", ctypes.c_int),
        ("folder", ctypes.c_char * 480),
        ("what", ctypes.c_char * 512),
    )


@dataclass
class Findings:
    """What happened at the points of one stage and one kind of fault."""

    operations: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def compiler() -> str | None:
    return shutil.which("cc") if sys.platform == "linux" else None


class FaultyDisk:
    """A folder in which the operations of commands fail when they are to."""

    def __init__(self, place: Path) -> None:
        self.place, self.disk = place, place / "disk"
        self.library, memory = place / "disk_faults.so", place / "control"
        subprocess.run([compiler(), "-shared", "-fPIC", "-O1", "-o", self.library, SOURCE, "-ldl"], check=True)
        memory.write_bytes(bytes(ctypes.sizeof(Control)))
        with open(memory, "r+b") as file:
            self.control = Control.from_buffer(mmap(file.fileno(), 0))
        self.output = place / "output.txt"
        variables = {"LD_PRELOAD": str(self.library), "KD_DISK_FAULTS": str(memory), "OMP_NUM_THREADS": "1"}
        self.starter = Preloaded(variables | {"ACCELERATE_USE_CPU": "true", "TQDM_DISABLE": "1"})

    @contextmanager
    def running(self) -> Iterator["FaultyDisk"]:
        with self.starter:
            yield self

    def run(self, stage: Stage, fault: str = "EIO", target: int = 0) -> tuple[int, str]:
        """The exit code and the output of a run of which this operation fails; 0: none does."""
        self.control.error, self.control.lasts, self.control.reads = FAULTS[fault]
        self.control.count = self.control.fired = 0
        self.control.what, self.control.target = b"", target
        self.control.folder = str(self.disk).encode()
        self.output.unlink(missing_ok=True)
        code = self.starter.start(stage.arguments(self.disk), {}, self.output, stage.module).wait()
        self.control.folder = b""
        return code, self.output.read_text(errors="replace")

    def reset(self, scene: Path) -> None:
        shutil.rmtree(self.disk, ignore_errors=True)
        shutil.copytree(scene, self.disk)

    def content(self) -> dict[str, bytes]:
        """Every file by its path; folders end in a slash."""
        found = {}
        for path in self.disk.rglob("*"):
            name = path.relative_to(self.disk).as_posix()
            found[name if path.is_file() else f"{name}/"] = path.read_bytes() if path.is_file() else b""
        return found


class Sweep:
    """A stage whose operations fail one after the other."""

    def __init__(self, disk: FaultyDisk, name: str) -> None:
        self.disk, self.name, self.stage = disk, name, STAGES[name]
        self.scene = disk.place / f"scene-{name}"
        self.scene.mkdir()
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            self.stage.prepare(self.scene)
            disk.reset(self.scene)
            import_module(self.stage.module).main(self.stage.arguments(disk.disk))  # imports what it needs
        disk.starter.import_modules(list(sys.modules))
        self.whole, self.operations, self.volatile = {}, {}, set()
        for fault in ("EIO", "EIO on reading"):
            disk.reset(self.scene)
            code, output = disk.run(self.stage, fault)
            assert code == 0, output
            self.operations[fault] = disk.control.count
            content = disk.content()
            if self.whole:  # what depends on the time
                self.volatile = {name for name in content if content[name] != self.whole.get(name)}
                assert content.keys() == self.whole.keys()
            self.whole = content

    def points(self, fault: str, most: int) -> Sequence[int]:
        """Numbers of operations, evenly spread."""
        count = self.operations["EIO on reading" if FAULTS[fault][2] else "EIO"]
        most = min(most, count) or count
        return [1 + int((index + 0.5) * count / most) for index in range(most)]

    def run(self, fault: str, most: int, findings: Findings) -> None:
        for point in self.points(fault, most):
            findings.operations += 1
            self.disk.reset(self.scene)
            code, output = self.disk.run(self.stage, fault, point)
            what = self.disk.control.what.decode(errors="replace").replace(str(self.disk.disk), "")
            outcome, wrong = self._judge(fault, code, output)
            if not wrong:
                again, output = self.disk.run(self.stage)
                outcome, wrong = self._judge_again(outcome, again, output)
            findings.outcomes["wrong" if wrong else outcome] += 1
            if wrong:
                findings.failures.append(f"{self.name}, {fault} at {point} ({what}): {wrong}")
                print(f"wrong: {findings.failures[-1]}", file=sys.stderr, flush=True)

    def _judge(self, fault: str, code: int, output: str) -> tuple[str, str]:
        """What the faulty run did, and what is wrong with it."""
        if not self.disk.control.fired:
            return "not reached", ""
        if "Traceback" in output:
            return "", "a traceback: " + output[output.index("Traceback") :][-600:]
        if fault == "kill":
            return "killed", "" if code == -9 else f"exit code {code}: {output[-300:]}"
        if code == 2:
            messages = [line for line in output.splitlines() if line.startswith("error: ")]
            named = len(messages) == 1 and str(self.disk.disk) in messages[0]
            return "a message", "" if named else f"not one message that names a file: {messages}"
        return "done all the same", "" if code == 0 else f"exit code {code}: {output[-300:]}"

    def _judge_again(self, outcome: str, code: int, output: str) -> tuple[str, str]:
        content = self.disk.content()
        if code != 0 and not (code == 2 and " exists" in output and content.keys() == self.whole.keys()):
            return "", f"the same command again ends with exit code {code}: {output[-600:]}"
        if "Traceback" in output:
            return "", "a traceback the second time: " + output[-600:]
        if left := sorted(content.keys() - self.whole.keys()):
            return "", f"left behind: {left}"
        if missing := sorted(self.whole.keys() - content.keys()):
            return "", f"missing: {missing}"
        other = [name for name in content if name not in self.volatile and content[name] != self.whole[name]]
        return outcome, f"other content: {other}" if other else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--points", type=int, default=60, help="operations of each stage and fault; 0: all")
    chosen = parser.parse_args()
    if compiler() is None:
        print("skipped: needs Linux and a C compiler (cc)")
        return 0
    total = Findings()
    with tempfile.TemporaryDirectory() as place, FaultyDisk(Path(place)).running() as disk:
        print(
            "| command | fault | operations | tried | outcomes | wrong | seconds |\n|---|---|---:|---:|---|---:|---:|"
        )
        for name in chosen.only:
            sweep = Sweep(disk, name)
            for fault in chosen.faults:
                start, findings = time.monotonic(), Findings()
                sweep.run(fault, chosen.points, findings)
                counts = ", ".join(f"{count} {what}" for what, count in findings.outcomes.items() if what != "wrong")
                everything = sweep.operations["EIO on reading" if FAULTS[fault][2] else "EIO"]
                wrong, seconds = len(findings.failures), time.monotonic() - start
                print(
                    f"| {name} | {fault} | {everything} | {findings.operations} | {counts} | {wrong} | {seconds:.0f} |"
                )
                sys.stdout.flush()
                total.operations += findings.operations
                total.failures += findings.failures
    print(f"\n{total.operations} operations, {len(total.failures)} wrong")
    return 1 if total.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
