"""What fine-tuning asks of the user's own sounds, however they are listed."""

from dataclasses import replace
from pathlib import Path

from audio_datasets.system.messages import listed
from audio_datasets.tasks.listing import Listing, in_our_splits

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
    several = next((clip for clip in listing.clips if len(clip.labels) != 1), None)
    kind = "every clip has one label, so they exclude each other (single-label)"
    if several is not None:
        kind = f"multi-label, since clip {several.clip_id!r} has {len(several.labels)} labels"
    return replace(listing, notes=(*listing.notes, kind))
