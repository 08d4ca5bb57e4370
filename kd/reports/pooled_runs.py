"""Reads a folder of runs as one: the same experiment with other draws, seeds or folds.

Such a folder holds run folders, as ``labels/draw0``, ``labels/draw1``. Compared with another folder of runs, the runs with the
same name form pairs.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from audio_datasets.system.messages import listed
from kd.reports.run_reader import CONFIG_FILE, Part, RunFolder, flat_settings
from kd.run_folder.results import RESULTS_FILE, Headline

VARIES = "varies"


def read_run_or_runs(path: str | Path) -> RunFolder:
    """Reads a run folder, or a folder of run folders as one run.

    Raises:
        ValueError: ``path`` is neither, a run in it is not finished, or its runs differ in task, classes or metric.
    """
    path = Path(path)
    if _is_run(path) or not path.is_dir():
        return RunFolder.read(path)
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and _is_run(folder))
    if not folders:
        return RunFolder.read(path)  # which says what is missing
    return pooled([RunFolder.read(folder) for folder in folders], path)


def _is_run(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file() or (path / RESULTS_FILE).is_file()


def pooled(runs: Sequence[RunFolder], path: Path) -> RunFolder:
    """Several finished runs as one, whose headline is the mean and spread of theirs.

    Raises:
        ValueError: as for :func:`read_run_or_runs`.
    """
    unfinished = [run.path.name for run in runs if run.headline is None]
    if unfinished:
        raise ValueError(
            f"{path}: {len(unfinished)} of {len(runs)} runs have no result yet: {listed(unfinished)}; finish or remove them"
        )
    for what, values in (
        ("task", [run.task for run in runs]),
        ("class list", [run.class_names for run in runs]),
        ("metric", [run.headline.metric for run in runs]),
    ):
        other = next((number for number, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise ValueError(
                f"{path}: runs in one folder are compared as one experiment and must have the same {what}; "
                f"those of {runs[0].path.name} and {runs[other].path.name} differ"
            )
    values = tuple(run.headline.mean for run in runs)
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return replace(
        runs[0],
        path=path,
        config=shared_settings([run.config for run in runs]),
        parts=tuple(_part(part, run) for run in runs for part in run.parts),
        headline=Headline(runs[0].headline.metric, values, float(np.mean(values)), std),
        finished=all(run.finished for run in runs),
        command=None,
        evaluations=(),
        evaluation=None,
    )


def _part(part: Part, run: RunFolder) -> Part:
    name = run.path.name
    return replace(part, run=name, label=f"{name}, {part.label}" if part.label else name)


def shared_settings(configs: Sequence[Any]) -> dict[str, str]:
    """The runs' settings by their dotted names; "varies" for those that are not the same in all runs."""
    settings = [flat_settings(config) for config in configs]
    names = dict.fromkeys(name for found in settings for name in found)
    values = {name: {found.get(name) for found in settings} for name in names}
    return {name: (settings[0][name] if len(found) == 1 else VARIES) for name, found in values.items()}
