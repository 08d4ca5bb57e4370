"""The papers' recipes, against the numbers in the papers; and recipes on the command line."""

import json
from pathlib import Path

import pytest

from kd.pretrain import PretrainConfig, main, student_options
from kd.recipes.pretraining import RECIPES, dymn, mn, recipe_for
from kd.training.schedule import learning_rate_factor
from students import create_student


def as_in_the_paper(epoch: int) -> float:
    """DyMN paper, Section IV-A: warm-up to epoch 8, constant to 80, 95 epochs of ramp down, 25 at 1 %."""
    if 8 <= epoch <= 80:
        return 1.0
    return 0.01 if epoch >= 175 else 1.0 - 0.99 * (epoch - 80) / 95


@pytest.mark.parametrize(
    ("name", "learning_rate"),
    [("dymn_s", 2e-3), ("dymn_m", 1e-3), ("dymn_l", 5e-4), ("mn01", 8e-4), ("mn10", 8e-4), ("mn40", 8e-4)],
)
def test_a_recipe_has_the_paper_s_numbers(name: str, learning_rate: float) -> None:
    recipe = RECIPES[name]()
    assert recipe.optimizer.optimizer == "adam"
    assert (recipe.optimizer.learning_rate, recipe.optimizer.weight_decay) == (learning_rate, 0.0)
    assert (recipe.loop.epochs, recipe.loop.batch_size, recipe.sampling.clips_per_epoch) == (200, 120, 100_000)
    assert recipe.sampling.sampler == "label-frequency"
    factors = [learning_rate_factor(recipe.schedule, epoch, 0.0, 200) for epoch in range(200)]
    assert factors[8:] == pytest.approx([as_in_the_paper(epoch) for epoch in range(8, 200)])
    assert factors[:9] == sorted(factors[:9])
    assert factors[7] < 1
    assert (recipe.distillation.label_weight, recipe.distillation.teacher_temperature) == (0.1, 1.0)
    assert (recipe.augment.mixup_alpha, recipe.augment.mel_jitter) == (0.3, True)
    assert (recipe.augment.gain_db, recipe.augment.roll_seconds, recipe.augment.crop) == (0.0, 0.0, "start")
    assert (recipe.frontend.fmin_jitter_hz, recipe.frontend.fmax_jitter_hz, recipe.frontend.n_mels) == (10, 2000, 128)
    assert (recipe.weights == "imagenet") == (name == "mn10")
    assert PretrainConfig(clips=(), out=Path("runs"), **recipe.settings()).renews_batch_norms_from == 0


def test_dymn_s_temperature_falls_from_30_to_1_over_30_epochs() -> None:
    config = PretrainConfig(clips=(), out=Path("runs"), **dymn("s").settings())
    student = create_student(config.student, 3, **(student_options(config) | {"width": 0.1}))
    temperatures = [student.temperature_at(epoch) for epoch in (0, 15, 30, 199)]
    assert temperatures == pytest.approx([30.0, 15.5, 1.0, 1.0])


def test_any_width_of_mn_has_a_recipe() -> None:
    assert (mn(0.5).student, mn(0.5).student_options) == ("mn05", ())
    assert (mn(0.3).student, mn(0.3).student_options) == ("mn10", ("width=0.3",))
    for width in (0.05, 4.5):
        with pytest.raises(ValueError, match="widths from 0.1 to 4"):
            mn(width)
    with pytest.raises(ValueError, match="sizes are"):
        dymn("xl")


@pytest.mark.parametrize(
    ("processes", "batch_size"), [(1, 120), (2, 60), (3, 40), (4, 30), (6, 20), (8, 16), (60, 2), (500, 2)]
)
def test_the_batch_is_divided_among_processes_into_even_ones(processes: int, batch_size: int) -> None:
    assert recipe_for("dymn_m", processes).loop.batch_size == batch_size


def test_what_is_given_overrides_the_recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def printed(*arguments: str) -> tuple[dict, str]:
        assert main([*arguments, "--dry-run"]) == 0
        captured = capsys.readouterr()
        return json.loads(captured.out), captured.err

    found, said = printed("--recipe", "dymn_l")
    assert found["config"]["optimizer"]["learning_rate"] == 5e-4
    assert found["config"]["student"] == "dymn_l"
    assert found["student_options"]["temperature_epochs"] == 30
    assert found["schedule"] == {"warmup_epochs": 8.0, "ramp_down_start": 80.0, "ramp_down_epochs": 95.0}
    assert "estimate" not in found
    assert said == ""
    found, said = printed("--recipe=mn02", "--epochs", "20", "--learning-rate", "0.01", "--batch-size", "8")
    assert found["config"]["optimizer"]["learning_rate"] == 0.01
    assert (found["config"]["student"], found["schedule"]["ramp_down_start"]) == ("mn02", 8.0)
    assert "a step has 8 clips here, 120 in the paper" in said
    monkeypatch.setenv("WORLD_SIZE", "8")
    found, said = printed("--recipe", "mn04")
    assert found["config"]["loop"]["batch_size"] == 16
    assert "a step has 128 clips here" in said
    monkeypatch.setenv("RANK", "3")
    assert printed("--recipe", "mn04")[1] == ""


def test_a_wrong_recipe_and_missing_data_are_refused(capsys: pytest.CaptureFixture) -> None:
    for arguments, message in {
        ("--recipe", "dymn_xl", "--clips", "a.h5", "--out", "b"): "dymn_s",
        ("--recipe", "dymn_s", "--out", "b"): "--clips",
    }.items():
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    assert main(["--recipe", "dymn_s", "--out", "b", "--clips", "a.h5"]) == 2
    assert "there are no --logits" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown recipe 'mn99'; choices: mn01"):
        recipe_for("mn99")
