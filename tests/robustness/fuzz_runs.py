"""Targets of tests/robustness/fuzz.py: runs that go on, what reports and comparisons read of them, and command lines."""

import importlib
import io
import json
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from accelerate import Accelerator
from fuzz_damage import ODD_TEXTS, change_content
from fuzz_stores import CLASSES
from fuzz_targets import TREE, Target, in_its_place, need
from timm.utils import ModelEmaV3
from torch import nn

from audio_datasets.system.files import read_json, write_json
from audio_datasets.system.randomness import generator
from kd.cli import COMMANDS
from kd.compare import CompareConfig, compare
from kd.objectives.base import Objective
from kd.report import write_report
from kd.reports.run_reader import RunFolder
from kd.run_folder.metrics_log import MetricsLog
from kd.run_folder.start import enter_run_folder
from kd.training.checkpoint import DIGESTS, digests_of, load_checkpoint, resume_state, save_state
from kd.training.early_stopping import BEST_FILE, EarlyStopping
from kd.training.learner import Learner
from kd.training.loop import LoopConfig, Run
from kd.training.optimization import OptimizerConfig, create_optimizer
from kd.training.schedule import ScheduleConfig
from kd.training.state import TrainState
from students import create_student
from students.card import save_student
from students.frontend import LogMelConfig

# -- Runs that go on ---------------------------------------------------------------------------------------------------


class NoObjective(Objective):
    """An objective without parameters, for a learner whose loss is computed elsewhere."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layer(inputs))


@cache
def cpu() -> Accelerator:
    return Accelerator(cpu=True)


def begun(folder: Path) -> tuple[TrainState, Run, MetricsLog]:
    """A run of a tiny network, before its first step."""
    torch.manual_seed(0)
    network = Network()
    config = OptimizerConfig(optimizer="adamw", weight_decay=0.01)
    learner = Learner(network, NoObjective())
    state = TrainState(learner, create_optimizer(config, network), ModelEmaV3(learner, decay=0.9))
    run = Run(folder, LoopConfig(), config, ScheduleConfig())
    return state, run, MetricsLog(run.metrics_path, cpu())


def step(state: TrainState) -> None:
    state.learner.student(torch.arange(24.0).reshape(6, 4).sin()).square().mean().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.ema.update(state.learner)
    state.step += 1
    state.step_in_epoch += 1


def values_of(state: TrainState) -> dict[str, object]:
    """All that a run goes on from."""
    averages = list(state.optimizer.state.values())
    groups = [
        {name: value for name, value in group.items() if name != "params"} for group in state.optimizer.param_groups
    ]
    position = (state.epoch, state.step_in_epoch, state.step, state.skipped_steps)
    return {
        "student": state.learner.student.state_dict(),
        "ema": state.ema.module.student.state_dict(),
        "averages": averages,
        "position": (position, groups, state.losses.batches, {k: float(v) for k, v in state.losses.sums.items()}),
    }


def checkpoint_files(folder: Path) -> list[Path]:
    root = folder / TREE
    root.mkdir()
    state, run, log = begun(root)
    log.write("train", 0, 0, {"loss": 1.0})
    for _ in range(2):
        step(state)
        state.losses.add({"loss": torch.tensor(0.5)})
    log.write("validation", 2, 0, {"mAP": 0.5})
    save_state(cpu(), state, run.checkpoint_folder, 2, log)
    log.write("train", 3, 0, {"loss": 0.1})  # after the checkpoint: cut off when the run goes on
    checkpoint = next(run.checkpoint_folder.iterdir())
    names = ("student.safetensors", "ema.safetensors", "optimizer.pt", "state.json", DIGESTS)
    return [*(checkpoint / name for name in names), run.metrics_path]


def read_checkpoint(path: Path, good: Path) -> None:
    """A run goes on from nothing but what was saved, with the log as it was."""
    tree = in_its_place(path, good)
    checkpoint = next((tree / "checkpoints").iterdir())
    load_checkpoint(checkpoint)
    state, run, log = begun(tree)
    need(resume_state(cpu(), state, run.checkpoint_folder, log), "the checkpoint is not found")
    # The good run's log is cut back as well, when it goes on: for the first input and for good.
    original = next(parent for parent in good.parents if parent.name == TREE)
    expected, good_run, good_log = begun(original)
    resume_state(cpu(), expected, good_run.checkpoint_folder, good_log)
    torch.testing.assert_close(values_of(state), values_of(expected), rtol=0, atol=0, msg="another state")
    need(run.metrics_path.read_bytes() == good_run.metrics_path.read_bytes(), "another log")


def read_sealed_checkpoint(path: Path, good: Path) -> None:
    """Whoever writes a checkpoint can write digests that fit: what is taken is then of the right types and shapes."""
    tree = in_its_place(path, good)
    checkpoint = next((tree / "checkpoints").iterdir())
    write_json(checkpoint / DIGESTS, digests_of(checkpoint))
    state, run, log = begun(tree)
    settings = [group["betas"] for group in state.optimizer.param_groups]
    resume_state(cpu(), state, run.checkpoint_folder, log)
    need(all(type(number) is int and number >= 0 for number in values_of(state)["position"][0]), "no position")
    need([group["betas"] for group in state.optimizer.param_groups] == settings, "other settings of the optimizer")
    shapes = {name: value.shape for name, value in Network().state_dict().items()}
    step(state)
    state.losses.add({"loss": torch.tensor(0.5)})
    state.losses.take(cpu())
    need({name: value.shape for name, value in state.learner.student.state_dict().items()} == shapes, "other shapes")


def best_files(folder: Path) -> list[Path]:
    torch.manual_seed(1)
    stopping = EarlyStopping("mAP", 3, folder, cpu())
    stopping.keep_if_best({"mAP": 0.5}, Network(), folder / "metrics.jsonl")
    return [folder / BEST_FILE]


def read_best(path: Path, good: Path) -> None:
    path.rename(path.with_name(BEST_FILE))
    networks = [Network(), Network()]
    for network, folder in zip(networks, (path.parent, good.parent), strict=True):
        EarlyStopping("mAP", 3, folder, cpu()).load_best(network)
    states = [network.state_dict() for network in networks]
    need(all(torch.equal(value, states[1][name]) for name, value in states[0].items()), "other weights")


DESCRIPTION = {
    "clips": ["a.h5"],
    "student": "mn10",
    "loop": {"batch_size": 8, "gradient_accumulation_steps": 1, "epochs": 3},
    "processes": 2,
    "inputs": {"clips": "0" * 32},
    "workers": 4,
}


def description_files(folder: Path) -> list[Path]:
    root = folder / TREE
    write_json(
        root / "config.json", {**DESCRIPTION, "finished": True, "accepted_changes": [{"at": "x", "changes": []}]}
    )
    for name in ("student.safetensors", "student.json"):
        (root / name).write_bytes(b"x")
    return [root / "config.json"]


def read_description(path: Path, good: Path) -> None:
    """A run goes on only with the configuration that it was begun with."""
    tree = in_its_place(path, good)
    text = (tree / "config.json").read_bytes()
    run = enter_run_folder(tree, DESCRIPTION, changes_nothing=("workers",))
    found = json.loads(text)
    same = [{name: value for name, value in content.items() if name != "workers"} for content in (found, DESCRIPTION)]
    need(same[0].items() >= same[1].items(), "another configuration")
    need(run.state == ("finished" if found.get("finished") is True else "unfinished"), f"the run is {run.state}")
    need(read_json(tree / "config.json").items() >= (found if run.state == "finished" else DESCRIPTION).items(), "lost")


# -- Run folders -------------------------------------------------------------------------------------------------------


def write_part(folder: Path, one_label: bool, number: int) -> dict[str, object]:
    """What a part of a fine-tuning run leaves."""
    draws = generator(5, "fuzz runs", 0, number)
    targets = np.eye(3)[np.arange(6) % 3] if one_label else (draws.random((6, 3)) < 0.5).astype(np.float32)
    arrays = {
        "clip_ids": np.array([f"clip {number} {index}" for index in range(6)]),
        "logits": (3 * targets + draws.standard_normal((6, 3))).astype(np.float32),
        "targets": targets.astype(np.float32),
        "mask": np.ones((6, 3), bool) if one_label else draws.random((6, 3)) < 0.8,
        "class_names": np.array(CLASSES),
        "source": np.array([f"/nowhere/{index}.wav" for index in range(6)]),
        "device": np.array(list("aabbcc")),
        "device_seen": np.array([True] * 4 + [False] * 2),
    }
    folder.mkdir(parents=True)
    np.savez(folder / "predictions.npz", **arrays)
    np.savez(folder / "validation_predictions.npz", **arrays)
    records = [
        record
        for epoch in range(2)
        for record in (
            {"kind": "train", "step": 2 * epoch + 2, "epoch": epoch, "loss": 0.5 / (epoch + 1), "learning_rate": 1e-3},
            {"kind": "validation", "step": 2 * epoch + 2, "epoch": epoch, "accuracy": 0.5, "mAP": 0.25, "absent": []},
        )
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    metrics = {"accuracy": 0.8 + 0.01 * number, "mAP": 0.5, "log_loss": 0.5, "absent": []}
    return {"seed": 0, "fold": number % 2 + 1, "metrics": metrics, "folder": folder.name}


def run_files(folder: Path) -> list[Path]:
    """Two runs of two folds, of one label a clip and of several."""
    root, files = folder / TREE, []
    for place, name in enumerate(("one", "several")):
        run = root / name
        runs = [write_part(run / f"fold{fold}", name == "one", 2 * place + fold - 1) for fold in (1, 2)]
        metric = "accuracy" if name == "one" else "mAP"
        values = [part["metrics"][metric] for part in runs]
        write_json(
            run / "results.json",
            {
                "task": "noises",
                "what": "fine-tuned",
                "labels": name,
                "class_names": list(CLASSES),
                "headline": {"metric": metric, "mean": float(np.mean(values)), "std": 0.1, "values": values, "spread_over": "folds"},
                "runs": runs,
                "command": ["kd", "finetune", "--data", "my sounds"],
                "versions": {"torch": "2.14.1"},
            },
        )  # fmt: skip
        write_json(run / "config.json", {"task": "noises", "student": "mn01", "loop": {"epochs": 2}, "init": None})
        files += [run / "results.json", run / "config.json"]
        files += [run / "fold2" / item for item in ("predictions.npz", "metrics.jsonl", "validation_predictions.npz")]
    torch.manual_seed(0)
    student = create_student("mn01", num_classes=3, width=0.1)
    save_student(root / "one" / "fold1", student, CLASSES, LogMelConfig(), {"clip_seconds": 1.0, "command": ["kd"]})
    unfinished = root / "unfinished"  # a pretraining run, and nothing but its curves
    shutil.copytree(root / "one" / "fold1", unfinished / "fold1")
    write_json(unfinished / "config.json", {"task": "noises"})
    write_json(unfinished / "fold1" / "result.json", {"metrics": {"accuracy": 0.5}})
    return [*files, root / "one" / "fold1" / "student.json", unfinished / "fold1" / "result.json"]


def read_run(path: Path, good: Path) -> None:
    """A report and a comparison of what is accepted: text in UTF-8 that holds no tag of what the files say."""
    compares = len(path.read_bytes()) % 4 == 0
    tree = in_its_place(path, good)
    run = tree / good.relative_to(next(parent for parent in good.parents if parent.name == TREE)).parts[0]
    folder = RunFolder.read(run)
    for part in folder.parts:
        need(part.folder.is_relative_to(run), "a part that lies outside")
        for predictions in (part.predictions, part.validation):
            need(predictions is None or np.isfinite(predictions.logits).all(), "logits that are not finite")
    if compares:
        compare(
            CompareConfig((tree / "one" if run.name != "one" else tree / "several", run), out=tree / "compare.html")
        )
    else:
        write_report(run)
    pages = [tree / "compare.html"] if compares else [run / "report.html", run / "report.md"]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        need(page.suffix == ".md" or "<script>alert" not in text, "a tag of a stranger")


# -- Command lines -----------------------------------------------------------------------------------------------------


@cache
def flags_of(name: str) -> tuple[str, ...]:
    """The flags that a command's help names."""
    text = io.StringIO()
    with redirect_stdout(text), suppress(SystemExit):
        importlib.import_module(COMMANDS[name][0]).main(["--help"])
    return tuple(sorted({*re.findall(r"--[a-z][a-z0-9.-]*[a-z0-9]", text.getvalue())} - {"--help"}))


class Parsed(BaseException):
    """Ends a command where its work would begin."""


def command_lines(folder: Path) -> list[Path]:
    """One good command line for each command that needs one; the others are made of the names of flags."""
    lines = {
        "pack": ["sounds", "--out", "clips.h5"],
        "teach": ["--clips", "clips.h5", "--teacher", "runs/mn10", "--out", "logits"],
        "verify": ["--logits", "a.h5:0.5", "b.h5", "--clips", "clips.h5"],
        "pretrain": ["--clips", "clips.h5", "--logits", "a.h5", "--out", "run", "--recipe", "dymn_m"],
        "finetune": ["--task", "esc50", "--data", "ESC-50", "--out", "run", "--seeds", "0", "1"],
        "import-logits": ["--logits", "a.npy", "--index", "a.json", "--out", "a.h5", "--class-names", "names.txt"],
    }
    for name in COMMANDS:
        flags_of(name)  # found before this process forks
    files = []
    for name, arguments in lines.items():
        files.append(folder / f"{name}.json")
        write_json(files[-1], [name, *arguments])
    return files


def change_command_line(path: Path, draws: np.random.Generator) -> None:
    """Flags and values of any command, each value of any kind."""
    numbers = (
        "-1",
        "0",
        "1",
        "2",
        "1.5",
        "-0.0",
        "nan",
        "inf",
        "1e400",
        "9" * 400,
        "0x10",
        "1_0",
        "True",
        "None",
        "none",
        "1,2",
        "[1]",
    )
    name, *line = read_json(path)
    if draws.random() < 0.4:
        name, line = list(COMMANDS)[int(draws.integers(len(COMMANDS)))], []
    for _ in range(int(draws.integers(1, 4))):
        values = (ODD_TEXTS, numbers)[int(draws.integers(2))]
        value = values[int(draws.integers(len(values)))]
        flag = flags_of(name)[int(draws.integers(len(flags_of(name))))]
        kind, place = int(draws.integers(8)), int(draws.integers(len(line) + 1))
        if kind == 0 and line:
            line[place % len(line)] = value
        elif kind == 1 and line:
            del line[place % len(line)]
        elif kind == 2:
            line.append(f"{flag}={value}")
        else:
            line += [flag, *[value] * int(draws.choice([0, 1, 1, 1, 1, 2]))]
    path.write_text(json.dumps([name, *line]), encoding="utf-8")


def read_command_line(path: Path, good: Path) -> None:
    """As a shell would give it: exit code 2 and a message, or a configuration. No work is begun."""
    try:
        name, *arguments = json.loads(path.read_text(encoding="utf-8"))
        module = importlib.import_module(COMMANDS[name][0])
    except (ValueError, TypeError, KeyError) as error:  # no command line
        raise ValueError(f"{path}: {error}") from error
    if not all(isinstance(argument, str) and "\0" not in argument for argument in arguments) or {"-h", "--help"} & {
        *arguments
    }:
        raise ValueError(f"{path}: no arguments")
    parse = module.parse

    def parse_only(*given: object, **settings: object) -> None:
        parse(*given, **settings)
        raise Parsed

    code, said = None, io.StringIO()
    with mock.patch.object(module, "parse", parse_only), redirect_stderr(said):
        try:
            code = module.main(arguments)
        except Parsed:
            return
        except SystemExit as stopped:
            code = stopped.code
    need(code == 2, f"exit code {code}")
    need(said.getvalue().strip() and "Traceback" not in said.getvalue(), "no plain message")
    raise ValueError(f"{path}: exit code 2")


TARGETS = {
    "checkpoint": Target(checkpoint_files, read_checkpoint, 6, change=change_content),
    "sealed checkpoint": Target(checkpoint_files, read_sealed_checkpoint, 5, change=change_content, changed=0.7),
    "best weights": Target(best_files, read_best, 2, change=change_content),
    "run description": Target(description_files, read_description, 4, change=change_content),
    "run folder": Target(run_files, read_run, 6, change=change_content, changed=0.7),
    "command line": Target(command_lines, read_command_line, 6, change=change_command_line, changed=1.0),
}
