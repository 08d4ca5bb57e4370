"""What fine-tuning requires of the user's own sounds, in folders or in lists."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from audio_datasets.system.messages import listed
from audio_datasets.tasks.listing import Listing, Split, in_our_splits

UNKNOWN_LABELS = "(unknown)"
"""Stands in place of labels: the clip's classes are unknown. An empty cell of a manifest means the same."""
NONE_OF_THEM = "(none)"
"""Stands in place of labels: the clip has none of the classes."""

SPLITS: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "val", "validation", "dev"), "valid"),
    **dict.fromkeys(("test", "eval", "evaluation"), "test"),
}
DEVELOPMENT = "dev"
"""Validation beside a training split; without one, all that is not for testing, as in FSD50K."""


def is_split(name: str) -> bool:
    """Whether a folder or a cell is called like a split, in upper or lower case."""
    return name.lower() in SPLITS


def splits_among(names: Iterable[str]) -> dict[str, Split]:
    """The split that each of the names stands for, which may depend on the others."""
    names = list(names)
    found = {name: SPLITS[name.lower()] for name in names}
    if "train" not in found.values():
        found |= {name: "train" for name in names if name.lower() == DEVELOPMENT}
    return found


def for_training(listing: Listing, path: Path) -> Listing:
    """The listing with its splits called train, valid and test, and a note on whether its classes exclude each other.

    Raises:
        ValueError: fewer than two classes, or a split of another name.
    """
    if len(listing.class_names) < 2:
        found = listed(listing.class_names)
        raise ValueError(f"{path} has {len(listing.class_names)} classes ({found}); two are needed")
    there = dict.fromkeys(clip.split for clip in listing.clips if clip.split is not None and is_split(clip.split))
    ours = splits_among(there)
    listing = in_our_splits(listing, path, SPLITS | {name.lower(): split for name, split in ours.items()})
    notes = [f"split {name!r} is taken as {split}" for name, split in ours.items() if name.lower() == DEVELOPMENT]
    labelled = [clip for clip in listing.clips if clip.is_labelled]
    several = next((clip for clip in labelled if len(clip.labels) != 1), None)
    whose = "every clip" if len(labelled) == len(listing.clips) else "every labelled clip"
    kind = f"{whose} has one label, so they exclude each other (single-label)"
    if several is not None:
        kind = f"multi-label, since clip {several.clip_id!r} has {len(several.labels)} labels"
    return replace(listing, notes=(*listing.notes, *notes, kind))


def note_on_unlabelled(listing: Listing) -> tuple[str, ...]:
    """A note on the clips whose labels are unknown, if there are any."""
    unlabelled = [clip.clip_id for clip in listing.clips if not clip.is_labelled]
    if not unlabelled:
        return ()
    return (
        f"{len(unlabelled)} of {len(listing.clips)} clips have unknown labels ({listed(unlabelled, limit=3)}); a clip that has "
        f"none of the classes is marked {NONE_OF_THEM}",
    )
