"""The settings that both stages share, and those of fine-tuning: what goes together, and what is decided by the data."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from audio_datasets.audio.augment import AugmentConfig
from audio_datasets.tasks.label_space import LabelGroup, LabelSpace
from kd.objectives.settings import DistillationConfig, LossConfig
from kd.stages.finetuning_config import (
    LONGEST_WINDOW_SECONDS,
    SHORTEST_WINDOW_SECONDS,
    Deciding,
    FinetuneConfig,
    decided_by_data,
    read_deciding,
    shared_schedule,
    window_note,
)
from kd.stages.pretraining_config import PretrainConfig
from kd.stages.stage_config import NOT_IN_STORED_VIEWS, StageConfig
from kd.training.loop import LoopConfig
from kd.training.schedule import learning_rate_factor


def stage(**settings: Any) -> StageConfig:
    return StageConfig(out=Path("run"), **settings)


def tuning(**settings: Any) -> FinetuneConfig:
    return FinetuneConfig(task="own", data=Path("data"), **settings)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no length": ({"clip_seconds": 0.0}, "clip_seconds must be positive; found 0.0"),
    "fewer than no workers": ({"workers": -1}, "workers must be at least 0; found -1"),
    "fewer than no clips": ({"batch_norm_clips": -1}, "batch_norm_clips must not be negative; found -1"),
    "going on and giving up": ({"accept_changes": True, "restart": True}, "choose one"),
    "teachers without weight": (
        {"logits": ("a.h5",), "distillation": DistillationConfig(label_weight=1.0)},
        "with --label-weight 1 the teachers.* --logits are not used",
    ),
    "a batch of one": ({"loop": LoopConfig(batch_size=1)}, "batch_size must be at least 2"),
    "views without teachers": ({"views": "stored"}, "--views stored needs --logits"),
    "unknown objective": ({"objective": "kindness"}, "unknown objective 'kindness'"),
    "option that there is not": ({"objective_options": ("weight=1",)}, "unknown option 'weight'"),
    "option without a value": ({"objective_options": ("weight",)}, "NAME=VALUE; found 'weight'"),
}


@pytest.mark.parametrize("kind", [stage, tuning])
@pytest.mark.parametrize("case", WRONG)
def test_settings_that_do_not_go_together_are_refused_in_both_stages(case: str, kind: Any) -> None:
    settings, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        kind(**settings)


@pytest.mark.parametrize("name", [*NOT_IN_STORED_VIEWS, "crop"])
def test_stored_views_are_shown_exactly_as_the_teachers_heard_them(name: str) -> None:
    values = {"crop": "random", "impulse_responses": Path("responses"), "time_masks": 1, "frequency_masks": 1}
    shown = {"views": "stored", "logits": ("a.h5",)}
    stage(**shown, augment=AugmentConfig())
    with pytest.raises(ValueError, match=f"leave out {name}$"):
        stage(**shown, augment=replace(AugmentConfig(), **{name: values.get(name, 0.5)}))
    with pytest.raises(ValueError, match="leave out short_clips$"):
        stage(**shown, short_clips="repeat")


def test_impulse_responses_are_read_at_the_front_ends_rate(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "click.wav", np.eye(1, 800)[0], 16000)
    assert stage().impulse_responses() == ()
    (response,) = stage(augment=AugmentConfig(impulse_responses=tmp_path)).impulse_responses()
    assert len(response) == pytest.approx(1600, abs=2)


@pytest.mark.parametrize(
    ("student", "options", "message"),
    [
        ("mergenet32", (), "no ImageNet weights for MergeNet; families with such weights: mn, efficientnet"),
        ("mn04", (), "fit an MN of width 1"),
        ("mn10", ("se_reduction=8",), "se_reduction 4"),
    ],
)
def test_imagenet_weights_that_a_student_does_not_have_are_refused_at_once(
    student: str, options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: pytest.fail("downloads"))
    with pytest.raises(ValueError, match=message):
        stage(weights="imagenet", student=student, student_options=options)
    assert stage(weights="imagenet", student="mn10").weights == "imagenet"


def test_batch_norms_are_renewed_in_students_from_scratch_unless_told_otherwise() -> None:
    for kind in (stage, tuning):
        assert kind().renews_batch_norms_from == 2000
        assert kind(weights="mn10.pt").renews_batch_norms_from == 0
        assert kind(weights="mn10.pt", batch_norm_clips=30).renews_batch_norms_from == 30
        assert kind(batch_norm_clips=0).renews_batch_norms_from == 0
    assert tuning(init=Path("run")).renews_batch_norms_from == 0


# -- Pretraining and fine-tuning ---------------------------------------------------------------------------------------


def test_pretraining_needs_teachers_or_labels_alone() -> None:
    with pytest.raises(ValueError, match="there are no --logits; give teacher logits, or --label-weight 1"):
        PretrainConfig(clips=(Path("a.h5"),), out=Path("run"))
    labels_alone = DistillationConfig(label_weight=1.0)
    assert PretrainConfig(clips=(Path("a.h5"),), out=Path("run"), distillation=labels_alone).logits == ()
    odd = LoopConfig(batch_size=3)
    with pytest.raises(ValueError, match="even with mixup"):
        PretrainConfig(clips=(Path("a.h5"),), out=Path("run"), distillation=labels_alone, loop=odd)


WRONG_TUNING: dict[str, tuple[dict[str, Any], str]] = {
    "two starts": ({"weights": "a.pt", "init": Path("b")}, "both name a starting point"),
    "a seed twice": ({"seeds": (1, 1)}, r"0 or greater; found \[1, 1\]"),
    "no seed": ({"seeds": ()}, "seeds must be one or more"),
    "a negative seed": ({"seeds": (-1,)}, "0 or greater"),
    "no patience": ({"patience": 0}, "patience and eval_batch_size must be at least 1; found 0 and 32"),
    "layers that learn faster": ({"layer_decay": 1.1}, "layer_decay must be above 0 and at most 1"),
    "everything tests": ({"test_share": 1.0}, "test_share and valid_share must be at least 0 and below 1"),
    "a probe without strength": ({"probe_regularization": 0.0}, "must be positive"),
    "a teacher's temperature": ({"distillation": DistillationConfig(teacher_temperature=2.0)}, "without --logits"),
    "a teacher's mixup": ({"distillation": DistillationConfig(mixup_of_teacher="logits")}, "without --logits"),
}


@pytest.mark.parametrize("case", WRONG_TUNING)
def test_settings_of_fine_tuning_that_do_not_go_together_are_refused(case: str) -> None:
    settings, message = WRONG_TUNING[case]
    with pytest.raises(ValueError, match=message):
        tuning(**settings)


def test_a_student_is_pretrained_if_it_starts_from_weights() -> None:
    assert not tuning().is_pretrained
    assert tuning(weights="imagenet").is_pretrained
    assert tuning(init=Path("run")).is_pretrained


@pytest.mark.parametrize("epochs", [8, 40, 80])
def test_the_phases_of_the_learning_rate_are_shares_of_10_65_and_5_of_80_epochs(epochs: int) -> None:
    schedule = shared_schedule(epochs)
    shares = (schedule.warmup_epochs, schedule.ramp_down_start, schedule.ramp_down_epochs)
    assert [80 * share / epochs for share in shares] == [10, 10, 65]
    factors = [learning_rate_factor(schedule, epoch, 0.0, epochs) for epoch in range(epochs)]
    assert max(factors) == pytest.approx(1.0, abs=0.02) if epochs == 80 else max(factors) <= 1.0
    assert factors[0] < factors[epochs // 8 - 1] if epochs > 8 else True
    assert sum(factor == pytest.approx(0.01) for factor in factors[-epochs // 16 :]) >= epochs // 16


# -- Decided by the data -----------------------------------------------------------------------------------------------


class Lengths:
    """Clips that are their lengths."""

    path = Path("own")
    is_masked = False

    def __init__(self, seconds: list[float], label_space: LabelSpace) -> None:
        self.seconds, self.label_space = seconds, label_space

    def __len__(self) -> int:
        return len(self.seconds)

    def duration_seconds(self, row: int) -> float:
        return self.seconds[row]


ONE, SEVERAL = (LabelSpace.single(("a", "b"), exclusive=exclusive) for exclusive in (True, False))
MIXED = LabelSpace((LabelGroup("verb", ("a", "b"), True), LabelGroup("sound", ("c",), False)))
TWO = LabelSpace((LabelGroup("verb", ("a", "b"), True), LabelGroup("noun", ("c", "d"), True)))


def decided(
    config: FinetuneConfig, space: LabelSpace, seconds: list[float], own: float | None = None
) -> FinetuneConfig:
    return decided_by_data(config, task(own), Lengths(seconds, space))


def task(clip_seconds: float | None = None, metric: str | None = None) -> SimpleNamespace:
    """What of a task has a say in it."""
    return SimpleNamespace(name="own", clip_seconds=clip_seconds, metric=metric)


@pytest.mark.parametrize(
    ("space", "loss"), [(ONE, "cross-entropy"), (SEVERAL, "bce"), (TWO, "cross-entropy"), (MIXED, None)]
)
def test_the_loss_follows_from_the_labels(space: LabelSpace, loss: str | None) -> None:
    assert decided(tuning(), space, [1.0]).loss.loss == loss
    assert decided(tuning(loss=LossConfig("bce")), space, [1.0]).loss.loss == "bce"


def test_a_loss_or_a_metric_that_the_labels_do_not_allow_is_refused() -> None:
    with pytest.raises(ValueError, match="exactly one label"):
        decided(tuning(loss=LossConfig("cross-entropy")), SEVERAL, [1.0])
    with pytest.raises(ValueError, match="needs --loss cross-entropy"):
        decided(tuning(loss=LossConfig(label_smoothing=0.1)), SEVERAL, [1.0])
    with pytest.raises(ValueError, match="must be one of mAP, roc_auc, d_prime; found 'accuracy'"):
        decided(tuning(early_stopping="accuracy"), SEVERAL, [1.0])
    assert decided(tuning(early_stopping="verb/accuracy"), TWO, [1.0]).early_stopping == "verb/accuracy"
    with pytest.raises(ValueError, match="must be one of accuracy, verb/accuracy"):
        decided(tuning(early_stopping="mAP"), TWO, [1.0])


def test_the_metric_of_a_task_is_one_of_its_labels() -> None:
    """A task of the user's own may ask for any; told before the training and not after it."""
    for metric, space in (("macro_accuracy", ONE), ("mAP", SEVERAL), ("noun/accuracy", TWO), ("accuracy", TWO)):
        assert decided_by_data(tuning(), task(1.0, metric), Lengths([1.0], space)).clip_seconds == 1.0
    with pytest.raises(ValueError, match="the metric of task own must be one of accuracy, .*; found 'mAP'"):
        decided_by_data(tuning(), task(1.0, "mAP"), Lengths([1.0], ONE))


def test_the_window_is_the_given_one_the_tasks_or_one_that_most_clips_fit_into() -> None:
    """A few long clips do not make most of what is heard of the others silence."""
    assert decided(tuning(clip_seconds=2.0), ONE, [7.0], own=4.0).clip_seconds == 2.0
    assert decided(tuning(), ONE, [7.0], own=4.0).clip_seconds == 4.0
    assert decided(tuning(), ONE, [7.126, 7.126]).clip_seconds == 7.13
    short = [0.85] * 46 + [1.5] * 50 + [5.5] * 4
    assert decided(tuning(), ONE, short).clip_seconds == 1.5
    assert decided(tuning(), ONE, [70.0]).clip_seconds == LONGEST_WINDOW_SECONDS
    assert decided(tuning(), ONE, [0.001]).clip_seconds == 0.01
    assert decided(tuning(short_clips="repeat"), ONE, [0.2]).clip_seconds == SHORTEST_WINDOW_SECONDS
    with pytest.raises(ValueError, match="none of the 0 clips can be used"):
        decided(tuning(), ONE, [])


def test_the_note_on_the_window_counts_what_is_filled_up_and_cropped() -> None:
    clips = Lengths([0.5] * 5 + [2.0] * 4 + [8.0], ONE)
    config = decided_by_data(tuning(short_clips="repeat"), task(), clips)
    note = window_note(config, clips)
    assert note.startswith("clips are 0.5 to 8 s long (median 1.2 s) and heard in windows of 2.6 s: ")
    assert "9 shorter ones are repeated to fill it; 1 longer ones are cropped at random" in note
    padded = window_note(decided_by_data(tuning(), task(), clips), clips)
    assert "filled up with silence" in padded


# -- The command line --------------------------------------------------------------------------------------------------


def test_what_decides_the_defaults_is_read_from_a_command_line_and_the_rest_passed_over() -> None:
    given = ["--no-report", "--task", "esc50", "--epochs=3", "--batch-size", "x", "--init", "runs/a", "-q"]
    assert read_deciding(given) == Deciding(task="esc50", epochs=3, init=Path("runs/a"))
    assert read_deciding([]) == Deciding()
    with pytest.raises(ValueError, match="epochs"):
        read_deciding(["--epochs", "many"])
