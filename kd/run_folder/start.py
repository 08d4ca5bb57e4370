"""Starting in a run folder: finds out whether its run is new, unfinished or finished, and whether it may continue as requested.

``config.json`` contains the configuration of the run, "processes", "inputs" (fingerprints of its data), "accepted_changes" and,
at the end, "finished".
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from audio_datasets.system.files import flush_folder, read_json, remove_asides, remove_path, write_json
from audio_datasets.system.paths.outputs import check_output_folder, refuse_links
from kd.run_folder.config import differences
from kd.run_folder.seen_files import SEEN_FILES
from kd.training.checkpoint import checkpoints, remove_leftovers
from teacher_logits.computed_with import COMPUTED_WITH, note_on_bits

CONFIG_FILE = "config.json"
LOCK_FILE = "run.lock"
SKIPPED_CLIPS_FILE = "skipped_clips.txt"
SUSPICIOUS_CLIPS_FILE = "suspicious_clips.txt"

GIVEN_UP = ".checkpoints.given-up"

PART = re.compile(r"(seed|fold)\d+|probe")
"""Folders in a run folder that contain runs themselves: seeds and folds of fine-tuning, and its linear probe."""

RESULTS = (
    *("result.json", "results.json", "metrics.jsonl", "student.json", "student.safetensors", "best.safetensors"),
    "trained_on.json",
    *("predictions.npz", "validation_predictions.npz", "report.html", "report.md"),
    *(SKIPPED_CLIPS_FILE, SUSPICIOUS_CLIPS_FILE, SEEN_FILES, "trackers", "non_finite", CONFIG_FILE),
)
"""The files that ``restart`` removes after the checkpoints, in this order. Other files in the folder are kept."""


def is_part_of_run(name: str) -> bool:
    """Whether a run writes a file or folder of this name directly in its folder."""
    return name in (*RESULTS, LOCK_FILE, "checkpoints", GIVEN_UP) or PART.fullmatch(name) is not None


def check_run_folder(config: Any, folder: Path) -> None:
    """Called before a run opens anything. Raises ValueError if it would write over one of its inputs, or through a link."""
    check_output_folder(config, folder, is_part_of_run)
    refuse_links_in_run(folder)


def refuse_links_in_run(folder: Path) -> None:
    """Raises ValueError if a part of a run, or a file in a part, is a symbolic link."""
    refuse_links(folder, is_part_of_run)
    for part in parts_of(folder) if folder.is_dir() else ():
        refuse_links(part, is_part_of_run)


@dataclass(frozen=True)
class EnteredRun:
    """A run folder that was entered; ``description`` is the content of its ``config.json``."""

    path: Path
    state: Literal["new", "unfinished", "finished"]
    description: dict[str, Any]
    notes: tuple[str, ...] = ()
    """Messages for the user, such as changes that were accepted."""

    def finish(self) -> None:
        """Marks the run as finished. This is its last step."""
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
    """Starts a run in ``folder``, or finds the existing one. Called by one process, which must hold the folder's lock.

    Args:
        description: the configuration as JSON, including "loop"; "processes", the number of processes that share a step; and
            everything else that determines the result, such as fingerprints of the data.
        changes_nothing: settings that may differ when a run continues, because they do not affect its result.
        asks_for: those of them that say how much is to be done; if they differ, a finished run continues.
        accept_changes: continue although other settings differ; the changes are recorded in ``config.json``.
        restart: discard a run that has other settings.
        results: the files of a finished run; if one is missing, the run counts as unfinished.
        defaults: values of settings that did not exist yet when an older version started the run.

    Raises:
        ValueError: the run has other settings, and neither ``accept_changes`` nor ``restart`` is given.
    """
    refuse_links_in_run(folder)
    _remove_half_written(folder)
    path = folder / CONFIG_FILE
    new = dict(description)
    if not path.exists():
        if newest_checkpoints(folder):
            raise ValueError(f"{folder} has checkpoints but no {CONFIG_FILE} to describe them; choose another --out")
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
        return EnteredRun(folder, "new", new, (f"the run in {folder} had another configuration and was discarded",))
    if changed and not accept_changes:
        raise ValueError(_other_configuration(folder, changed))
    if changed:
        accepted.append({"at": ", ".join(newest_checkpoints(folder)) or "the start", "changes": changed})
        notes.append(f"{folder} continues with changes: {'; '.join(changed)}")
        finished = False
    if accepted:
        new["accepted_changes"] = accepted
    if finished:
        return EnteredRun(folder, "finished", new, tuple(notes))
    notes += _note_on_division(old, new) + note_on_bits(old.get(COMPUTED_WITH), new.get(COMPUTED_WITH, {}))
    write_json(path, new)
    return EnteredRun(folder, "unfinished", new, tuple(notes))


def _remove_half_written(folder: Path) -> None:
    """Removes files that a killed process left half-written in a run and its parts."""
    for part in (*parts_of(folder), folder) if folder.is_dir() else ():
        remove_asides(part)
        remove_leftovers(part / "checkpoints")


def _other_configuration(folder: Path, changed: Sequence[str]) -> str:
    """The message that refuses to continue a run whose settings differ."""
    return (
        f"{folder} contains a run with another configuration:\n  "
        + "\n  ".join(changed)
        + "\nRepeat the original command to continue this run, or choose another --out. --accept-changes continues with the "
        "new settings, --restart discards the old run"
    )


def _note_on_division(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """A message if processes and batches divide the clips of a step differently than before, otherwise nothing."""
    if division(old) == division(new):
        return []
    return [
        f"a step is now {division(new)}, before it was {division(old)}: the same clips with the same augmentation, but sums are "
        "taken in another order, and batch norm sees other parts of a step unless --sync-batch-norm is given"
    ]


def _read_description(path: Path) -> dict[str, Any]:
    """The content of a run's ``config.json``; ValueError if it does not describe a run."""
    content = read_json(path)
    loop = content.get("loop") if isinstance(content, dict) else None
    sizes = [loop.get(name) for name in ("batch_size", "gradient_accumulation_steps")] if isinstance(loop, dict) else []
    numbers = [*sizes, content.get("processes", 1)] if sizes else []
    if not numbers or any(type(number) is not int or number < 1 for number in numbers):
        raise ValueError(
            f"{path} is damaged: it does not say how many clips a step of the run had. Choose another --out"
        )
    if not isinstance(content.get("accepted_changes", []), list):
        raise ValueError(f"{path} is damaged: its accepted changes must be a list")
    return content


def upgraded(description: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A description in the form of the current version.

    Version 0.1 had two parts for the augmentation of fine-tuning. Settings that did not exist get their defaults.
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
    """A description with the number of clips per optimizer step in place of its division into processes and batches."""
    values = {name: value for name, value in description.items() if name != "processes"}
    loop = dict(values["loop"])
    processes = description.get("processes", 1)  # absent in folders of version 0.1
    loop["clips_per_step"] = loop.pop("batch_size") * loop.pop("gradient_accumulation_steps") * processes
    return {**values, "loop": loop}


def division(description: Mapping[str, Any]) -> str:
    """How the clips of a step are divided, as text."""
    loop = description["loop"]
    return f"{description.get('processes', 1)} processes x {loop['gradient_accumulation_steps']} batches x {loop['batch_size']} clips"


def parts_of(folder: Path) -> Iterator[Path]:
    """The folders of a run's parts, nested ones first."""
    for item in sorted(folder.iterdir()):
        if item.is_dir() and not item.is_symlink() and PART.fullmatch(item.name):
            yield from parts_of(item)
            yield item


def newest_checkpoints(folder: Path) -> list[str]:
    """The newest checkpoint of a run and of each of its parts, as "step-00000012" and "fold1/step-00000012"."""
    found = [(part, checkpoints(part / "checkpoints")) for part in (*parts_of(folder), folder)]
    return [(part / steps[-1].name).relative_to(folder).as_posix() for part, steps in found if steps]


def give_up(folder: Path) -> None:
    """Removes a run, first its checkpoints and last its configuration, so that a killed process leaves a run at its start."""
    for part in parts_of(folder):
        remove_results(part)
        with suppress(OSError):  # it contains files of someone else
            part.rmdir()
    remove_results(folder)


def remove_results(folder: Path) -> None:
    """Removes everything that one run, or one part of it, has written."""
    given_up = folder / GIVEN_UP
    if given_up.exists():
        remove_path(given_up)
    if (folder / "checkpoints").exists():
        (folder / "checkpoints").rename(given_up)
        flush_folder(folder)
        remove_path(given_up)
    for name in RESULTS:
        remove_path(folder / name)
