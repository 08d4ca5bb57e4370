"""The runs of one fine-tuning call: where each lies, what it starts from, what is finished, and what they come to together."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from audio_datasets.system.stop_signals import StopSignals
from audio_datasets.tasks.catalog import get_task
from audio_datasets.tasks.task import read_task
from kd.data.splits import Partition, partitions
from kd.objectives.settings import LossConfig
from kd.run_folder.predictions import Predictions
from kd.run_folder.results import Results, RunResult
from kd.stages.cross_validation import CrossValidation, folder_name
from kd.stages.finetuning import read_start
from kd.stages.finetuning_config import FinetuneConfig, decided_by_data
from kd.stages.finetuning_setup import FinetuneSetup
from kd.training.loop import LoopConfig
from students import create_student
from students.card import load_student, save_student
from students.frontend import LogMelConfig

FOLD = Partition(3, np.arange(2), np.arange(0), np.arange(2))
WHOLE = Partition(None, np.arange(2), np.arange(0), np.arange(2))


def tuning(**settings: Any) -> FinetuneConfig:
    given = {"task": "esc50", "data": Path("data"), "out": Path("run"), "student": "mn01", "report": False}
    return FinetuneConfig(**{**given, "workers": 0, "loop": LoopConfig(batch_size=4), **settings})


@pytest.fixture
def make_runs(make_task_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., CrossValidation]:
    """``make_runs("esc50", seeds=(0, 1))``: the runs of a call, of which none has begun."""

    def make(name: str, **settings: Any) -> CrossValidation:
        task = get_task(name)
        folder = tmp_path / "data" / name
        clips, _ = read_task(task, folder if folder.exists() else make_task_folder(name))
        config = decided_by_data(tuning(**{"task": name, "out": tmp_path / "run", **settings}), task, clips)
        parts, _ = partitions(clips, folds=config.fold, test_share=config.test_share, valid_share=config.valid_share)
        setup = FinetuneSetup(config, task, clips, read_start(config), None, Accelerator(cpu=True), StopSignals())
        return CrossValidation(setup, parts)

    return make


# -- Where things lie --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "seeds", "expected"),
    [
        (WHOLE, [5], "."),
        (WHOLE, [5, 6], "seed5"),
        (FOLD, [5], "fold3"),
        (FOLD, [5, 6], "seed5/fold3"),
    ],
)
def test_the_folder_of_a_run_names_what_there_are_several_of(part: Partition, seeds: list[int], expected: str) -> None:
    assert folder_name(part, seeds, 5) == expected


def test_a_call_is_finished_when_the_files_of_all_of_its_runs_are_there(
    make_runs: Callable[..., CrossValidation],
) -> None:
    runs = make_runs("esc50", seeds=(0, 4), fold=(1, 3), report=True)
    assert [(seed, part.fold) for seed, part in runs.runs()] == [(0, 1), (0, 3), (4, 1), (4, 3)]
    assert runs.results() == [
        *(f"seed{seed}/fold{fold}/result.json" for seed in (0, 4) for fold in (1, 3)),
        *("results.json", "report.html", "report.md"),
    ]
    assert make_runs("esc50", probe_only=True).results() == ["probe/results.json"]
    assert make_runs("folder", probe=True).results() == ["probe/results.json", "./result.json", "results.json"]


def test_a_run_from_before_changes_that_were_accepted_is_not_finished(
    make_runs: Callable[..., CrossValidation], tmp_path: Path
) -> None:
    runs = make_runs("esc50")
    assert runs.finished(tmp_path) is None
    result = RunResult(0, 1, "fold1", {"accuracy": 0.5}, accepted_changes=1)
    (tmp_path / "result.json").write_text(json.dumps(result.to_json()))
    assert runs.finished(tmp_path) is None
    runs.accepted_changes = [{"at": "fold1/step-00000002", "changes": ["loop.epochs: 2 -> 3"]}]
    assert runs.finished(tmp_path) == result


# -- What the runs start from ------------------------------------------------------------------------------------------


def test_every_fold_of_a_seed_starts_with_the_same_student_of_its_own(
    make_runs: Callable[..., CrossValidation],
) -> None:
    runs = make_runs("esc50")
    one, other, another_seed = (
        runs.setup.starting_student(0),
        runs.setup.starting_student(0),
        runs.setup.starting_student(1),
    )
    assert one is not other
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert not torch.equal(one.classifier[-1].weight, another_seed.classifier[-1].weight)
    with torch.no_grad():
        one.classifier[-1].weight.zero_()
    assert torch.equal(runs.setup.starting_student(0).classifier[-1].weight, other.classifier[-1].weight)


def test_a_run_starts_from_the_probe_of_its_own_fold(make_runs: Callable[..., CrossValidation], tmp_path: Path) -> None:
    runs = make_runs("esc50", from_probe=True)
    with torch.random.fork_rng():
        for fold in (1, 2):
            student = create_student("mn01", 3, head="linear")
            save_student(tmp_path / "run" / "probe" / f"fold{fold}", student, ("a", "b", "c"), LogMelConfig())
    one, two, three = (runs.start_of(part, seed=0) for part in runs.parts)
    for fold, started in ((1, one), (2, two)):
        saved = load_student(tmp_path / "run" / "probe" / f"fold{fold}")
        assert torch.equal(started.classifier[-1].weight, saved.classifier[-1].weight)
    assert three.config.options["head"] == "mlp"  # its probe could not be saved
    assert make_runs("esc50").start_of(runs.parts[0], seed=0).config.options["head"] == "mlp"


def test_a_fresh_student_expects_one_class_of_all_where_a_clip_may_have_several(
    make_runs: Callable[..., CrossValidation],
) -> None:
    """And nothing in particular where classes exclude each other, unless each has a loss of its own."""
    several = make_runs("fsd50k").setup.starting_student(0)
    torch.testing.assert_close(torch.sigmoid(several.classifier[-1].bias), torch.full((3,), 1 / 3))
    assert not make_runs("esc50").setup.starting_student(0).classifier[-1].bias.any()
    bce = make_runs("esc50", loss=LossConfig("bce")).setup.starting_student(0)
    torch.testing.assert_close(torch.sigmoid(bce.classifier[-1].bias), torch.full((3,), 1 / 3))


def test_a_start_is_a_fresh_student_weights_or_a_run(tmp_path: Path) -> None:
    fresh = read_start(tuning(student="dymn04", student_options=("width=0.1", "temperature_epochs=5")))
    assert (fresh.name, fresh.weights) == ("dymn04", None)
    assert fresh.options == {"width": 0.1, "temperature_epochs": 5}
    weights = read_start(tuning(weights="mn01.pt", student_options=("dropout=0.1",)))
    assert (weights.name, weights.options, weights.weights) == ("mn01", {"dropout": 0.1}, "mn01.pt")
    with torch.random.fork_rng():
        student = create_student("mn01", 3, dropout=0.3)
    save_student(tmp_path, student, ("a", "b", "c"), LogMelConfig())
    run = read_start(tuning(init=tmp_path, student_options=("dropout=0.3",)))
    assert (run.name, run.options["dropout"], run.class_names) == ("mn01", 0.3, ("a", "b", "c"))
    for wrong, message in (
        ({"student": "mn02"}, "found --student mn02"),
        ({"student_options": ("dropout=0.1",)}, "0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            read_start(tuning(init=tmp_path, **wrong))
    with pytest.raises(ValueError, match="temperature_epochs would not be used"):
        read_start(tuning(student="dymn04", weights="a.pt", student_options=("temperature_epochs=5",)))


def test_an_epoch_is_cut_into_equal_even_batches(make_runs: Callable[..., CrossValidation]) -> None:
    runs = make_runs("esc50", loop=LoopConfig(batch_size=8))
    rows = runs.parts[0].train  # 12 of 18 clips
    batches = runs.setup.batches(rows, seed=3)
    assert (len(rows), batches.batch_size, batches.steps_per_epoch) == (12, 6, 2)
    assert sorted(request.row for batch in batches for request in batch) == rows.tolist()
    order = [request.row for batch in batches for request in batch]
    assert [request.row for batch in runs.setup.batches(rows, seed=3) for request in batch] == order
    assert [request.row for batch in runs.setup.batches(rows, seed=4) for request in batch] != order


def test_early_stopping_without_validation_clips_is_refused_before_anything_runs(
    make_runs: Callable[..., CrossValidation],
) -> None:
    with pytest.raises(ValueError, match="needs validation clips, but esc50 has none; add --valid-share"):
        make_runs("esc50", early_stopping="accuracy").check()
    make_runs("esc50", early_stopping="accuracy", valid_share=0.5).check()
    with pytest.raises(ValueError, match="12 training clips are too few"):
        make_runs("esc50", loop=LoopConfig(batch_size=4, gradient_accumulation_steps=9)).check()


def test_classes_without_clips_are_named(
    make_runs: Callable[..., CrossValidation], capsys: pytest.CaptureFixture
) -> None:
    make_runs("fsd50k").check()
    assert "1 classes have no training clips: 'Rain'" in capsys.readouterr().out


def test_fingerprints_are_of_all_folds_whichever_are_run(make_runs: Callable[..., CrossValidation]) -> None:
    every, one = make_runs("esc50"), make_runs("esc50", fold=(2,))
    assert len(one.parts) == 1
    assert one.fingerprints(every.parts) == every.fingerprints(every.parts)
    assert every.fingerprints(every.parts)["clips_per_step"] == [4, 4, 4]
    larger = make_runs("esc50", loop=LoopConfig(batch_size=6))
    assert larger.fingerprints(larger.parts)["clips_per_step"] == [6, 6, 6]
    swapped = [every.parts[0], *every.parts[:0:-1]]
    assert every.fingerprints(swapped)["partitions"] != every.fingerprints(every.parts)["partitions"]


# -- What they come to -------------------------------------------------------------------------------------------------


def test_a_result_is_what_its_predictions_say(make_runs: Callable[..., CrossValidation]) -> None:
    """By device too; clips that were skipped take no part, and are counted."""
    runs = make_runs("dcase20")
    (part,) = runs.parts
    targets = runs.setup.clips.targets(part.test)
    logits = np.random.default_rng(0).standard_normal(targets.shape).astype(np.float32)
    logits[1] = np.nan
    folder = runs.setup.config.out
    result = runs.keep(folder, part, 0, logits)
    kept = np.delete(np.arange(len(targets)), 1)
    right = targets.argmax(1) == logits.argmax(1)
    assert result.metrics["accuracy"] == pytest.approx(right[kept].mean())
    assert (result.skipped_clips, result.fold, result.folder) == (1, None, ".")
    devices = np.array([runs.setup.clips.clips[row].device for row in part.test])
    for device, seen in (("a", True), ("s1", True), ("s4", False)):
        chosen = kept[devices[kept] == device]
        table = result.metrics["devices"][device]
        assert (table["clips"], table["seen"]) == (len(chosen), seen)
        assert table["accuracy"] == pytest.approx(right[chosen].mean())
    assert RunResult.from_json(json.loads((folder / "result.json").read_text())) == result
    found = Predictions.read(folder / "predictions.npz", runs.setup.clips.class_names)
    assert found.clip_ids.tolist() == [runs.setup.clips.clip_id(int(row)) for row in part.test[kept]]
    np.testing.assert_array_equal(found.logits, logits[kept])
    np.testing.assert_array_equal(found.device_seen, devices[kept] != "s4")


def test_the_headline_is_the_mean_over_seeds_of_the_means_over_folds(
    make_runs: Callable[..., CrossValidation], capsys: pytest.CaptureFixture
) -> None:
    runs = make_runs("esc50", seeds=(0, 4), fold=(1, 2))
    values = [0.2, 0.4, 0.6, 1.0]
    results = [
        RunResult(seed, part.fold, folder_name(part, (0, 4), seed), {"accuracy": value})
        for (seed, part), value in zip(runs.runs(), values, strict=True)
    ]
    runs.setup.config.out.mkdir()
    runs.summarize(runs.setup.config.out, results, "kd finetune …", "fine-tuned")
    found = Results.read(runs.setup.config.out)
    assert found.headline.values == pytest.approx((0.3, 0.8))
    assert found.headline.mean == pytest.approx(0.55)
    assert found.headline.std == pytest.approx(np.std([0.3, 0.8], ddof=1))
    assert found.label_space == runs.setup.label_space
    assert [run.folder for run in found.runs] == ["seed0/fold1", "seed0/fold2", "seed4/fold1", "seed4/fold2"]
    assert "fine-tuned: accuracy 0.5500 ± 0.3536 over seeds" in capsys.readouterr().out
    # What lies in another folder is named from there.
    probe = runs.setup.config.out / "probe"
    probe.mkdir()
    results = [RunResult(0, 1, "probe/fold1", {"accuracy": 0.5})]
    runs.summarize(probe, results, "", "linear probe")
    assert Results.read(probe).runs[0].folder == "fold1"
