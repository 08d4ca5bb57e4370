"""Descriptions of runs that older versions wrote, as today's version would have written them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from audio_datasets.audio.augment import AugmentConfig
from audio_datasets.system.files import read_json, write_json
from kd.run_folder.config import as_json, differences
from kd.run_folder.start import enter_run_folder, upgraded
from kd.stages.finetuning_config import FinetuneConfig

TODAY = as_json(FinetuneConfig(task="esc50", data=Path("data")))


def of_version_0_1() -> dict[str, Any]:
    """What ``kd finetune --task esc50 --data data --time-masks 2`` of version 0.1 wrote, without what is as it was."""
    config = {name: value for name, value in TODAY.items() if name not in ("objective", "objective_options")}
    for name in ("ensemble", "views", "sync_batch_norm"):
        del config[name]
    config["augment"] = {
        "mixup_alpha": 0.3,
        "mel_jitter": True,
        "gain_db": 7.0,
        "roll_seconds": 0.125,
        "crop": "random",
    }
    config["task_augment"] = {
        "waveform_mixup": 0.5,
        "waveform_mixup_alpha": 2.0,
        "freq_mixstyle": 0.0,
        "freq_mixstyle_alpha": 0.3,
        "impulse_responses": None,
        "impulse_response_share": 0.6,
        "time_masks": 2,
        "time_mask_share": 0.1,
        "frequency_masks": 0,
        "frequency_mask_share": 0.1,
    }
    return config


def test_the_two_parts_of_augmentation_are_one_and_new_settings_are_at_their_defaults() -> None:
    augment = FinetuneConfig(task="esc50", data=Path("data")).augment
    expected = {**TODAY, "augment": as_json(replace(augment, time_masks=2))}
    assert upgraded(of_version_0_1(), TODAY) == expected
    assert differences(upgraded(of_version_0_1(), TODAY), TODAY) == ["augment.time_masks: 2 -> 0"]


def test_a_description_of_today_stays_as_it_is_and_nothing_that_was_given_is_overwritten() -> None:
    given = {**TODAY, "student": "dymn04", "augment": as_json(AugmentConfig(crop="random")), "finished": True}
    before = {**given}
    assert upgraded(given, TODAY) == given
    assert given == before
    old = of_version_0_1()
    upgraded(old, TODAY)
    assert old == of_version_0_1()
    assert upgraded({"fold": [], "augment": None}, {"fold": [1], "augment": {"crop": "start"}}) == {
        "fold": [],
        "augment": None,
    }


def test_a_run_of_version_0_1_is_entered_by_todays_command(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {**of_version_0_1(), "inputs": {"clips": "abc"}})
    today = {**upgraded(of_version_0_1(), TODAY), "processes": 1, "inputs": {"clips": "abc"}}

    def enter(description: dict[str, Any]) -> str:
        return enter_run_folder(tmp_path, description, changes_nothing=("workers",), defaults=TODAY).state

    with pytest.raises(ValueError, match=r"(?s)another configuration:\n  objective: .*mine:Own"):
        enter({**today, "objective": "mine:Own"})
    assert enter(today) == "unfinished"
    assert read_json(tmp_path / "config.json") == today
