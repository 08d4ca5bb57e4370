"""An objective, a student and a task from files outside the package, through the commands.

The objective is the one that docs/add_an_objective.md shows. Runs are stopped and killed; the same command must then end with what
an uninterrupted run gives, byte for byte, in the objective's own tensors as well.
"""

import importlib
import importlib.util
import itertools
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from audio_datasets.system.command import STOPPED
from audio_datasets.tasks.catalog import get_task
from audio_datasets.tasks.task import read_task
from kd import evaluate, finetune, pretrain, report
from kd.run_folder.metrics_log import read_metrics
from kd.training.checkpoint import checkpoints
from students.card import load_student
from teacher_logits.store import write_logit_store

DOCS = Path(__file__).parents[2] / "docs" / "add_an_objective.md"
ROBUSTNESS = Path(__file__).parents[1] / "robustness"

OBJECTIVE = "my_objective:ProjectedDistillation"
STUDENT = "outside_student:Tiny"
TASK = "kitchen_task:KITCHEN"

STUDENT_FILE = '''
from dataclasses import dataclass

from torch import nn

from students.interface import Student, StudentOutput


@dataclass(frozen=True)
class TinyOptions:
    channels: int = 6


class Tiny(Student):
    """One convolution; a batch norm, whose statistics the average and the checkpoints must keep too."""

    Options = TinyOptions

    def __init__(self, num_classes, options):
        super().__init__(num_classes, embedding_dim=options.channels)
        self.features = nn.Sequential(
            nn.Conv2d(1, options.channels, 5, 4), nn.BatchNorm2d(options.channels), nn.Hardswish()
        )
        self.classifier = nn.Sequential(nn.Flatten(1), nn.Linear(options.channels, num_classes))

    def forward(self, mel):
        embedding = self.features(mel).mean((2, 3))
        return StudentOutput(self.classifier(embedding), embedding)

    def output_biases(self):
        return self.classifier[-1].bias
'''

TASK_FILE = """
from audio_datasets.tasks.label_space import LabelGroup, LabelSpace
from audio_datasets.tasks.listing import Clip, Listing
from audio_datasets.tasks.task import Task

SPACE = LabelSpace((LabelGroup("verb", ("open", "shut"), True), LabelGroup("noun", ("door", "tap"), True)))


def read(folder):
    clips = []
    for file in sorted(folder.glob("*.wav")):
        verb, noun, number = file.stem.split("-")
        clips.append(Clip(file.stem, file, (verb, noun), fold=int(number) % 2 + 1))
    return Listing(SPACE.class_names, tuple(clips), label_space=SPACE)


KITCHEN = Task("kitchen", "Kitchen", "my own", "mine", "a folder with VERB-NOUN-NUMBER.wav", read)
"""

# Writes down, at each step, what the weights of its own are on this process.
WATCHED_FILE = """
import hashlib
import os
from pathlib import Path

from my_objective import ProjectedDistillation


class Watched(ProjectedDistillation):
    def forward(self, student, batch):
        digest = hashlib.blake2b(self.projection.weight.detach().numpy().tobytes(), digest_size=8).hexdigest()
        with open(Path(os.environ["WATCHED"] + os.environ.get("RANK", "0")), "a") as file:
            file.write(digest + "\\n")
        return super().forward(student, batch)
"""


def documented_objective() -> str:
    """The code block of docs/add_an_objective.md."""
    (code,) = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return code


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the user's own modules, in which the commands run."""
    folder = tmp_path_factory.mktemp("outside")
    files = {"my_objective": documented_objective(), "outside_student": STUDENT_FILE, "kitchen_task": TASK_FILE}
    for name, text in {**files, "watched_objective": WATCHED_FILE}.items():
        (folder / f"{name}.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        yield folder
    for name in (*files, "watched_objective"):
        sys.modules.pop(name, None)


SHORT = ["--clip-seconds", "0.4", "--workers", "0", "--log-every-steps", "1", "--n-mels", "64", "--hop-samples", "640"]
SHORT += ["--ema-decay", "0.8", "--checkpoint-every-steps", "1", "--keep-checkpoints", "3", "--epochs", "2"]
WITH_OBJECTIVE = ["--objective", OBJECTIVE, "--objective-options", "weight=0.3"]


def pretraining(store: Path, logits: Path, out: Path, *more: str) -> list[str]:
    """Two epochs of three steps of four clips."""
    given = ["--clips", str(store), "--logits", str(logits), "--out", str(out), "--batch-size", "4"]
    return [*given, "--student", "mn01", *SHORT, *WITH_OBJECTIVE, *more]


@pytest.fixture(scope="module")
def whole(outside: Path, tiny_store: Path, tiny_logits: Path) -> Path:
    """A run of the objective that nothing disturbed; tests only read it."""
    out = outside / "whole"
    assert pretrain.main(pretraining(tiny_store, tiny_logits, out)) == 0
    return out


def newest(run: Path) -> Path:
    return checkpoints(run / "checkpoints")[-1]


def assert_same_result(one: Path, other: Path) -> None:
    """Weights, log, and everything in the newest checkpoint, byte for byte."""
    files = sorted(item.name for item in newest(one).iterdir())
    assert {"student.safetensors", "ema.safetensors", "objective.safetensors", "optimizer.pt"} <= set(files)
    place = newest(one).relative_to(one)
    for name in ("student.safetensors", "metrics.jsonl", *(place / file for file in files)):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def stop_at_call(patch: pytest.MonkeyPatch, call: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Sends this process a signal while the objective computes the loss of a certain batch."""
    kind = importlib.import_module("my_objective").ProjectedDistillation
    original, calls = kind.forward, []

    def signalled(*inputs: object) -> object:
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*inputs)

    patch.setattr(kind, "forward", signalled)


# -- An objective ------------------------------------------------------------------------------------------------------


def test_the_objectives_weights_are_trained_averaged_and_kept(whole: Path) -> None:
    tensors = {place.name: load_file(place / "objective.safetensors") for place in checkpoints(whole / "checkpoints")}
    assert list(tensors) == ["step-00000004", "step-00000005", "step-00000006"]
    for found in tensors.values():
        assert {name: tuple(value.shape) for name, value in found.items()} == {
            f"{kind}.projection.{part}": shape
            for kind in ("now", "average")
            for part, shape in (("weight", (3, 96)), ("bias", (3,)))
        }
    before, after = tensors["step-00000005"], tensors["step-00000006"]
    for part in ("weight", "bias"):
        assert not torch.equal(before[f"now.projection.{part}"], after[f"now.projection.{part}"])
        average = 0.8 * before[f"average.projection.{part}"] + 0.2 * after[f"now.projection.{part}"]
        torch.testing.assert_close(after[f"average.projection.{part}"], average)
    records = read_metrics(whole / "metrics.jsonl", "train")
    assert len(records) == 6
    for record in records:
        shared = 0.1 * record["label_loss"] + 0.9 * record["distillation_loss"]
        assert record["loss"] == pytest.approx(shared + 0.3 * record["projection_loss"], rel=1e-5)
    student = load_student(whole)
    card = student.card
    assert not any("projection" in name for name in student.state_dict())
    assert card.provenance["objective"] == OBJECTIVE
    assert card.provenance["config"]["objective_options"] == ["weight=0.3"]


@pytest.mark.parametrize(("call", "step"), [(2, 2), (3, 3), (6, 6)])
def test_a_stopped_run_of_the_objective_ends_as_one_that_was_not(
    call: int, step: int, whole: Path, tiny_store: Path, tiny_logits: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_at_call(patch, call)
        assert pretrain.main(pretraining(tiny_store, tiny_logits, out)) == STOPPED
    assert newest(out).name == f"step-{step:08d}"
    torch.rand(7)  # where the global generator stands has no say
    assert pretrain.main(pretraining(tiny_store, tiny_logits, out)) == 0
    assert_same_result(whole, out)


def test_another_objective_or_another_option_is_another_run(
    whole: Path, tiny_store: Path, tiny_logits: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_at_call(patch, 1)
        assert pretrain.main(pretraining(tiny_store, tiny_logits, out)) == STOPPED
    assert pretrain.main(pretraining(tiny_store, tiny_logits, out, "--objective-options", "weight=0.4")) == 2
    assert 'objective_options: ["weight=0.3"] -> ["weight=0.4"]' in capsys.readouterr().err
    plain = ["--objective", "distillation", "--objective-options"]
    assert pretrain.main(pretraining(tiny_store, tiny_logits, out, *plain)) == 2
    assert f'objective: "{OBJECTIVE}" -> "distillation"' in capsys.readouterr().err
    # Accepted all the same, a checkpoint with weights that the objective does not have is told plainly.
    assert pretrain.main(pretraining(tiny_store, tiny_logits, out, *plain, "--accept-changes")) == 2
    shown = capsys.readouterr().err
    assert "step-00000001 does not fit this run" in shown
    assert "projection" in shown


WRONG = {
    "no such name": (
        ["--objective", "kindness"],
        "unknown objective 'kindness'; choices: distillation, soft-targets, pseudo-labels, embedding, online, mean-teacher, or MODULE:CLASS",
    ),
    "no such module": (["--objective", "no_such_module:Own"], "there is no module 'no_such_module'"),
    "no such class": (["--objective", "my_objective:Other"], "my_objective has no 'Other'"),
    "no objective": (["--objective", "my_objective:ProjectionOptions"], "a subclass of kd.objectives.base.Objective"),
    "no class at all": (["--objective", "json:dumps"], "a subclass of kd.objectives.base.Objective"),
    "unknown option": (
        ["--objective-options", "colour=red"],
        "unknown option 'colour' of objective my_objective:ProjectedDistillation; choices: weight",
    ),
    "a value that is not allowed": (["--objective-options", "weight=-1"], "weight must be positive; found -1"),
    "a value of another kind": (["--objective-options", "weight=heavy"], "has a value of the wrong type"),
    "an option of one without": (
        ["--objective", "distillation", "--objective-options", "weight=1"],
        "unknown option 'weight' of objective distillation; choices: none",
    ),
    "no value": (["--objective-options", "weight"], "options must be written as NAME=VALUE; found 'weight'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_objective_is_one_plain_message(
    case: str, outside: Path, tiny_store: Path, tiny_logits: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given, message = WRONG[case]
    with pytest.raises(SystemExit) as stopped:
        sys.exit(pretrain.main(pretraining(tiny_store, tiny_logits, tmp_path / "run", *given)))
    assert stopped.value.code == 2
    shown = re.sub(r"[\s│]+", " ", capsys.readouterr().err)
    assert message in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "run").exists()


def test_an_objective_may_refuse_a_batch(
    outside: Path, tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = pretraining(tiny_store, tmp_path, tmp_path / "run", "--label-weight", "1")
    command = [*command[:2], *command[4:]]  # without --logits
    assert pretrain.main(command) == 2
    assert "this objective needs teachers; give --logits" in capsys.readouterr().err


def test_what_it_trained_is_evaluated_and_reported(
    whole: Path, tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "scores.json"
    assert evaluate.main(["--tagger", str(whole), "--clips", str(tiny_store), "--workers", "0", "--out", str(out)]) == 0
    assert 0.0 <= json.loads(out.read_text())["mAP"] <= 1.0
    assert report.main([str(whole)]) == 0
    assert OBJECTIVE in (whole / "report.md").read_text() + (whole / "report.html").read_text()


# -- In two processes --------------------------------------------------------------------------------------------------


def load_script(name: str) -> ModuleType:
    """A script of tests/robustness/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROBUSTNESS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def environments(processes: int, watched: Path) -> list[dict[str, str]]:
    """What a launcher would give each rank."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    several = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WATCHED": str(watched)}
    return [{**several, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def test_two_processes_keep_the_objectives_weights_equal_and_survive_a_kill(
    outside: Path, tiny_store: Path, tiny_logits: Path, tmp_path: Path
) -> None:
    preloaded = load_script("preloaded")
    log = tmp_path / "output.log"
    options = ["--batch-size", "2", "--objective", "watched_objective:Watched", "--sync-batch-norm"]
    with preloaded.Preloaded({"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}) as starter:

        def start(out: Path, watched: Path) -> list:
            command = pretraining(tiny_store, tiny_logits, out, *options)
            return [starter.start(command, environment, log) for environment in environments(2, watched)]

        out, watched = tmp_path / "run", tmp_path / "whole-"
        codes = [run.wait() for run in start(out, watched)]
        assert codes == [0, 0], log.read_text()[-3000:]
        seen = [(tmp_path / f"whole-{rank}").read_text().splitlines() for rank in (0, 1)]
        assert seen[0] == seen[1]
        assert len(set(seen[0])) == len(seen[0]) == 6

        killed, watched = tmp_path / "killed", tmp_path / "killed-"
        runs = start(killed, watched)
        while not checkpoints(killed / "checkpoints"):
            assert all(run.running() for run in runs), log.read_text()[-3000:]
            time.sleep(0.01)
        for run in runs:
            run.send(signal.SIGKILL)
        assert [run.wait() for run in runs] == [-signal.SIGKILL] * 2
        assert not (killed / "student.safetensors").exists()
        codes = [run.wait() for run in start(killed, watched)]
        assert codes == [0, 0], log.read_text()[-3000:]
    assert_same_result(out, killed)


# -- A student ---------------------------------------------------------------------------------------------------------


def test_a_student_with_the_objective_is_stopped_goes_on_and_is_reported(
    outside: Path, tiny_store: Path, tiny_logits: Path, tmp_path: Path
) -> None:
    out, other = tmp_path / "run", tmp_path / "other"
    options = ["--student", STUDENT, "--student-options", "channels=5", "--valid-folds", "1"]
    assert pretrain.main(pretraining(tiny_store, tiny_logits, other, *options)) == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_at_call(patch, 4, signal.SIGUSR1)
        assert pretrain.main(pretraining(tiny_store, tiny_logits, out, *options)) == STOPPED
    assert pretrain.main(pretraining(tiny_store, tiny_logits, out, *options)) == 0
    assert_same_result(other, out)
    assert load_file(newest(out) / "objective.safetensors")["now.projection.weight"].shape == (3, 5)
    assert evaluate.main(["--tagger", str(out), "--clips", str(tiny_store), "--workers", "0"]) == 0
    assert report.main([str(out)]) == 0
    assert STUDENT in (out / "report.md").read_text() + (out / "report.html").read_text()


# -- A task ------------------------------------------------------------------------------------------------------------


def write_kitchen(folder: Path) -> Path:
    """Four sounds of each verb with each noun, in two folds."""
    folder.mkdir()
    for index, (verb, noun, number) in enumerate(itertools.product(("open", "shut"), ("door", "tap"), range(4))):
        time_axis = np.arange(4000) / 8000
        tone = np.sin(2 * np.pi * (300 if verb == "open" else 900) * time_axis)
        noise = np.random.default_rng(index).standard_normal(4000) * (0.3 if noun == "tap" else 0.02)
        soundfile.write(folder / f"{verb}-{noun}-{number}.wav", 0.3 * tone + noise, 8000)
    return folder


def write_kitchen_logits(path: Path, data: Path) -> Path:
    clips, _ = read_task(get_task(TASK), data)
    write_logit_store(
        path,
        clip_ids=clips.clip_ids,
        audio_digests=np.zeros((len(clips), 16), dtype=np.uint8),
        logit_blocks=[(4 * clips.targets(np.arange(len(clips))) - 2).astype(np.float16)],
        class_names=clips.class_names,
        teacher={"name": "own", "fingerprint": "0" * 32, "link": "sigmoid"},
        clip_store_fingerprint="0" * 32,
    )
    return path


def test_a_task_of_two_groups_with_student_and_objective_from_outside(
    outside: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = write_kitchen(tmp_path / "kitchen")
    logits = write_kitchen_logits(tmp_path / "logits.h5", data)
    command = ["--task", TASK, "--data", str(data), "--logits", str(logits), "--label-weight", "0.4", *SHORT]
    command += ["--student", STUDENT, "--batch-size", "4", "--eval-batch-size", "4", "--valid-share", "0.25"]
    command += ["--early-stopping", "accuracy", "--probe", *WITH_OBJECTIVE]
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert finetune.main([*command, "--out", str(whole)]) == 0
    results = json.loads((whole / "results.json").read_text())
    assert [group["name"] for group in results["label_groups"]] == ["verb", "noun"]
    assert results["headline"]["metric"] == "accuracy"
    assert [run["fold"] for run in results["runs"]] == [1, 2]
    for run in results["runs"]:
        with np.load(whole / run["folder"] / "predictions.npz", allow_pickle=False) as arrays:
            logits_of_clips, targets = arrays["logits"], arrays["targets"]
        right = [
            logits_of_clips[:, part].argmax(1) == targets[:, part].argmax(1) for part in (slice(0, 2), slice(2, 4))
        ]
        assert run["metrics"]["verb/accuracy"] == right[0].mean()
        assert run["metrics"]["accuracy"] == (right[0] & right[1]).mean()
        losses = read_metrics(whole / run["folder"] / "metrics.jsonl", "train")
        assert {"loss", "label_loss", "distillation_loss", "projection_loss"} <= losses[0].keys()

    with pytest.MonkeyPatch.context() as patch:
        stop_at_call(patch, 3)  # in the first fold
        assert finetune.main([*command, "--out", str(out)]) == STOPPED
    with pytest.MonkeyPatch.context() as patch:
        stop_at_call(patch, 3, signal.SIGUSR1)  # two batches later
        assert finetune.main([*command, "--out", str(out)]) == STOPPED
    assert finetune.main([*command, "--out", str(out)]) == 0
    for fold in ("fold1", "fold2"):
        assert_same_result(whole / fold, out / fold)
        assert (whole / fold / "result.json").read_text() == (out / fold / "result.json").read_text()
    capsys.readouterr()
    assert report.main([str(out)]) == 0
    text = (out / "report.md").read_text()
    assert "verb" in text
    assert "noun" in text


def test_a_task_of_the_package_takes_student_and_objective_from_outside(
    outside: Path, tmp_path: Path, make_task_folder: Callable[..., Path]
) -> None:
    """A fold that is stopped goes on to the same tensors of the objective, with layers learning at different rates."""
    data = make_task_folder("esc50", per_fold=4)
    clips, _ = read_task(get_task("esc50"), data)
    write_logit_store(
        tmp_path / "logits.h5",
        clip_ids=clips.clip_ids,
        audio_digests=np.zeros((len(clips), 16), dtype=np.uint8),
        logit_blocks=[(4 * clips.targets(np.arange(len(clips))) - 2).astype(np.float16)],
        class_names=clips.class_names,
        teacher={"name": "own", "fingerprint": "0" * 32, "link": "sigmoid"},
        clip_store_fingerprint="0" * 32,
    )
    command = ["--task", "esc50", "--data", str(data), "--logits", str(tmp_path / "logits.h5"), *SHORT, "--no-report"]
    command += ["--student", STUDENT, "--batch-size", "6", "--fold", "2", "3", "--layer-decay", "0.5", *WITH_OBJECTIVE]
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert finetune.main([*command, "--out", str(whole)]) == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_at_call(patch, 9)  # the first step of the second fold
        assert finetune.main([*command, "--out", str(out)]) == STOPPED
    assert not (out / "fold3" / "result.json").exists()
    assert finetune.main([*command, "--out", str(out)]) == 0
    for fold in ("fold2", "fold3"):
        assert_same_result(whole / fold, out / fold)
    one, other = (load_file(newest(whole / fold) / "objective.safetensors") for fold in ("fold2", "fold3"))
    assert not torch.equal(one["now.projection.weight"], other["now.projection.weight"])
