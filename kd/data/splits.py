"""Divides the clips of a task into training, validation and test: by official folds or splits, or by our own split."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from audio_datasets.system.messages import listed
from audio_datasets.system.randomness import generator
from audio_datasets.tasks.task import TaskClips

SPLIT_SEED = 0
"""Independent of the run's seed, so that runs with different seeds are tested on the same clips."""


@dataclass(frozen=True)
class Partition:
    """The rows of one run, int64 ascending; ``valid`` may be empty."""

    fold: int | None
    """The test fold; None if there are no folds."""
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    unlabelled: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """Clips without labels that may train beside ``train``; no clip without labels is in the other three."""


def partitions(
    clips: TaskClips, *, folds: Sequence[int] = (), test_share: float = 0.2, valid_share: float = 0.0
) -> tuple[list[Partition], str]:
    """How the clips are divided, and one line on it: cross-validation where each clip has a fold, else train and test.

    Clips without labels only train: in every run, but for those whose fold, split or group is held out.

    Args:
        folds: only runs with these test folds; all if empty.
        test_share: share of the clips to test on if clips have neither folds nor splits; 0: a partition may have no test clips.
        valid_share: share of the training clips set aside for validation if clips have no validation split.

    Raises:
        ValueError: a fold that does not exist; no clips to train or test on; a group with clips on both sides.
    """
    labelled = clips.mask(np.arange(len(clips))).any(axis=1)
    if not labelled.any():
        raise ValueError(f"{clips.path}: none of the {len(clips)} clips has a label")
    divided, valid, told = _divided(clips, labelled, folds, test_share)
    if valid_share and valid.any():
        raise ValueError(
            f"--valid-share was given, but {clips.path} has {int(valid.sum())} validation clips of its own"
        )
    if valid_share:
        told += f", {valid_share:.0%} of the training clips held out for validation"
    result = []
    for fold, train, test in divided:
        train_rows, valid_rows, test_rows = (np.flatnonzero(part) for part in (train & ~test, valid, test))
        if valid_share:
            valid_rows = stratified_share(clips, train_rows, valid_share, "validation split")
            train_rows = np.setdiff1d(train_rows, valid_rows)
        if not len(train_rows):
            raise ValueError(f"{clips.path} has no clip to train on")
        if not len(test_rows) and test_share > 0:
            raise ValueError(f"{clips.path} has no clip to test on; to train without a test: --test-share 0")
        partition = Partition(fold, train_rows, valid_rows, test_rows)
        check_apart(clips, partition)
        result.append(replace(partition, unlabelled=_unlabelled_rows(clips, labelled, partition)))
    return result, told + _on_unlabelled(labelled, result)


def _divided(
    clips: TaskClips, labelled: np.ndarray, folds: Sequence[int], test_share: float
) -> tuple[list[tuple[int | None, np.ndarray, np.ndarray]], np.ndarray, str]:
    """The fold of each run with its training and test clips, the validation clips (bool (n,) each), and one line on it.

    Only clips that are ``labelled``, bool (n,), are divided.
    """
    of_clip = np.array([np.nan if clip.fold is None else clip.fold for clip in clips.clips])
    splits = np.array([clip.split or "" for clip in clips.clips])
    no_clip = np.zeros(len(clips), dtype=bool)
    if not np.isnan(of_clip[labelled]).any():
        numbers = sorted(set(of_clip[labelled].astype(int).tolist()))
        if len(numbers) < 2:
            raise ValueError(
                f"{clips.path}: cross-validation needs at least two folds; every clip is in fold {numbers[0]}"
            )
        if absent := sorted(set(folds) - set(numbers)):
            raise ValueError(f"{clips.path} has no fold {absent}; its folds are {numbers}")
        wanted = [number for number in numbers if not folds or number in folds]
        divided = [(number, labelled & (of_clip != number), labelled & (of_clip == number)) for number in wanted]
        return divided, no_clip, f"cross-validation over folds {numbers}"
    if folds:
        raise ValueError(f"--fold {listed(list(map(str, folds)))} was given, but not every clip has a fold")
    if (splits[labelled] != "").any():
        without = labelled & (splits == "")
        if without.any():
            clip = clips.clip_id(int(np.flatnonzero(without)[0]))
            raise ValueError(f"{clips.path}: either all clips have a split or none; clip {clip!r} has none")
        divided = [(None, labelled & (splits == "train"), labelled & (splits == "test"))]
        return divided, labelled & (splits == "valid"), "train and test splits as given by the task"
    if test_share == 0:
        return [(None, labelled, no_clip)], no_clip, "all clips are for training; there is no test"
    test = no_clip.copy()
    test[stratified_share(clips, np.flatnonzero(labelled), test_share, "test split")] = True
    grouped = ", grouped" if any(clip.group is not None for clip in clips.clips) else ""
    return (
        [(None, labelled & ~test, test)],
        no_clip,
        f"{test_share:.0%} of the clips held out for testing (stratified by class{grouped})",
    )


def _unlabelled_rows(clips: TaskClips, labelled: np.ndarray, part: Partition) -> np.ndarray:
    """The clips without labels that train in a run: not those whose fold, split or group it tests (int64 ascending)."""
    tested = {clips.clips[row].group for row in part.test} - {None}

    def is_held_out(row: int) -> bool:
        clip = clips.clips[row]
        of_fold = part.fold is not None and clip.fold == part.fold
        return of_fold or clip.split not in (None, "train") or clip.group in tested

    return np.array([row for row in np.flatnonzero(~labelled) if not is_held_out(row)], dtype=np.int64)


def _on_unlabelled(labelled: np.ndarray, parts: Sequence[Partition]) -> str:
    """What is to be said of the clips without labels; "" if there are none."""
    unlabelled = int((~labelled).sum())
    if not unlabelled:
        return ""
    used = len(np.unique(np.concatenate([part.unlabelled for part in parts])))
    left_out = f", and {unlabelled - used} more are left out: their split, fold or group is held out"
    return f"; {used} clips without labels may train and are never tested on{left_out if used < unlabelled else ''}"


def check_apart(clips: TaskClips, partition: Partition) -> None:
    """Raises ValueError if a group (a recording, a place) has clips both in the test and in training or validation."""
    groups = [clip.group for clip in clips.clips]
    learnt = {groups[row] for rows in (partition.train, partition.valid) for row in rows} - {None}
    shared = sorted(learnt & {groups[row] for row in partition.test})
    if shared:
        where = "" if partition.fold is None else f" of fold {partition.fold}"
        raise ValueError(
            f"{clips.path}: {len(shared)} groups have clips both inside and outside the test{where}: {listed(shared)}"
        )


def stratified_share(clips: TaskClips, rows: np.ndarray, share: float, purpose: str) -> np.ndarray:
    """About ``share`` of ``rows``, with about this share of every class and no divided groups; int64 ascending.

    Iterative stratification (Sechidis et al., 2011) of whole groups: groups with the rarest classes are placed first, each
    on the side where its rarest class is needed most. A class with a single group stays outside the share.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"a share of the clips must be between 0 and 1; found {share}")
    targets = clips.targets(rows).astype(np.float64)
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        group = clips.clips[row].group
        groups.setdefault(f"clip {row}" if group is None else f"group {group}", []).append(index)
    counts = np.stack([targets[members].sum(axis=0) for members in groups.values()])
    sizes = np.array([len(members) for members in groups.values()], dtype=np.float64)
    totals = counts.sum(axis=0)
    rarity = np.where(counts > 0, totals, np.inf)
    order = np.lexsort((generator(SPLIT_SEED, purpose).random(len(counts)), -sizes, rarity.min(axis=1)))

    lacking = np.stack([share * totals, (1 - share) * totals])  # clips of each class: in the share, outside of it
    lacking_clips = np.array([share, 1 - share]) * len(rows)
    chosen = []
    members = list(groups.values())
    for place in order:
        rarest = int(rarity[place].argmin()) if np.isfinite(rarity[place]).any() else None
        need = lacking_clips if rarest is None else lacking[:, rarest]
        if need[0] == need[1]:
            need = lacking_clips
        side = int(need[0] <= need[1])
        lacking[side] -= counts[place]
        lacking_clips[side] -= sizes[place]
        if side == 0:
            chosen += members[place]
    return np.sort(rows[np.array(chosen, dtype=np.int64)])
