"""``kd verify``: checks logit stores against the clip store that they are meant for, and tells how good the teachers are."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.metrics import average_precision_score

from audio_datasets.class_lists import read_class_names
from audio_datasets.command import parse, progress, run_command
from audio_datasets.joined import AnyClips, open_clips
from audio_datasets.messages import brief, listed
from teacher_logits.class_mapping import load_teacher_as_stored
from teacher_logits.store import ROWS_PER_BLOCK, LogitEnsemble, LogitStore, check_same_classes

# Scores (4 bytes) and targets (1 byte) of so many clip-class pairs are held at a time to compute average precisions.
PAIRS_AT_ONCE = 200_000_000


@dataclass(frozen=True)
class VerifyConfig:
    """Check logit stores against a clip store: coverage, duplicates, class lists, fingerprints, finite values; and mAP."""

    logits: tuple[str, ...]
    """Logit stores, each PATH or PATH:WEIGHT."""
    clips: tuple[Path, ...]
    """Clip store that the logits are meant for; several count as one."""
    teacher: tuple[str, ...] = ()
    """Also check that the logits are of these teachers, one for each logit store, named as for kd teach."""
    class_names: Path | None = None
    """Class list for clip stores that carry none (AudioSet's class_labels_indices.csv, or one name a line)."""
    allow_missing: bool = False
    """Allow clips without logits."""
    other_clip_store: bool = False
    """Allow logits made from another clip store (a larger one, say), as long as every clip's audio is known to agree."""

    def __post_init__(self) -> None:
        if not self.logits:
            raise ValueError("give at least one logit store with --logits")
        if self.teacher and len(self.teacher) != len(self.logits):
            raise ValueError(
                f"one teacher for each logit store is needed; found {len(self.teacher)} for {len(self.logits)}"
            )


def verify(config: VerifyConfig) -> None:
    """Prints what was checked and the mAP of each store and of their ensemble.

    Raises ValueError that lists all mismatches, one a line.
    """
    class_names = read_class_names(config.class_names) if config.class_names else None
    clips = open_clips(config.clips, class_names)
    ensemble = LogitEnsemble.open(config.logits)
    check_same_classes(clips.class_names, ensemble.class_names, str(clips.path), str(ensemble.stores[0].path))
    mismatches: list[str] = []
    for number, store in enumerate(ensemble.stores):
        print(f"{store.path}: {len(store)} clips × {len(store.class_names)} classes of {store.teacher.get('name')!r}")
        found = [mismatch for part in getattr(store, "stores", (store,)) for mismatch in check_content(part)]
        found += check_clips(store, clips, config.allow_missing, config.other_clip_store)
        if config.teacher:
            found += check_teacher(store, config.teacher[number], clips)
        mismatches += [f"{store.path}: {mismatch}" for mismatch in found]
    if mismatches:
        raise ValueError("\n  ".join([f"{len(mismatches)} mismatches", *mismatches]))
    print("ids, class lists, fingerprints and values agree")
    if not clips.class_counts().any():
        print("no clip has a label: no mAP")
        return
    for store in ensemble.stores:
        print(f"mAP {mean_average_precision(LogitEnsemble((store,), (1.0,)), clips):.4f}  {store.path}")
    if len(ensemble.stores) > 1:
        print(f"mAP {mean_average_precision(ensemble, clips):.4f}  ensemble, weights {list(ensemble.weights)}")


def check_content(store: LogitStore) -> list[str]:
    """What is wrong within a store: ids out of order or repeated, values that are not finite, bytes that have changed."""
    mismatches = []
    order = store.clip_id_order
    if not np.array_equal(np.bincount(order.clip(0, len(order) - 1), minlength=len(order)), np.ones(len(order))):
        mismatches.append("its order of clip ids does not name every row once")
    else:
        in_order = store.encoded_clip_ids[order]
        repeated = in_order[1:][in_order[1:] == in_order[:-1]]
        if len(repeated):
            names = [identifier.decode(errors="replace") for identifier in np.unique(repeated).tolist()]
            mismatches.append(f"{len(names)} clip ids occur more than once: {listed(names)}")
        if (in_order[1:] < in_order[:-1]).any():
            mismatches.append("its clip ids are not in the order that look-up relies on")
    not_finite = [rows[~np.isfinite(logits).all(axis=1)] for rows, logits in store.blocks()]
    rows = np.concatenate(not_finite)
    if len(rows):
        names = [store.clip_id(int(row)) for row in rows[:10]]
        mismatches.append(f"{len(rows)} clips have logits that are not finite, the first: {listed(names)}")
    if store.read_fingerprint() != store.fingerprint:
        mismatches.append("its content does not have the fingerprint that it was written with")
    return mismatches


def check_clips(store: LogitStore, clips: AnyClips, allow_missing: bool, other_clip_store: bool) -> list[str]:
    """What does not fit between a logit store and a clip store with the same classes."""
    mismatches = []
    other = store.clip_store_fingerprint != clips.fingerprint
    if other and not other_clip_store:
        mismatches.append(
            f"it was made from another clip store (fingerprint {brief(store.clip_store_fingerprint)}, {clips.path} has "
            f"{clips.fingerprint}); --other-clip-store allows that if every clip's audio agrees"
        )
    missing: list[str] = []
    changed: list[str] = []
    unknown: list[str] = []
    for start in range(0, len(clips), ROWS_PER_BLOCK):
        rows = np.arange(start, min(start + ROWS_PER_BLOCK, len(clips)))
        ids = np.array([clips.clip_id(row) for row in rows], dtype=object)
        found = store.rows(ids)
        now, then = clips.audio_digests(rows), store.audio_digests(np.maximum(found, 0))
        known = now.any(axis=1) & then.any(axis=1)
        missing += ids[found < 0].tolist()
        changed += ids[(found >= 0) & known & (now != then).any(axis=1)].tolist()
        unknown += ids[(found >= 0) & ~known].tolist()
    if missing and not allow_missing:
        mismatches.append(f"{len(missing)} of {len(clips)} clips have no logits: {listed(missing)}")
    if changed:
        mismatches.append(f"{len(changed)} clips have other audio than the teacher heard: {listed(changed)}")
    if other and other_clip_store and unknown:
        mismatches.append(
            f"it was made from another clip store, and for {len(unknown)} clips it is not known whether the audio is the "
            f"same (no digests): {listed(unknown)}"
        )
    covered = len(clips) - len(missing)
    print(f"  covers {covered} of {len(clips)} clips; {len(store) - covered} more clips are not in {clips.path}")
    return mismatches


def check_teacher(store: LogitStore, spec: str, clips: AnyClips) -> list[str]:
    """What tells the teacher named by ``spec`` from the one whose logits are stored."""
    teacher = load_teacher_as_stored(spec, store.teacher, clips.class_names)
    if teacher.fingerprint == store.teacher.get("fingerprint"):
        return []
    return [
        f"it is not of teacher {spec}, whose fingerprint is {teacher.fingerprint}; "
        f"found {store.teacher.get('fingerprint')} ({store.teacher.get('name')!r})"
    ]


def mean_average_precision(ensemble: LogitEnsemble, clips: AnyClips) -> float:
    """Mean over the classes that occur of scikit-learn's average precision, over the clips that have logits.

    Goes through the store once for every block of classes, so that memory stays bounded for any number of clips.
    """
    class_block = max(1, PAIRS_AT_ONCE // len(clips))
    num_classes = len(clips.class_names)
    precisions: list[float] = []
    with progress(total=num_classes, desc="average precision", unit="class", leave=False) as bar:
        for first in range(0, num_classes, class_block):
            columns = slice(first, min(first + class_block, num_classes))
            scores, targets = [], []
            for start in range(0, len(clips), ROWS_PER_BLOCK):
                rows = np.arange(start, min(start + ROWS_PER_BLOCK, len(clips)))
                logits, present = ensemble.read([clips.clip_id(row) for row in rows])
                scores.append(logits[present, columns])
                targets.append(clips.targets(rows[present])[:, columns].astype(bool))
            all_scores, all_targets = np.concatenate(scores), np.concatenate(targets)
            for index in range(all_scores.shape[1]):
                if all_targets[:, index].any():
                    precisions.append(average_precision_score(all_targets[:, index], all_scores[:, index]))
                bar.update()
    if not precisions:
        raise ValueError(f"no labelled clip of {clips.path} has logits, so there is no mAP")
    return float(np.mean(precisions))


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(lambda: verify(parse(VerifyConfig, arguments, "kd verify")))


if __name__ == "__main__":
    raise SystemExit(main())
