"""Runs side by side: differences in pairs, costs, classes, and the settings that are not the same."""

from collections.abc import Callable
from pathlib import Path

import pytest

from audio_datasets.system.files import read_json, write_json
from kd.compare import main, paired_difference, run_names
from kd.reports.run_reader import RunFolder
from kd.reports.sections.differences import values_by_key

Make = Callable[..., Path]


def with_values(run: Path, values: dict[int, float]) -> Path:
    """The run, with other accuracies of its folds."""
    results = read_json(run / "results.json")
    for part in results["runs"]:
        part["metrics"]["accuracy"] = values[part["fold"]]
    found = list(values.values())
    results["headline"] |= {"values": found, "mean": sum(found) / len(found), "std": 0.1}
    write_json(run / "results.json", results)
    return run


def table_rows(text: str) -> dict[str, list[str]]:
    """The cells of Markdown tables by their first cell."""
    lines = [line.split("|") for line in text.splitlines() if line.startswith("| ")]
    return {line[1].strip(): [cell.strip() for cell in line[2:-1]] for line in lines}


def test_the_table_of_runs(make_run: Make, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    first = with_values(make_run("first"), {1: 0.80, 2: 0.90})
    config = {"init": "runs/mn01", "loop": {"epochs": 6, "batch_size": 16}}
    second = with_values(make_run("second", config=config, sharpness=0.5), {1: 0.83, 2: 0.95})
    page = tmp_path / "page.html"
    assert main([str(first), str(second), "--out", str(page)]) == 0
    text = capsys.readouterr().out
    rows = table_rows(text.partition("## Differences and chance")[0])
    rows |= table_rows(text.partition("## Classes")[2])
    assert rows["run"][:3] == ["accuracy", "over", "against first"]
    assert rows["first"][:5] == ["85.0 ± 10.0%", "2 folds", "–", "mn01", "random weights"]
    assert rows["second"][:5] == ["89.0 ± 10.0%", "2 folds", "+4.0 ± 1.4 points in 2", "mn01", "the run runs/mn01"]
    assert rows["init"] == ["–", "runs/mn01"]
    assert rows["loop.batch_size"] == ["8", "16"]
    assert "task" not in rows
    assert {"hiss", "hum, low", "click"} < rows.keys()
    shown = page.read_text()
    assert shown.count("<figure><svg") == 1  # both students cost the same
    assert "Settings that differ" in shown


def test_runs_that_cannot_be_compared_say_so(make_run: Make, capsys: pytest.CaptureFixture) -> None:
    one, several = make_run("one", folds=()), make_run("several", ("x", "y"), one_label=False, folds=())
    assert main([str(one), str(several), "--out", str(one / "compare.md")]) == 0
    text = capsys.readouterr().out
    assert "not comparable" in text
    assert "## Classes" not in text
    assert (one / "compare.md").read_text().strip() == text.strip()


def test_differences_are_taken_in_the_folds_that_both_have(make_run: Make) -> None:
    first = RunFolder.read(with_values(make_run("first", folds=(1, 2, 3)), {1: 0.5, 2: 0.6, 3: 0.7}))
    other = RunFolder.read(with_values(make_run("other", folds=(2, 5)), {2: 0.5, 5: 0.9}))
    assert paired_difference(first, other) == "−10.0 points"
    assert values_by_key(other) == {("", None, 2): 0.5, ("", None, 5): 0.9}
    apart = RunFolder.read(with_values(make_run("apart", folds=(4, 5)), {4: 0.5, 5: 0.9}))
    assert paired_difference(first, apart) == "no common training"
    assert values_by_key(RunFolder.read(make_run("one", folds=()))) == {("", None, None): 0.8}
    seeds = RunFolder.read(make_run("seeds", seeds=(0, 1), folds=(1, 2)))
    assert set(values_by_key(seeds)) == {("", seed, fold) for seed in (0, 1) for fold in (1, 2)}


def test_names_are_as_short_as_they_can_be() -> None:
    assert run_names([Path("/runs/a"), Path("/runs/b")]) == ["a", "b"]
    assert run_names([Path("/x/run"), Path("/y/run")]) == ["x/run", "y/run"]
    assert run_names([Path("/x/run"), Path("/x/run")]) == ["run", "run"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "at least two runs"),
        (["run", "run", "--out", "page.pdf"], ".html or .md"),
        (["run", "nowhere"], "nowhere is not a run folder"),
    ],
)
def test_mistakes_of_users_get_one_message(
    make_run: Make, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(make_run("run", folds=()).parent)
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_folders_of_runs_are_compared_in_pairs_of_the_same_name(make_run: Make, capsys: pytest.CaptureFixture) -> None:
    for draw, (alone, distilled) in enumerate([(0.40, 0.60), (0.50, 0.64), (0.45, 0.68)]):
        with_values(make_run(f"alone/draw{draw}", folds=(1,), config={"draw": draw}, sharpness=0.2), {1: alone})
        with_values(make_run(f"distilled/draw{draw}", folds=(1,), config={"draw": draw}), {1: distilled})
    folder = make_run("alone/draw0", folds=(1,)).parent
    with_values(folder / "draw0", {1: 0.40})
    assert main([str(folder), str(folder.parent / "distilled")]) == 0
    text = capsys.readouterr().out
    results = table_rows(text.partition("## Results")[2].partition("## Differences")[0])
    assert results["alone"][:2] == ["45.0 ± 5.0%", "3 runs"]
    assert results["distilled"][:3] == ["64.0 ± 4.0%", "3 runs", "+19.0 ± 4.6 points in 3"]
    cells = table_rows(text.partition("## Differences")[2].partition("## Classes")[0])["distilled"]
    # 19 ± 4.303 · 4.583 / √3
    assert cells[:3] == ["+19.0 points", "+7.6 to +30.4", "3"]
    low, high = (float(value.replace("−", "-")) for value in cells[3].split(" to "))
    assert 0 < low < high  # the logits of "alone" are nearly noise
    assert int(cells[5]) > 2 * int(cells[4])
    assert cells[6] == "&lt; 0.001"


def test_runs_in_one_folder_must_be_alike_and_finished(make_run: Make, capsys: pytest.CaptureFixture) -> None:
    other = make_run("other")
    folder = make_run("mixed/a").parent
    make_run("mixed/b", ("x", "y"))
    assert main([str(other), str(folder)]) == 2
    assert "must have the same class list; those of a and b differ" in capsys.readouterr().err
    (make_run("stopped/a") / "results.json").unlink()
    assert main([str(other), str(folder.parent / "stopped")]) == 2
    assert "1 of 1 runs have no result yet: 'a'" in capsys.readouterr().err


def with_evaluation(
    run: Path, mean: float, by_class: dict[str, float], name: str = "test.json", clips: str = "a", **more: object
) -> Path:
    """The run with what ``kd evaluate --out`` writes."""
    classes = {key: {"clips": 3, "average_precision": value, "roc_auc": None} for key, value in by_class.items()}
    selection = {
        "clips": f"stores/{clips}.h5",
        "clips_fingerprint": clips,
        "split": None,
        "folds": [5],
        "num_clips": 9,
        "clip_seconds": None,
    }
    results = {"tagger": "x", **selection, "mAP": mean, "roc_auc": 0.9, "d_prime": None, "classes": classes}
    write_json(run / name, {**results, **more})
    return run


def table_of(text: str) -> dict[str, list[str]]:
    """The rows of a comparison's tables by their first cell."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in reversed(lines)]
    return {name: values for name, *values in cells}  # of a name that is there twice, the first


def test_pretraining_runs_are_compared_by_their_evaluation(
    make_pretraining_run: Make, capsys: pytest.CaptureFixture
) -> None:
    first = with_evaluation(make_pretraining_run("first"), 0.40, {"hiss": 0.5, "hum, low": 0.4, "click": 0.3})
    second = with_evaluation(make_pretraining_run("second"), 0.46, {"hiss": 0.5, "hum, low": 0.8, "click": 0.08})
    assert main([str(first), str(second)]) == 0
    text = capsys.readouterr().out
    rows = table_of(text)
    assert rows["run"][:4] == ["mAP", "measured on", "over", "against first"]
    assert rows["first"][:2] == ["0.400", "a.h5, folds 5, 9 clips (test.json)"]
    assert (rows["second"][0], rows["second"][3]) == ("0.460", "+0.060")
    assert rows["hum, low"] == ["0.400", "0.800", "0.400"]
    assert "not comparable" not in text
    assert "not finished" not in text


def test_the_evaluation_that_all_runs_have_counts(make_pretraining_run: Make, capsys: pytest.CaptureFixture) -> None:
    first = with_evaluation(make_pretraining_run("first", validated=True), 0.1, {}, clips="other")
    with_evaluation(first, 0.3, {}, "eval.json")
    second = with_evaluation(make_pretraining_run("second"), 0.2, {}, "of fold 5.json")
    assert main([str(first), str(second)]) == 0
    rows = table_of(capsys.readouterr().out)
    assert (rows["first"][0], rows["second"][0]) == ("0.300", "0.200")
    assert "(of fold 5.json)" in rows["second"][1]
    with_evaluation(first, 0.3, {}, "eval.json", clip_seconds=2.5)  # other parts of the same clips
    assert main([str(first), str(second)]) == 0
    assert "evaluated on different clips" in capsys.readouterr().out
    assert (
        str(RunFolder.read(first).evaluations[1]) == "a.h5, folds 5, the first 2.5 s of each clip, 9 clips (eval.json)"
    )
    (first / "eval.json").unlink()
    assert main([str(first), str(second)]) == 0
    assert "evaluated on different clips: their numbers are not comparable" in capsys.readouterr().out


def test_a_finished_pretraining_run_without_an_evaluation(
    make_pretraining_run: Make, capsys: pytest.CaptureFixture
) -> None:
    runs = [make_pretraining_run("bare"), make_pretraining_run("begun", finished=False)]
    runs.append(make_pretraining_run("valid", validated=True))
    assert main(list(map(str, runs))) == 0
    text = capsys.readouterr().out
    rows = table_of(text)
    assert rows["bare"][1:3] == ["not evaluated", "–"]
    assert rows["begun"][1:3] == ["not finished", "–"]
    assert (rows["valid"][0], rows["valid"][2]) == ("mAP", "its validation clips")
    assert (
        "To compare bare, begun, valid on test clips: kd evaluate --tagger RUN --clips CLIPS --out RUN/test.json."
        in text
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mAP": None}, "test.json is damaged: mAP is not a number"),
        ({"clips": 3}, "test.json is damaged: it does not say which clips were evaluated"),
        ({"num_clips": "many"}, "test.json is damaged: it does not say which clips were evaluated"),
    ],
)
def test_a_damaged_evaluation_is_refused(
    make_pretraining_run: Make, change: dict[str, object], message: str, capsys: pytest.CaptureFixture
) -> None:
    run = with_evaluation(make_pretraining_run("run"), 0.1, {}, **change)
    assert main([str(run), str(run)]) == 2
    assert message in capsys.readouterr().err
