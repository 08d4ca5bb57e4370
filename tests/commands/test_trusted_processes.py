"""Several processes of `kd pretrain`: the same result as one, a short soak, and what happens when one dies.

Runs are forked from a process that has imported everything (tests/robustness/preloaded.py), each rank with the environment that
a launcher would give it.
"""

import importlib.util
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.torch import load_file

from kd.run_folder.metrics_log import read_metrics
from kd.training.checkpoint import checkpoints

ROBUSTNESS = Path(__file__).parents[1] / "robustness"


def load_script(name: str) -> ModuleType:
    """A script of tests/robustness/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROBUSTNESS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def soak() -> Iterator[ModuleType]:
    path = list(sys.path)
    yield load_script("soak")
    sys.path[:] = path


class Runner:
    """Starts runs of one process or of two."""

    def __init__(self, starter: object, folder: Path) -> None:
        self.starter = starter
        self.log = folder / "output.log"

    def start(self, arguments: list[str], processes: int = 1) -> list:
        with socket.create_server(("127.0.0.1", 0)) as free:
            several = {
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free.getsockname()[1]),
            }
        ranks = [
            {**several, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            for rank in range(processes)
        ]
        return [self.starter.start(arguments, environment, self.log) for environment in ranks]

    def run(self, arguments: list[str], processes: int = 1) -> str:
        """Starts, waits for success, and returns what was printed."""
        self.log.unlink(missing_ok=True)
        codes = [run.wait() for run in self.start(arguments, processes)]
        assert codes == [0] * processes, self.log.read_text()[-3000:]
        return self.log.read_text()


@pytest.fixture(scope="module")
def runner(soak: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with soak.Preloaded(soak.ENVIRONMENT) as starter:
        yield Runner(starter, tmp_path_factory.mktemp("processes"))


def arguments(store: Path, logits: Path, out: Path, *more: str) -> list[str]:
    """Runs of 20 steps of eight clips in four epochs, at a small and constant learning rate.

    Adam divides by the gradient's size: where the true gradient is zero (a bias before another batch norm) and only
    rounding is left, it makes whole steps in directions of chance. A larger epsilon keeps these small.
    """
    settings = (
        "--student mn01 --n-mels 64 --hop-samples 640 --clip-seconds 0.4 --workers 0 --epochs 4 --learning-rate 1e-4"
    )
    settings += " --adam-epsilon 1e-4 --warmup-epochs 0 --ramp-down-start 4 --ramp-down-epochs 1 --log-every-steps 1"
    settings += " --keep-checkpoints 4 --sync-batch-norm"
    return ["--clips", str(store), "--logits", str(logits), "--out", str(out), *settings.split(), *more]


def largest_difference(one: Path, other: Path) -> float:
    left, right = load_file(one), load_file(other)
    return max(float((left[name].float() - right[name].float()).abs().max()) for name in left)


def test_two_processes_of_batch_4_train_as_one_of_batch_8(
    make_tiny_store: Callable[..., Path], make_tiny_logits: Callable[..., Path], tmp_path: Path, runner: Runner
) -> None:
    store = make_tiny_store("clips.h5", clips=40)
    logits = make_tiny_logits("logits.h5", store)
    one, two, changed = (tmp_path / name for name in ("one", "two", "changed"))
    runner.run(arguments(store, logits, one, "--batch-size", "8"))
    shown = runner.run(arguments(store, logits, two, "--batch-size", "4"), processes=2)
    assert shown.count("student written to") == 1  # only the main process prints
    weights = "checkpoints/step-000000{:02}/student.safetensors"
    assert largest_difference(one / weights.format(20), two / weights.format(20)) < 1e-5
    assert largest_difference(one / weights.format(5), one / weights.format(20)) > 1e-3  # they did move
    losses = [[record["loss"] for record in read_metrics(out / "metrics.jsonl", "train")] for out in (one, two)]
    np.testing.assert_allclose(*losses, rtol=1e-5)

    # A run of one process that stopped after 10 steps, taken on by two.
    shutil.copytree(one, changed)
    (changed / "student.json").unlink()
    for path in checkpoints(changed / "checkpoints"):
        if int(path.name.removeprefix("step-")) > 10:
            shutil.rmtree(path)
    shown = runner.run(arguments(store, logits, changed, "--batch-size", "4"), processes=2)
    assert "2 processes x 1 batches x 4 clips, before it was 1 processes x 1 batches x 8 clips" in shown
    assert largest_difference(one / weights.format(20), changed / weights.format(20)) < 1e-5


def test_when_one_process_dies_the_other_ends_with_an_error(
    tiny_store: Path, tiny_logits: Path, tmp_path: Path, runner: Runner
) -> None:
    out = tmp_path / "run"
    runner.log.unlink(missing_ok=True)
    runs = runner.start(
        arguments(tiny_store, tiny_logits, out, "--batch-size", "4", "--epochs", "500", "--clips-per-epoch", "8"),
        processes=2,
    )
    while not checkpoints(out / "checkpoints"):
        assert all(run.running() for run in runs), runner.log.read_text()[-3000:]
        time.sleep(0.01)
    runs[1].send(signal.SIGKILL)
    assert runs[1].wait() == -signal.SIGKILL
    assert runs[0].wait() not in (0, 75)  # the test's time limit ends a hang
    assert re.search(r"RuntimeError|DistBackendError|Connection", runner.log.read_text())


COMMAND_AND_ITS_THREADS = """
import importlib, os, pathlib, sys

code = importlib.import_module(sys.argv[1]).main(sys.argv[2:])
threads = [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
left = f"left with {code} {[name for name in threads if 'gloo' in name]}"
pathlib.Path(sys.argv[0]).with_name(f"process-{os.environ['RANK']}").write_text(left)
raise SystemExit(code)
"""


def test_no_thread_of_a_process_group_outlives_its_command(
    tiny_store: Path,
    tiny_logits: Path,
    make_task_folder: Callable[..., Path],
    tmp_path: Path,
    environment: dict[str, str],
) -> None:
    """One that is at work while Python shuts down may abort the process, with all its work done."""
    script = tmp_path / "command.py"
    script.write_text(COMMAND_AND_ITS_THREADS)
    run = tmp_path / "run"
    short = ("--epochs", "1", "--ramp-down-start", "1", "--batch-size", "4")
    own = make_task_folder("folder")
    commands = (
        ["kd.pretrain", *arguments(tiny_store, tiny_logits, run, *short)],
        ["kd.evaluate", "--clips", tiny_store, "--tagger", run],
        ["kd.finetune", "--task", "folder", "--data", own, "--init", run, "--out", tmp_path / "tuned", *short],
        ["teacher_logits.precompute", "--clips", tiny_store, "--teacher", run, "--out", tmp_path / "logits"],
    )
    for command in commands:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
        done = subprocess.run(
            [sys.executable, *launcher, *map(str, command)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        for process in range(2):
            said = tmp_path / f"process-{process}"
            assert said.read_text() == "left with 0 []"
            said.unlink()


@pytest.mark.sweep
def test_a_short_soak(soak: ModuleType, runner: Runner, tmp_path: Path) -> None:
    """SIGKILL in a checkpoint's writing, for one process and for two, and SIGTERM for one."""
    tallies = soak.soak(soak.SoakConfig(kills=3, epochs=2), tmp_path, runner.starter)
    assert [tally.kills for tally in tallies.values()] == [{"SIGKILL": 1, "SIGTERM": 1}, {"SIGKILL": 1}]
    for tally in tallies.values():
        assert tally.differences == []
        assert tally.runs >= 1
