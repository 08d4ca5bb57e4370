"""Which clips teach, train and test: the labels that may be used, what is held out, and the manifests that say so."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from audio_datasets.corpora.manifest import write_manifest
from audio_datasets.system.messages import listed
from audio_datasets.system.randomness import generator
from audio_datasets.tasks.catalog import get_task, list_tasks
from audio_datasets.tasks.own_sounds import UNKNOWN_LABELS
from audio_datasets.tasks.task import Task, TaskClips, read_task
from audio_datasets.tasks.unlabelled import SoundFolder
from kd.data.splits import Partition, partitions, stratified_share
from kd.distilling.config import DistillConfig

ENOUGH_TO_HOLD_OUT = 5
"""Labelled clips that every class needs for a single split. Below it, the test is a cross-validation."""
MOST_FOLDS = 5


@dataclass(frozen=True)
class ClipList:
    """One division of the clips into those that train, with or without labels, and those that test."""

    name: str
    """ "" for the only division or for the final training, otherwise "fold1" and so on."""
    clips: TaskClips
    part: Partition

    @property
    def training_clips(self) -> int:
        return len(self.part.train) + len(self.part.unlabelled)

    def write(self, path: Path) -> None:
        """Writes the division as a manifest, in which only the labels of ``train`` and of held-out clips are known."""
        part = self.part
        splits = {int(row): "train" for row in np.concatenate([part.train, part.unlabelled])}
        splits |= {int(row): "valid" for row in part.valid} | {int(row): "test" for row in part.test}
        unlabelled = set(part.unlabelled.tolist())
        clips = []
        for row in sorted(splits):
            clip = replace(self.clips.clips[row], split=splits[row], fold=None)
            clips.append(replace(clip, labels=(), known=()) if row in unlabelled else clip)
        write_manifest(path, clips)


def read_clips(config: DistillConfig) -> tuple[TaskClips, tuple[str, ...]]:
    """The clips at ``config.data`` and in ``config.unlabelled``, and notes on them.

    Raises:
        ValueError: no data, no labels, or clips whose labels are only partly known.
    """
    task = recognised_task(config.data)
    clips, notes = read_task(task, config.data, allow_outside=config.allow_outside)
    if clips.is_masked:
        known = clips.mask(np.arange(len(clips)))
        partly = np.flatnonzero(known.any(axis=1) & ~known.all(axis=1))
        if len(partly):
            raise ValueError(
                f"{config.data}: the labels of a clip must be known for all classes or for none; clip "
                f"{clips.clip_id(int(partly[0]))!r} has some"
            )
    if config.unlabelled is not None:
        sounds = SoundFolder(config.unlabelled, clips.class_names)
        # Names of their own: files of the two folders may be called alike.
        more = (replace(clip, clip_id=f"{UNKNOWN_LABELS}/{clip.clip_id}") for clip in sounds.clips)
        clips = TaskClips(clips.path, clips.class_names, (*clips.clips, *more), clips.label_space)
        notes = (*notes, sounds.note)
    return clips, notes


def recognised_task(path: Path) -> Task:
    """The task whose layout the data have; a folder of classes or a manifest if it is no other."""
    if not path.exists():
        raise ValueError(f"no such folder or file: {path}")
    tasks = [get_task(name) for name in list_tasks()]
    fitting = [task for task in tasks if task.recognises is not None and task.recognises(path)]
    for task in sorted(fitting, key=lambda task: task.is_fallback):
        return task
    raise ValueError(
        f"{path} is not in a known layout: give a folder with one sub-folder of sounds per class, a manifest, or a data set in the "
        f"layout of {', '.join(task.name for task in tasks if not task.is_fallback)}"
    )


def divisions(clips: TaskClips, config: DistillConfig) -> tuple[list[ClipList], str]:
    """What is held out for testing, and one line on it. An empty list if there are too few labels to hold any out.

    Folds and splits of the data are kept. Otherwise a share of the labelled clips is held out if every class has at least 5, or
    each labelled clip in turn, in as many folds as the rarest class has labels.

    Raises:
        ValueError: folds that do not exist; nothing to train on.
    """
    labelled = np.flatnonzero(clips.mask(np.arange(len(clips))).any(axis=1))
    own = any(clip.fold is not None or clip.split is not None for clip in clips.clips)
    fewest = int(clips.targets(labelled).sum(axis=0).min()) if len(labelled) else 0
    if not own and not config.fold and fewest < ENOUGH_TO_HOLD_OUT:
        if fewest < 2:
            return [], "a class has a single labelled clip, so none can be held out: the students are not tested"
        clips = in_folds(clips, labelled, min(fewest, MOST_FOLDS))
    parts, told = partitions(clips, folds=config.fold, test_share=config.test_share)
    parts = [with_few_labels(clips, part, config) for part in parts]
    several = len(parts) > 1 or parts[0].fold is not None
    return [ClipList(f"fold{part.fold}" if several else "", clips, part) for part in parts], told


def everything(clips: TaskClips, config: DistillConfig) -> ClipList:
    """All clips to train on and none to test: for the student that is shipped, once others have been tested."""
    known = clips.mask(np.arange(len(clips))).any(axis=1)
    nothing = np.empty(0, dtype=np.int64)
    part = Partition(None, np.flatnonzero(known), nothing, nothing, np.flatnonzero(~known))
    return ClipList("", clips, with_few_labels(clips, part, config))


def in_folds(clips: TaskClips, labelled: np.ndarray, folds: int) -> TaskClips:
    """The clips with the labelled ones divided into ``folds``, stratified by class, no group divided."""
    fold_of = {}
    left = labelled
    for number in range(1, folds + 1):
        share = 1 / (folds + 1 - number)
        chosen = left if share == 1 else stratified_share(clips, left, share, f"fold {number}")
        fold_of |= {int(row): number for row in chosen}
        left = np.setdiff1d(left, chosen)
    numbered = [replace(clip, fold=fold_of.get(row)) for row, clip in enumerate(clips.clips)]
    return TaskClips(clips.path, clips.class_names, numbered, clips.label_space)


def with_few_labels(clips: TaskClips, part: Partition, config: DistillConfig) -> Partition:
    """The division with only ``labels_per_class`` labels to train on; the other training clips count as unlabelled.

    Raises:
        ValueError: a class has fewer labels, or a clip has several.
    """
    if config.labels_per_class is None:
        return part
    kept = draw_labels(clips, part.train, config.labels_per_class, config.label_seed)
    hidden = np.setdiff1d(part.train, kept)
    return replace(part, train=kept, unlabelled=np.union1d(part.unlabelled, hidden))


def draw_labels(clips: TaskClips, rows: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """``per_class`` rows of each class, drawn from ``rows``; int64 ascending."""
    targets = clips.targets(rows)
    if (targets.sum(axis=1) != 1).any():
        raise ValueError("--labels-per-class is for clips with exactly one class each")
    kept: list[np.ndarray] = []
    for index, name in enumerate(clips.class_names):
        of_class = rows[targets[:, index] > 0]
        if len(of_class) < per_class:
            raise ValueError(
                f"--labels-per-class {per_class}: class {name!r} has {len(of_class)} training clips with labels"
            )
        order = generator(seed, f"labels of class {index}").permutation(len(of_class))
        kept.append(of_class[order[:per_class]])
    return np.sort(np.concatenate(kept))


def in_words(lists: Sequence[ClipList]) -> str:
    """One line on how many clips take part."""
    first = lists[0]
    counts = [f"{len(one.part.train)} + {len(one.part.unlabelled)}" for one in lists]
    tested = listed([str(len(one.part.test)) for one in lists])
    return f"training clips with + without labels: {listed(counts)}; test clips: {tested}; {len(first.clips.class_names)} classes"
