"""What fine-tuning asks of the user's own sounds, however they are listed."""

from dataclasses import replace
from pathlib import Path

from audio_datasets.system.messages import listed
from audio_datasets.tasks.listing import Listing, in_our_splits

UNKNOWN_LABELS = "(unknown)"
"""In place of labels: nobody knows which classes the clip has. An empty cell of a manifest means the same."""
NONE_OF_THEM = "(none)"
"""In place of labels: the clip has none of the classes."""

SPLITS = {
    **dict.fromkeys(("train", "training", "dev"), "train"),
    **dict.fromkeys(("valid", "val", "validation"), "valid"),
    **dict.fromkeys(("test", "eval", "evaluation"), "test"),
}


def for_training(listing: Listing, path: Path) -> Listing:
    """The listing with its splits called train, valid and test, and a note on whether its classes exclude each other.

    Raises:
        ValueError: fewer than two classes, or a split of another name.
    """
    if len(listing.class_names) < 2:
        found = listed(listing.class_names)
        raise ValueError(f"{path} has {len(listing.class_names)} classes ({found}); two are needed")
    listing = in_our_splits(listing, path, SPLITS)
    labelled = [clip for clip in listing.clips if clip.is_labelled]
    several = next((clip for clip in labelled if len(clip.labels) != 1), None)
    whose = "every clip" if len(labelled) == len(listing.clips) else "every labelled clip"
    kind = f"{whose} has one label, so they exclude each other (single-label)"
    if several is not None:
        kind = f"multi-label, since clip {several.clip_id!r} has {len(several.labels)} labels"
    return replace(listing, notes=(*listing.notes, kind))


def note_on_unlabelled(listing: Listing) -> tuple[str, ...]:
    """A note on the clips whose labels are unknown, if there are any."""
    unlabelled = [clip.clip_id for clip in listing.clips if not clip.is_labelled]
    if not unlabelled:
        return ()
    return (
        f"{len(unlabelled)} of {len(listing.clips)} clips have unknown labels ({listed(unlabelled, limit=3)}); a clip that has "
        f"none of the classes is marked {NONE_OF_THEM}",
    )
