"""The results of a run: mean and spread, and the files that tell of them, of today and of version 0.1."""

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from audio_datasets.tasks.label_space import LabelGroup, LabelSpace
from kd.reports.run_reader import RunFolder
from kd.run_folder.results import Headline, Results, RunResult, read_result

NAMES = ("cut", "wash", "knife", "pan")
SPACE = LabelSpace((LabelGroup("verb", NAMES[:2], True), LabelGroup("noun", NAMES[2:], True)))


def run(seed: int | None, fold: int | None, accuracy: float) -> RunResult:
    return RunResult(seed, fold, f"fold{fold}", {"accuracy": accuracy, "classes": {"cut": {"clips": 3}}}, 1, 2)


def test_the_spread_is_over_folds_or_over_the_means_of_seeds() -> None:
    folds = [run(0, 1, 0.5), run(0, 2, 0.9), run(0, 3, 0.7)]
    found = Headline.of("accuracy", folds)
    assert found.values == (0.5, 0.9, 0.7)
    assert found.mean == pytest.approx(statistics.mean([0.5, 0.9, 0.7]))
    assert found.std == pytest.approx(statistics.stdev([0.5, 0.9, 0.7]))
    assert found.over == "folds"

    seeds = [*folds, run(5, 1, 0.1), run(5, 2, 0.2), run(5, 3, 0.6)]
    found = Headline.of("accuracy", seeds)
    assert found.values == pytest.approx((0.7, 0.3))
    assert found.mean == pytest.approx(0.5)
    assert found.std == pytest.approx(statistics.stdev([0.7, 0.3]))
    assert found.over == "seeds"

    one = Headline.of("accuracy", [run(0, None, 0.25)])
    assert one == Headline("accuracy", (0.25,), 0.25, None, None)


def test_a_metric_that_is_not_defined_is_told_with_those_that_are() -> None:
    """As the share of clips that are right in every group, where no clip's labels are known in all of them."""
    partly = RunResult(0, 2, "fold2", {"accuracy": None, "verb/accuracy": 0.5, "noun/accuracy": 0.25})
    with pytest.raises(ValueError, match="not defined on the test clips of fold2; .* Defined: verb/accuracy, noun/"):
        Headline.of("accuracy", [run(0, 1, 0.5), partly])


def results(label_space: LabelSpace | None = SPACE) -> Results:
    runs = (run(0, 1, 0.5), run(0, 2, 0.9))
    return Results(
        task="kitchen",
        class_names=NAMES,
        headline=Headline.of("accuracy", runs),
        runs=runs,
        label_space=label_space,
        what="fine-tuned",
        command="kd finetune --task kitchen --data 'my sounds'",
        versions={"torch": "2.14.1"},
    )


@pytest.mark.parametrize("label_space", [SPACE, LabelSpace.single(NAMES, exclusive=False), None])
def test_what_is_written_is_read(label_space: LabelSpace | None, tmp_path: Path) -> None:
    results(label_space).write(tmp_path)
    assert Results.read(tmp_path) == results(label_space)


def test_a_runs_own_result_is_written_and_read(tmp_path: Path) -> None:
    assert read_result(tmp_path) is None
    one = run(3, None, 0.5)
    (tmp_path / "result.json").write_text(json.dumps(one.to_json()))
    assert read_result(tmp_path) == one
    # Version 0.1 had neither of the two counts at first.
    old = {name: value for name, value in one.to_json().items() if name not in ("skipped_clips", "accepted_changes")}
    (tmp_path / "result.json").write_text(json.dumps(old))
    assert read_result(tmp_path) == replace(one, skipped_clips=0, accepted_changes=0)
    (tmp_path / "result.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"result\.json is damaged"):
        read_result(tmp_path)


def of_version_0_1(**changes: Any) -> dict[str, Any]:
    """As ``kd finetune`` of version 0.1 wrote it."""
    runs = [{"seed": 0, "fold": 1, "folder": "fold1", "metrics": {"accuracy": 0.5}, "skipped_clips": 0}]
    return {
        "task": "esc50",
        "what": "fine-tuned",
        "labels": "one",
        "class_names": list(NAMES),
        "headline": {"metric": "accuracy", "mean": 0.5, "std": None, "values": [0.5], "spread_over": None},
        "runs": runs,
        "command": ["kd", "finetune", "--data", "my sounds"],
        "versions": {"torch": "2.14.1"},
        **changes,
    }


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("one", LabelSpace.single(NAMES, exclusive=True)),
        ("several", LabelSpace.single(NAMES, exclusive=False)),
        (None, None),
    ],
)
def test_results_of_version_0_1_are_read(labels: str | None, expected: LabelSpace | None, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(of_version_0_1(labels=labels)))
    found = Results.read(tmp_path)
    assert found.label_space == expected
    assert found.command == "kd finetune --data 'my sounds'"
    folder = RunFolder.read(tmp_path)
    assert folder.one_label is (labels != "several")
    assert folder.parts[0].fold == 1


DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "no runs": ({"runs": []}, "there are no runs"),
    "labels of another kind": ({"labels": "both"}, "labels must be one or several; found 'both'"),
    "no values": ({"headline": {"metric": "accuracy", "mean": 0.5, "values": []}}, "no values"),
    "no number": ({"headline": {"metric": "accuracy", "mean": 0.5, "values": ["x"]}}, "must be a number; found 'x'"),
    "not finite": ({"headline": {"metric": "accuracy", "mean": 1e999, "values": [0.5]}}, "mean must be a number"),
    "no name": ({"headline": {"metric": " ", "mean": 0.5, "values": [0.5]}}, "has no name"),
    "spread over what": ({"headline": {**of_version_0_1()["headline"], "spread_over": "days"}}, "seeds or folds"),
    "classes twice": ({"class_names": ["a", "a"]}, "a"),
    "other classes in the groups": (
        {"label_groups": LabelSpace.single(("x", "y"), exclusive=True).to_json()},
        "label_groups and class_names have different classes",
    ),
    "no groups": ({"label_groups": [3]}, "label groups must be objects"),
    "fold as text": ({"runs": [{"seed": 0, "fold": "1", "folder": ".", "metrics": {}}]}, "fold has the wrong type"),
    "command as number": ({"command": 3}, "command has the wrong type"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_results_are_refused_with_their_path(case: str, tmp_path: Path) -> None:
    changes, message = DAMAGE[case]
    (tmp_path / "results.json").write_text(json.dumps(of_version_0_1(**changes)))
    with pytest.raises(ValueError, match=message) as refused:
        Results.read(tmp_path)
    assert str(tmp_path / "results.json") in str(refused.value)
