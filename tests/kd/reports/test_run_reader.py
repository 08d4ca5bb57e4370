"""Run folders are read as they are, finished or not; damaged ones get one plain message."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kd.reports.run_reader import Part, Predictions, RunFolder, flat_settings

Make = Callable[..., Path]


def test_a_fine_tuning_run(make_run: Make) -> None:
    run = RunFolder.read(make_run("run", seeds=(3,), folds=(1, 2)))
    assert run.task == "noises"
    assert run.finished
    assert run.one_label
    assert run.command == "kd finetune --task noises --data 'my sounds'"
    assert run.headline.values == (0.80, 0.81)
    assert [(part.seed, part.fold, part.label) for part in run.parts] == [(3, 1, "fold 1"), (3, 2, "fold 2")]
    assert [len(predictions.clip_ids) for _, predictions in run.predictions] == [30, 30]
    assert run.card.config.name == "mn01"


def test_parts_are_named_by_what_differs(make_run: Make) -> None:
    both = RunFolder.read(make_run("both", seeds=(0, 1), folds=(1, 2)))
    assert both.parts[-1].label == "seed 1, fold 2"
    alone = RunFolder.read(make_run("alone", folds=(), one_label=False))
    assert [part.label for part in alone.parts] == [""]
    assert alone.headline.std is None
    assert not alone.one_label


def test_a_run_that_has_not_finished(make_run: Make) -> None:
    path = make_run("run", seeds=(0, 1), folds=(1, 2))
    (path / "results.json").unlink()
    run = RunFolder.read(path)
    assert not run.finished
    assert run.headline is None
    assert [part.label for part in run.parts] == [f"seed {seed}, fold {fold}" for seed in (0, 1) for fold in (1, 2)]
    assert run.class_names == ("hiss", "hum, low", "click")
    assert [part.metrics["accuracy"] for part in run.parts] == pytest.approx([0.80, 0.81, 0.82, 0.83])


def test_a_linear_probe_within_a_run(make_run: Make) -> None:
    path = make_run("run", config={"seed": 7})
    assert RunFolder.read(path).probe is None
    make_run("run/probe", folds=(1, 2, 3))
    (path / "probe" / "config.json").unlink()
    probe = RunFolder.read(path).probe
    assert len(probe.headline.values) == 3
    assert probe.config["seed"] == 7
    assert [part.folder.name for part in RunFolder.read(path).parts] == ["fold1", "fold2"]
    alone = make_run("alone", config={"probe_only": True})
    (alone / "results.json").unlink()
    make_run("alone/probe", folds=(1, 2, 3))
    assert len(RunFolder.read(alone).parts) == 3


def test_curves_are_means_of_an_epoch(tmp_path: Path) -> None:
    records = [
        {"kind": "train", "step": 1, "epoch": 0, "loss": 1.0, "learning_rate": 0.1},
        {"kind": "train", "step": 2, "epoch": 0, "loss": 0.5, "learning_rate": 0.2},
        {"kind": "validation", "step": 2, "epoch": 0, "mAP": 0.4, "classes_left_out": []},
        {"kind": "train", "step": 3, "epoch": 1, "loss": 0.25, "learning_rate": 0.3},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    part = Part(tmp_path, None)
    np.testing.assert_array_equal(part.curve("train", "loss"), [[1, 2], [0.75, 0.25]])
    np.testing.assert_array_equal(part.curve("train", "learning_rate"), [[1, 2], [0.2, 0.3]])
    assert part.measured("train") == ["loss", "learning_rate"]
    assert part.measured("validation") == ["mAP"]
    assert Part(tmp_path / "none", None).records == []


def good() -> dict[str, np.ndarray]:
    return {"clip_ids": np.array(["a", "b"]), "logits": np.zeros((2, 3)), "targets": np.eye(3)[:2]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": None}, "has no 'logits'; found 'clip_ids', 'targets'"),
        ({"logits": np.zeros((2, 4))}, "do not fit 3 class names"),
        ({"targets": np.zeros((3, 3))}, "must be"),
        ({"mask": np.zeros((2, 2))}, "must be"),
        ({"logits": np.full((2, 3), np.nan)}, "2 clips have logits that are not finite"),
        ({"clip_ids": np.array(["a", "a"])}, "more than once"),
        ({"device": np.array(["a"])}, "devices"),
        ({"class_names": np.array(["x", "y", "z"])}, "another class list"),
        ({"clip_ids": np.array(["a", object()])}, "plain arrays"),
    ],
)
def test_predictions_that_do_not_fit(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "predictions.npz"
    np.savez(path, **{name: values for name, values in {**good(), **change}.items() if values is not None})
    with pytest.raises(ValueError, match=message) as raised:
        Predictions.read(path, ("hiss", "hum", "click"))
    assert str(path) in str(raised.value)


def test_predictions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "predictions.npz"
    np.savez(path, **good(), mask=np.array([[1, 1, 0], [1, 1, 1]]), device=np.array(["s1", "a"]))
    found = Predictions.read(path, ("hiss", "hum", "click"))
    assert found.targets.dtype == bool
    assert found.known.tolist() == [[True, True, False], [True, True, True]]
    assert found.devices.tolist() == ["s1", "a"]
    assert found.device_seen is None
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="damaged"):
        Predictions.read(path, ("hiss", "hum", "click"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "is not a run folder: it has neither config.json nor results.json"),
        ("config.json", "[]", "must contain a JSON object; found list"),
        ("results.json", '{"task": "x"}', "incomplete or damaged"),
        ("results.json", "{", "not valid JSON"),
        ("results.json", "[" * 100_000, "nested too deeply"),
    ],
)
def test_a_damaged_run(make_run: Make, name: str, content: str | None, message: str) -> None:
    path = make_run("run", folds=())
    if content is None:
        (path / "config.json").unlink()
        (path / "results.json").unlink()
    else:
        (path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        RunFolder.read(path)


def test_a_torn_log(make_run: Make) -> None:
    path = make_run("run", folds=())
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "tr')
    with pytest.raises(ValueError, match="metrics.jsonl is damaged, or being written to"):
        _ = RunFolder.read(path).parts[0].records


def test_settings_as_one_level() -> None:
    config = {"loop": {"epochs": 3}, "folds": [1, 2], "logits": [], "init": None, "seed": 0}
    assert flat_settings(config) == {"loop.epochs": "3", "folds": "1 2", "logits": "–", "init": "–", "seed": "0"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"runs": [{"folder": "../other", "metrics": {}}]},
            "the folder of a part must be inside the run folder; found '../other'",
        ),
        ({"runs": [{"folder": "/etc", "metrics": {}}]}, "the folder of a part must be inside the run folder"),
        ({"runs": [{"folder": "fold1", "metrics": [], "seed": 0}]}, "metrics has the wrong type"),
        ({"runs": []}, "there are no runs"),
        ({"class_names": ["a", "a"]}, "class names must be unique"),
        ({"class_names": ["\ud800"]}, "must be text"),
        ({"headline": {"metric": "mAP", "mean": 10**400, "values": [0.5]}}, "the headline's mean must be a number"),
        ({"headline": 3}, "headline has the wrong type"),
        ({"labels": "two"}, "labels must be one or several"),
        ({"command": {"a": 1}}, "command has the wrong type"),
    ],
)
def test_results_that_do_not_fit(make_run: Make, change: dict, message: str) -> None:
    path = make_run("run", folds=()) / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as raised:
        RunFolder.read(path.parent)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("record", ["[]", '{"step": 1}', '{"kind": "train", "step": 1, "epoch": "1"}', '{"kind": 3}'])
def test_records_of_another_kind(tmp_path: Path, record: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f"{record}\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged.* a record"):
        _ = Part(tmp_path, None).records
