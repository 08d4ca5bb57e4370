"""Entering a run folder: new, unfinished, finished; changed settings, divisions and data."""

from pathlib import Path
from typing import Any

import pytest

from audio_datasets.system.files import read_json, write_json
from kd.run_folder.start import EnteredRun, enter_run_folder


def description(seed: int = 0, batch_size: int = 8, accumulated: int = 1, processes: int = 1, **more: Any) -> dict:
    loop = {"batch_size": batch_size, "gradient_accumulation_steps": accumulated, "epochs": 3}
    return {"seed": seed, "workers": 2, "loop": loop, "processes": processes, "inputs": {"clips": "abc"}, **more}


def enter(folder: Path, config: dict, **options: bool) -> EnteredRun:
    return enter_run_folder(folder, config, changes_nothing=("workers",), **options)


def finish(run: EnteredRun) -> None:
    for name in ("student.safetensors", "student.json"):
        (run.path / name).write_text("")
    run.finish()


def test_the_same_command_goes_on_and_then_finds_it_finished(tmp_path: Path) -> None:
    assert enter(tmp_path, description()).state == "new"
    run = enter(tmp_path, description(workers=5))
    assert run.state == "unfinished"
    assert not run.notes
    finish(run)
    assert enter(tmp_path, description()).state == "finished"
    (tmp_path / "student.json").unlink()
    assert enter(tmp_path, description()).state == "unfinished"


def test_changes_are_refused_accepted_or_begin_anew(tmp_path: Path) -> None:
    finish(enter(tmp_path, description()))
    (tmp_path / "checkpoints" / "step-00000012").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("the user's")
    with pytest.raises(ValueError, match=r"seed: 0 -> 4(.|\n)*--accept-changes"):
        enter(tmp_path, description(seed=4))
    assert read_json(tmp_path / "config.json")["seed"] == 0

    run = enter(tmp_path, description(seed=4), accept_changes=True)
    assert run.state == "unfinished"
    assert "seed: 0 -> 4" in run.notes[0]
    written = read_json(tmp_path / "config.json")
    assert written["accepted_changes"] == [{"at": "step-00000012", "changes": ["seed: 0 -> 4"]}]
    # Given again, the command has nothing more to accept; what was accepted stays on record, also in the end.
    run = enter(tmp_path, description(seed=4), accept_changes=True)
    assert (run.state, run.notes) == ("unfinished", ())
    finish(run)
    assert read_json(tmp_path / "config.json")["accepted_changes"] == written["accepted_changes"]

    assert enter(tmp_path, description(seed=4), restart=True).state == "finished"  # nothing differs: nothing to give up
    run = enter(tmp_path, description(seed=5), restart=True)
    assert run.state == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "notes.txt"]
    assert "accepted_changes" not in read_json(tmp_path / "config.json")


@pytest.mark.parametrize("divided", [{"batch_size": 4, "processes": 2}, {"batch_size": 2, "accumulated": 4}])
def test_a_step_may_be_divided_otherwise(tmp_path: Path, divided: dict[str, int]) -> None:
    enter(tmp_path, description())
    run = enter(tmp_path, description(**divided))
    assert run.state == "unfinished"
    assert "the same clips" in run.notes[0]


def test_another_number_of_clips_in_a_step_is_another_configuration(tmp_path: Path) -> None:
    enter(tmp_path, description())
    with pytest.raises(ValueError, match="loop.clips_per_step: 8 -> 16"):
        enter(tmp_path, description(processes=2))


def test_other_data_are_another_configuration(tmp_path: Path) -> None:
    enter(tmp_path, description())
    with pytest.raises(ValueError, match='inputs.clips: "abc" -> "abd"'):
        enter(tmp_path, {**description(), "inputs": {"clips": "abd"}})


def test_checkpoints_without_a_configuration_are_nobodys(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000012").mkdir(parents=True)
    with pytest.raises(ValueError, match="no config.json"):
        enter(tmp_path, description())


def test_a_run_half_given_up_is_a_run_at_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, description())
    (tmp_path / "checkpoints" / "step-00000012").mkdir(parents=True)
    write_json(tmp_path / "student.json", {})
    with monkeypatch.context() as patch:

        def killed(path: Path) -> None:
            raise KeyboardInterrupt

        patch.setattr("kd.run_folder.start.remove_path", killed)
        with pytest.raises(KeyboardInterrupt):
            enter(tmp_path, description(seed=4), restart=True)
    assert not (tmp_path / "checkpoints").exists()
    assert enter(tmp_path, description()).state == "unfinished"
    assert enter(tmp_path, description(seed=4), restart=True).state == "new"


@pytest.mark.parametrize("content", ["[]", "{}", '{"loop": {"batch_size": "8"}}', '{"loop": null}'])
def test_a_damaged_configuration_is_refused(tmp_path: Path, content: str) -> None:
    finish(enter(tmp_path, description()))
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config.json is damaged: it does not say how many clips"):
        enter(tmp_path, description())
    assert (tmp_path / "config.json").read_text() == content


def test_what_a_killed_run_left_half_removed_goes_with_the_next_start(tmp_path: Path) -> None:
    """Also where the last checkpoint has been written, so that no other one would come and clear up."""
    enter(tmp_path, description())
    for part in (tmp_path, tmp_path / "seed1" / "fold2"):
        (part / "checkpoints" / "step-00000002").mkdir(parents=True)
        leftover = part / "checkpoints" / ".step-00000001.old.tmp"
        leftover.mkdir()
        (leftover / "optimizer.pt").write_bytes(b"x")
    enter(tmp_path, description())
    assert not list(tmp_path.rglob("*.tmp"))
    assert len(list(tmp_path.rglob("step-00000002"))) == 2


def test_other_threads_are_said_once(tmp_path: Path) -> None:
    """The run goes on, because that changes its last bits only; a run without a record says nothing."""
    first = {"loop": {"batch_size": 2, "gradient_accumulation_steps": 1}, "processes": 1}
    one, two = ({**first, "computed_with": {"threads": count, "torch": "2"}} for count in ("1", "2"))

    def notes(description: dict) -> tuple[str, ...]:
        return enter_run_folder(tmp_path, description, changes_nothing=("computed_with",)).notes

    assert notes(first) == notes(one) == ()
    expected = "the run continues with threads 1 → 2: its last bits will differ from those of an uninterrupted run"
    assert notes(two) == (expected,)
    assert notes(two) == ()
    assert (
        notes({**two, "computed_with": {**two["computed_with"], "libsndfile": "1.2"}}) == ()
    )  # was not recorded before
