"""The recipes of fine-tuning: what each task and student is trained with unless something else is given."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from audio_datasets.audio.augment import AugmentConfig
from audio_datasets.tasks.catalog import get_task, list_tasks
from kd.finetune import configure, main
from kd.recipes.finetuning import FOR_ANY_TASK, RECIPES, SCRATCH_LEARNING_RATE, recipe_config, unpublished_settings
from kd.stages.finetuning_config import FinetuneConfig
from students.catalog import list_families
from students.families.mergenet import mergenet_frontend
from students.frontend import LogMelConfig


def config(task: str, **settings: Any) -> FinetuneConfig:
    return recipe_config(get_task(task), Path("data"), Path("run"), **settings)


def rates(found: FinetuneConfig) -> tuple[float, int, int]:
    return found.optimizer.learning_rate, found.loop.batch_size, found.loop.epochs


def test_trained_students_have_the_published_rates_and_fresh_ones_a_rate_of_their_own() -> None:
    """Values of the public code's README for MN and DyMN."""
    assert rates(config("esc50", student="mn04", weights="w.pt")) == (6e-5, 128, 80)
    assert rates(config("esc50", student="dymn04", init=Path("run"))) == (4e-5, 64, 80)
    assert rates(config("esc50", student="mn04")) == (SCRATCH_LEARNING_RATE, 128, 80)
    assert rates(config("folder", student="mn04", weights="w.pt")) == (*FOR_ANY_TASK, 80)


def test_a_student_that_was_not_published_with_a_task_learns_as_mn_does_and_it_is_said() -> None:
    found = config("esc50", student="mergenet16", weights="w.pt")
    assert rates(found) == (6e-5, 128, 80)
    notes = unpublished_settings(found, get_task("esc50"))
    assert notes == [
        "no batch size is known for mergenet16 on esc50: using 128, as for MN",
        "no learning rate is known for mergenet16 on esc50: using 6e-05, as for MN",
    ]
    given = replace(found, optimizer=replace(found.optimizer, learning_rate=1e-4))
    assert unpublished_settings(given, get_task("esc50")) == notes[:1]
    scratch = config("esc50", student="mergenet16")
    assert unpublished_settings(scratch, get_task("esc50")) == notes[:1]
    assert unpublished_settings(config("esc50", student="mn10", weights="w.pt"), get_task("esc50")) == []
    kitchen = replace(get_task("folder"), name="kitchen")
    of_kitchen = recipe_config(kitchen, Path("data"), Path("run"), student="mn10", weights="w.pt")
    assert rates(of_kitchen) == (*FOR_ANY_TASK, 80)
    own = unpublished_settings(of_kitchen, kitchen)
    assert [note.rpartition(", ")[2] for note in own] == ["as for your own sounds"] * 2


def test_a_run_of_another_length_has_the_same_shares_of_phases() -> None:
    schedule = config("esc50", epochs=16).schedule
    assert (schedule.warmup_epochs, schedule.ramp_down_start, schedule.ramp_down_epochs) == (2.0, 2.0, 13.0)


def test_mergenets_protocols_are_those_of_its_paper() -> None:
    one = config("esc50", recipe="mergenet", student="mergenet32")
    assert rates(one) == (1e-3, 8, 10)
    assert one.augment == AugmentConfig(mixup_alpha=0.0, mel_jitter=False, crop="random", waveform_mixup_alpha=0.0)
    assert one.short_clips == "repeat"
    assert one.renews_batch_norms_from == 0
    assert config("esc50", student="mergenet32").renews_batch_norms_from > 0  # from scratch, by no paper's protocol
    assert (one.schedule.ramp_down_start, one.schedule.ramp_down_epochs) == (10.0, 0.0)  # constant
    assert rates(config("esc50", recipe="mergenet", student="mergenet32", weights="w.pt")) == (1e-3, 8, 5)
    several = config("fsd50k", recipe="mergenet", student="mergenet32")
    assert rates(several) == (1e-3, 8, 30)
    assert several.augment == replace(one.augment, waveform_mixup=0.5)


def test_the_front_end_is_that_of_the_student_or_of_the_weights() -> None:
    heard, plain, own = mergenet_frontend(), LogMelConfig(), LogMelConfig(n_mels=64)
    assert config("esc50", student="mn10").frontend == plain
    assert config("esc50", student="mergenet32").frontend == heard
    assert config("esc50", student="mergenet32", frontend=own).frontend == own
    # The recipe's own front end is for students that have not learnt to hear in another one.
    assert config("esc50", recipe="mergenet", student="mn10").frontend == heard
    assert config("esc50", recipe="mergenet", student="mn10", weights="w.pt").frontend == plain
    assert config("esc50", recipe="mergenet", student="mergenet32", weights="w.pt").frontend == heard
    given = config("esc50", recipe="mergenet", student="mn10", init=Path("run"), frontend=own)
    assert given.frontend == own


@pytest.mark.parametrize("recipe", RECIPES)
def test_with_stored_views_a_recipe_augments_nothing_that_the_teachers_heard(recipe: str) -> None:
    own = config("esc50", recipe=recipe)
    found = config("esc50", recipe=recipe, views="stored")
    assert found.augment == AugmentConfig(mixup_alpha=own.augment.mixup_alpha, mel_jitter=False)
    shown = replace(found, views="stored", logits=("views.h5",))  # and so goes together with stored views
    assert (shown.augment, shown.short_clips) == (found.augment, "pad")


def test_what_is_given_counts_more_than_the_recipe() -> None:
    found = config("esc50", recipe="mergenet", seeds=(3, 4), short_clips="pad")
    assert (found.seeds, found.short_clips, found.recipe, found.task) == ((3, 4), "pad", "mergenet", "esc50")


def test_an_unknown_recipe_or_student_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown recipe 'cake'; choices: dymn, mergenet"):
        config("esc50", recipe="cake")
    with pytest.raises(ValueError, match="unknown student 'mn99'"):
        config("esc50", student="mn99")


def test_the_tasks_that_families_have_settings_for_exist() -> None:
    for family in list_families().values():
        assert set(family.fine_tuning) <= set(list_tasks())


@pytest.mark.parametrize(
    ("task", "student", "expected"),
    [
        ("esc50", "mn04", (6e-5, 128)),
        ("fsd50k", "mn10", (7e-5, 64)),
        ("openmic", "mn10", (1e-5, 64)),
        ("dcase20", "mn10", (8e-4, 64)),
        ("folder", "mn10", (1e-4, 16)),
        ("manifest", "dymn10", (1e-4, 16)),
        ("esc50", "dymn04", (4e-5, 64)),
        ("fsd50k", "dymn_m", (4e-5, 32)),
        ("openmic", "dymn10", (2e-5, 32)),
        ("dcase20", "dymn10", (3e-4, 32)),
        ("esc50", "mergenet32", (6e-5, 128)),
    ],
)
def test_a_trained_student_gets_its_familys_settings(task: str, student: str, expected: tuple[float, int]) -> None:
    found = configure(["--task", task, "--student", student, "--weights", "w.pt", "--data", "x", "--out", "y"])
    assert rates(found)[:2] == expected


def test_what_was_not_published_is_said_aloud(
    make_task_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    small = ["--student", "passt_tiny", "--student-options", "width=64", "depth=1", "heads=1"]
    data = make_task_folder("folder")
    short = ["--epochs", "1", "--workers", "0", "--clip-seconds", "0.4", "--eval-batch-size", "4", "--no-report"]
    assert main(["--task", "folder", "--data", str(data), "--out", str(tmp_path / "run"), *short, *small]) == 0
    assert "no batch size is known for passt_tiny on folder: using 16, as for MN" in capsys.readouterr().out


def test_own_sounds_are_repeated_and_start_from_the_probe_where_there_are_weights() -> None:
    """Corpora with a length of their own keep the papers' protocol."""
    own, scratch = config("folder", student="mn04", weights="w.pt"), config("folder", student="mn04")
    assert (own.short_clips, own.probe, own.from_probe, own.freeze) == ("repeat", True, True, "batch-norm")
    assert own.starts_from_probe
    assert (scratch.short_clips, scratch.probe, scratch.from_probe, scratch.freeze) == ("repeat", False, False, "none")
    corpus = config("esc50", student="mn04", weights="w.pt")
    assert (corpus.short_clips, corpus.probe, corpus.from_probe, corpus.freeze) == ("pad", True, False, "none")
    assert not replace(own, student_options=("head=attention_pooling",)).starts_from_probe
    assert config("folder", weights="w.pt", views="stored").short_clips == "pad"
