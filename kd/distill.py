"""From a folder of sounds, some of them labelled, to a small student: ``python kd/distill.py --data FOLDER --teacher-weights FILE``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tyro import MISSING

from audio_datasets.system.command import parse, run_command
from audio_datasets.system.files import read_json, write_json, write_text
from audio_datasets.system.locks import locked
from audio_datasets.tasks.task import TaskClips
from kd.distilling.arms import DISTILLED, Distillation
from kd.distilling.clip_lists import ClipList, divisions, everything, in_words, read_clips
from kd.distilling.commands import run
from kd.distilling.config import DistillConfig
from kd.distilling.given_teacher import CLASS_MAP_FILE, check_given_teacher
from kd.distilling.plan import plan_in_words
from kd.distilling.summary import summarise
from kd.distilling.teacher_weights import teacher_start
from kd.run_folder.config import as_json, differences
from students.catalog import family_of

CHANGES_NOTHING = (
    "out",
    "data",
    "unlabelled",
    "fold",
    "allow_outside",
    "labels_alone",
    "workers",
    "on_bad_clip",
    "dry_run",
    "restart",
)
"""Settings that may differ when a folder is continued: they do not change what a student is trained on."""


def distill(config: DistillConfig) -> Path:
    """Runs all steps that are not done yet, prints what came of them, and returns the student's run folder.

    Raises:
        ValueError: data, weights or settings that do not fit together, or a folder with another run in it.
        Stopped: on request; the same command continues.
    """
    start = teacher_start(config.teacher_weights)
    clips, notes = read_clips(config)
    by_name = check_given_teacher(config, start, clips.class_names)
    lists, told = divisions(clips, config)
    whole = everything(clips, config)
    # A cross-validation tests students that are thrown away; the student that is kept has learnt from all labels.
    every_list = lists if lists and not lists[0].name else [*lists, whole]
    for note in (*notes, told, in_words(every_list)):
        print(note)
    class_map = config.class_map if by_name is None else config.out / CLASS_MAP_FILE
    distillations = [
        Distillation(config, start, one, config.steps_for(one.training_clips), class_map) for one in every_list
    ]
    kept = distillations[-1]
    if config.dry_run:
        print(plan_in_words(clips, distillations))
        return kept.folder(DISTILLED)
    with locked(config.out / "distill.lock", str(config.out)):
        check_same_run(config, clips)
        if by_name is not None:
            write_text(config.out / CLASS_MAP_FILE, by_name)
        store = pack_all(config, whole)
        for one in distillations:
            one.run(store, labels_alone=config.labels_alone and one.is_tested)
        tested = [one for one in distillations if one.is_tested]
        print(f"\n{summarise(tested, config)}" if tested else "\nThe student was not tested.")
    print(f"The student is in {kept.folder(DISTILLED)}")
    return kept.folder(DISTILLED)


def check_same_run(config: DistillConfig, clips: TaskClips) -> None:
    """Records the settings in ``distill.json``, or compares them with those recorded.

    Raises:
        ValueError: the folder holds a run with other settings or other clips, and --restart was not given.
    """
    path = config.out / "distill.json"
    settings = {**as_json(config), "clips": clips.fingerprint}
    if path.exists() and not config.restart:
        changed = differences(read_json(path), settings, CHANGES_NOTHING)
        if changed:
            raise ValueError(
                f"{config.out} holds a distillation with other settings:\n  "
                + "\n  ".join(changed)
                + "\nGive the same command to continue it, choose another --out, or start over with --restart"
            )
    write_json(path, settings)


def pack_all(config: DistillConfig, whole: ClipList) -> Path:
    """The clip store with the audio of all clips, for the teacher; made unless it is there."""
    manifest, store = config.out / "clips_to_pack.parquet", config.out / "all_clips.h5"
    whole.write(manifest)
    restart = ("--restart", "--overwrite") if config.restart else ()
    run(
        *("pack", manifest, "--task", "manifest", "--out", store, "--allow-outside", *restart),
        *("--on-bad-clip", config.on_bad_clip, "--workers", config.workers),
    )
    return store


def configure(arguments: Sequence[str]) -> DistillConfig:
    """The configuration for a command line. The default front end is the one that the student was published with."""
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    reader.add_argument("--student", default=DistillConfig.student)
    try:
        student = reader.parse_known_args(arguments)[0].student
    except argparse.ArgumentError as error:
        raise ValueError(f"{error}") from error
    defaults = DistillConfig(data=MISSING, teacher_weights=MISSING, frontend=family_of(student).published_frontend())
    return parse(DistillConfig, arguments, "kd distill", defaults)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    return run_command(lambda: distill(configure(arguments)))


if __name__ == "__main__":
    raise SystemExit(main())
