"""A run folder: what is in it, and whether a run in it is new, goes on or has ended, and may go on as it is asked to.

``config.json`` holds the configuration of the run, "processes", "inputs" (fingerprints of its data), "accepted_changes" and,
once it is there, "finished".
"""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from audio_datasets.system.files import flush_folder, read_json, remove_asides, write_json
from kd.run_folder.config import differences
from kd.training.checkpoint import checkpoints, remove_leftovers

CONFIG_FILE = "config.json"
LOCK_FILE = "run.lock"
SKIPPED_CLIPS_FILE = "skipped_clips.txt"

PART = re.compile(r"(seed|fold)\d+|probe")
"""Folders in a run folder that are runs of their own: those of a fine-tuning's seeds and folds, and its linear probe."""

RESULTS = (
    *("result.json", "results.json", "metrics.jsonl", "student.json", "student.safetensors", "best.safetensors"),
    *("predictions.npz", "validation_predictions.npz", "report.html", "report.md", SKIPPED_CLIPS_FILE),
    *("trackers", "non_finite", CONFIG_FILE),
)
"""What ``restart`` removes after the checkpoints, in this order; other files in the folder are left alone."""


@dataclass(frozen=True)
class EnteredRun:
    """A run folder that was entered; ``description`` is what its ``config.json`` holds."""

    path: Path
    state: Literal["new", "unfinished", "finished"]
    description: dict[str, Any]
    notes: tuple[str, ...] = ()
    """What the user should read: changes that were accepted, or another division of the same batch."""

    def finish(self) -> None:
        """Marks the run as finished; the last thing that it does."""
        write_json(self.path / CONFIG_FILE, {**self.description, "finished": True})


def enter_run_folder(
    folder: Path,
    description: Mapping[str, Any],
    *,
    changes_nothing: Sequence[str],
    asks_for: Sequence[str] = (),
    accept_changes: bool = False,
    restart: bool = False,
    results: Sequence[str] = ("student.safetensors", "student.json"),
    defaults: Mapping[str, Any] | None = None,
) -> EnteredRun:
    """Begins a run in ``folder``, or finds the one in it. Called by one process, which holds the folder's lock.

    Args:
        description: the configuration as JSON, with "loop" in it; "processes", how many share a step; and whatever else
            decides the result, such as fingerprints of the data.
        changes_nothing: settings that a run may go on with otherwise, since they do not change its result.
        asks_for: those of them that say how much is to be done; with others than before a finished run goes on.
        accept_changes: go on although other settings differ; the changes are kept in ``config.json``.
        restart: give up a run that has other settings.
        results: the files of a finished run; if one was removed, the run is finished again.
        defaults: what settings were before they existed, for runs that an older version began.

    Raises:
        ValueError: a run with other settings, and neither of the two says what to do about it.
    """
    _remove_half_written(folder)
    path = folder / CONFIG_FILE
    new = dict(description)
    if not path.exists():
        if newest_checkpoints(folder):
            raise ValueError(f"{folder} holds checkpoints but no {CONFIG_FILE} to say what of; choose another --out")
        write_json(path, new)
        return EnteredRun(folder, "new", new)
    old = upgraded(_read_description(path), defaults or {})
    finished, accepted = old.pop("finished", False) is True, old.pop("accepted_changes", [])
    finished = finished and all((folder / name).exists() for name in results)
    finished = finished and all(old.get(name) == new.get(name) for name in asks_for)
    changed = differences(comparable(old), comparable(new), changes_nothing)
    notes: list[str] = []
    if changed and restart:
        give_up(folder)
        write_json(path, new)
        return EnteredRun(folder, "new", new, (f"the run in {folder} had another configuration and was given up",))
    if changed and not accept_changes:
        raise ValueError(_other_configuration(folder, changed))
    if changed:
        accepted.append({"at": ", ".join(newest_checkpoints(folder)) or "the start", "changes": changed})
        notes.append(f"{folder} goes on with changes: {'; '.join(changed)}")
        finished = False
    if accepted:
        new["accepted_changes"] = accepted
    if finished:
        return EnteredRun(folder, "finished", new, tuple(notes))
    notes += _note_on_division(old, new)
    write_json(path, new)
    return EnteredRun(folder, "unfinished", new, tuple(notes))


def _remove_half_written(folder: Path) -> None:
    """Removes files that a killed process left half-written in a run and its parts."""
    for part in (*parts_of(folder), folder) if folder.is_dir() else ():
        remove_asides(part)
        remove_leftovers(part / "checkpoints")


def _other_configuration(folder: Path, changed: Sequence[str]) -> str:
    """The message that refuses to go on with a run whose settings differ."""
    return (
        f"{folder} holds a run with another configuration:\n  "
        + "\n  ".join(changed)
        + "\nGive the command as it was to go on with it, or choose another --out. --accept-changes goes on with what is "
        "given now, --restart gives the old run up"
    )


def _note_on_division(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line if processes and batches divide the clips of a step differently than before, else nothing."""
    if division(old) == division(new):
        return []
    return [
        f"steps are divided as {division(new)}, before as {division(old)}: the same clips, drawn and augmented the same, "
        "but sums in another order, and batch norm over other parts of a step unless --sync-batch-norm is given"
    ]


def _read_description(path: Path) -> dict[str, Any]:
    """What a run's ``config.json`` holds; ValueError if that is not the description of a run."""
    content = read_json(path)
    loop = content.get("loop") if isinstance(content, dict) else None
    sizes = [loop.get(name) for name in ("batch_size", "gradient_accumulation_steps")] if isinstance(loop, dict) else []
    numbers = [*sizes, content.get("processes", 1)] if sizes else []
    if not numbers or any(type(number) is not int or number < 1 for number in numbers):
        raise ValueError(
            f"{path} is damaged: it does not tell how many clips a step of the run had. Choose another --out"
        )
    if not isinstance(content.get("accepted_changes", []), list):
        raise ValueError(f"{path} is damaged: its accepted changes are no list")
    return content


def upgraded(description: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A description as today's version would have written it.

    Version 0.1 kept the augmentation of fine-tuning in two parts. Settings that did not exist are at their defaults.
    """
    upgraded = {**description}
    if "task_augment" in upgraded:
        upgraded["augment"] = {**upgraded.get("augment", {}), **upgraded.pop("task_augment")}

    def filled(values: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
        both = {**default, **values}
        for name, value in both.items():
            if isinstance(value, Mapping) and isinstance(default.get(name), Mapping):
                both[name] = filled(value, default[name])
        return both

    return filled(upgraded, defaults)


def comparable(description: Mapping[str, Any]) -> dict[str, Any]:
    """A description with the clips of an optimizer step in place of how processes and batches divide them."""
    values = {name: value for name, value in description.items() if name != "processes"}
    loop = dict(values["loop"])
    processes = description.get("processes", 1)  # absent in folders of version 0.1
    loop["clips_per_step"] = loop.pop("batch_size") * loop.pop("gradient_accumulation_steps") * processes
    return {**values, "loop": loop}


def division(description: Mapping[str, Any]) -> str:
    """How a step's clips are divided, in words."""
    loop = description["loop"]
    return f"{description.get('processes', 1)} processes x {loop['gradient_accumulation_steps']} batches x {loop['batch_size']} clips"


def parts_of(folder: Path) -> Iterator[Path]:
    """The folders of a run's parts, those inside of others first."""
    for item in sorted(folder.iterdir()):
        if item.is_dir() and PART.fullmatch(item.name):
            yield from parts_of(item)
            yield item


def newest_checkpoints(folder: Path) -> list[str]:
    """The newest checkpoint of a run and of each of its parts, as "step-00000012" and "fold1/step-00000012"."""
    found = [(part, checkpoints(part / "checkpoints")) for part in (*parts_of(folder), folder)]
    return [(part / steps[-1].name).relative_to(folder).as_posix() for part, steps in found if steps]


def give_up(folder: Path) -> None:
    """Removes a run. Its checkpoints go at once and its configuration last: killed in between, it is a run at its start."""
    for part in parts_of(folder):
        remove_results(part)
        with suppress(OSError):  # somebody else's files are in it
            part.rmdir()
    remove_results(folder)


def remove_results(folder: Path) -> None:
    """Removes what one run, or one part of it, has written."""
    given_up = folder / ".checkpoints.given-up"
    if given_up.exists():
        shutil.rmtree(given_up)
    if (folder / "checkpoints").exists():
        (folder / "checkpoints").rename(given_up)
        flush_folder(folder)
        shutil.rmtree(given_up)
    for name in RESULTS:
        item = folder / name
        if item.is_dir():
            shutil.rmtree(item)
        else:
            item.unlink(missing_ok=True)
