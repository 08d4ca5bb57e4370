"""``kd verify``: checks logit stores against a clip store, and shows how good the teachers are."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from audio_datasets.stores.class_lists import check_same_classes, read_class_names
from audio_datasets.stores.joined import AnyClips, open_clips
from audio_datasets.system.command import parse, run_command
from audio_datasets.system.messages import Tally, brief, listed
from audio_datasets.system.paths.outputs import Output, check_outputs, containing
from teacher_logits.store import ROWS_PER_BLOCK, LogitStore
from teacher_logits.stores.class_precisions import class_precisions
from teacher_logits.stores.ensemble import LogitEnsemble, MeanOf
from teacher_logits.stores.precision_tables import class_table, summary, write_class_table
from teacher_logits.teachers.class_mapping import load_teacher_as_stored


@dataclass(frozen=True)
class VerifyConfig:
    """Check logit stores against a clip store: coverage, duplicates, class lists, fingerprints and finite values. Compute mAP."""

    logits: tuple[str, ...]
    """Logit stores, each PATH or PATH:WEIGHT."""
    clips: tuple[Path, ...]
    """Clip stores that the logits are for; several are treated as one."""
    ensemble: MeanOf = "logits"
    """Several teachers: average their logits or their probabilities."""
    classes: bool = False
    """Also print the average precision of each class: for each store, for the ensemble, and for the ensemble without each store."""
    table: Path | None = None
    """Write the table of --classes to this CSV file."""
    overwrite: bool = False
    """Let --table replace a file that holds something else than such a table."""
    average_precision: bool = True
    """Compute average precisions, which takes longer than the checks."""
    teacher: tuple[str, ...] = ()
    """Also check that the logits come from these teachers: one for each logit store, in the form that kd teach takes."""
    class_names: Path | None = None
    """Class list for clip stores without one (AudioSet's class_labels_indices.csv, or one name per line)."""
    allow_missing: bool = False
    """Allow clips without logits."""
    other_clip_store: bool = False
    """Allow logits made from another clip store (such as a larger one) if the audio of every clip is known to be the same."""

    def __post_init__(self) -> None:
        if not self.logits:
            raise ValueError("give at least one logit store with --logits")
        if self.teacher and len(self.teacher) != len(self.logits):
            raise ValueError(
                f"--teacher needs one teacher for each logit store; found {len(self.teacher)} for {len(self.logits)}"
            )
        if not self.average_precision and (self.classes or self.table):
            raise ValueError("--classes and --table need average precisions; leave out --no-average-precision")


def verify(config: VerifyConfig) -> None:
    """Checks the stores and prints the mAP of each and of their ensemble.

    Raises ValueError that lists all mismatches, one per line.
    """
    if config.table is not None:
        table = Output(config.table, containing(re.compile(rb"\Aclass,clips,")), "a table of classes")
        check_outputs(config, [table], config.overwrite)
    class_names = read_class_names(config.class_names) if config.class_names else None
    clips = open_clips(config.clips, class_names)
    ensemble = LogitEnsemble.open(config.logits, config.ensemble)
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
    if not config.average_precision:
        return
    if not clips.class_counts().any():
        print("no clip has a label: no mAP")
        return
    precisions = class_precisions(ensemble, clips)
    if precisions.num_clips < len(clips):
        print(f"mAP is taken over the {precisions.num_clips} clips that all stores have")
    print(summary(precisions, ensemble))
    if config.classes:
        print(class_table(precisions, ensemble))
    if config.table is not None:
        write_class_table(config.table, precisions, ensemble)
        print(f"{config.table} written")


def check_content(store: LogitStore) -> list[str]:
    """Faults inside a store: ids out of order or repeated, values that are not finite, changed bytes."""
    mismatches = []
    order = store.clip_id_order
    if not np.array_equal(np.bincount(order.clip(0, len(order) - 1), minlength=len(order)), np.ones(len(order))):
        mismatches.append("its order of clip ids does not contain every row exactly once")
    else:
        in_order = store.encoded_clip_ids[order]
        repeated = in_order[1:][in_order[1:] == in_order[:-1]]
        if len(repeated):
            names = [identifier.decode(errors="replace") for identifier in np.unique(repeated).tolist()]
            mismatches.append(f"{len(names)} clip ids occur more than once: {listed(names)}")
        if (in_order[1:] < in_order[:-1]).any():
            mismatches.append("its clip ids are not sorted, so looking them up would fail")
    not_finite = [rows[~np.isfinite(logits).all(axis=1)] for rows, logits in store.blocks()]
    rows = np.unique(np.concatenate(not_finite))
    if len(rows):
        names = [store.clip_id(int(row)) for row in rows[:10]]
        mismatches.append(f"{len(rows)} clips have logits that are not finite, the first: {listed(names)}")
    if store.read_fingerprint() != store.fingerprint:
        mismatches.append("its content has changed since it was written (the fingerprint differs)")
    return mismatches


def check_clips(store: LogitStore, clips: AnyClips, allow_missing: bool, other_clip_store: bool) -> list[str]:
    """Mismatches between a logit store and a clip store with the same classes."""
    mismatches = []
    other = store.clip_store_fingerprint != clips.fingerprint
    if other and not other_clip_store:
        mismatches.append(
            f"it was made from another clip store (fingerprint {brief(store.clip_store_fingerprint)}, {clips.path} has "
            f"{clips.fingerprint}); --other-clip-store allows this if the audio of every clip agrees"
        )
    missing, changed, unknown = Tally(), Tally(), Tally()
    for start in range(0, len(clips), ROWS_PER_BLOCK):
        rows = np.arange(start, min(start + ROWS_PER_BLOCK, len(clips)))
        ids = np.array([clips.clip_id(row) for row in rows], dtype=object)
        found = store.rows(ids)
        now, then = clips.audio_digests(rows), store.audio_digests(np.maximum(found, 0))
        known = now.any(axis=1) & then.any(axis=1)
        missing.add(ids[found < 0])
        changed.add(ids[(found >= 0) & known & (now != then).any(axis=1)])
        unknown.add(ids[(found >= 0) & ~known])
    if missing and not allow_missing:
        mismatches.append(f"{len(missing)} of {len(clips)} clips have no logits: {missing}")
    if changed:
        mismatches.append(f"{len(changed)} clips have different audio from what the teacher heard: {changed}")
    if other and other_clip_store and unknown:
        mismatches.append(
            f"it was made from another clip store, and for {len(unknown)} clips there are no digests to check whether the "
            f"audio is the same: {unknown}"
        )
    covered = len(clips) - len(missing)
    print(f"  covers {covered} of {len(clips)} clips; {len(store) - covered} more clips are not in {clips.path}")
    return mismatches


def check_teacher(store: LogitStore, spec: str, clips: AnyClips) -> list[str]:
    """The mismatch, if any, between the teacher named by ``spec`` and the one whose logits are stored."""
    teacher = load_teacher_as_stored(spec, store.teacher, clips.class_names)
    if teacher.fingerprint == store.teacher.get("fingerprint"):
        return []
    return [
        f"its logits are not from teacher {spec}, whose fingerprint is {teacher.fingerprint}; "
        f"found {store.teacher.get('fingerprint')} ({store.teacher.get('name')!r})"
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(lambda: verify(parse(VerifyConfig, arguments, "kd verify")))


if __name__ == "__main__":
    raise SystemExit(main())
