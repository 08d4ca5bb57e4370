"""Audio without labels, read as clips: a folder of sounds, or a clip store whose labels are not used."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.hdf5_arrays import encode_ids
from audio_datasets.system.files import digest_of
from audio_datasets.system.messages import listed
from audio_datasets.tasks.audio_files import FolderWalk, is_audio, passed_over_by_kind
from audio_datasets.tasks.label_space import LabelSpace
from audio_datasets.tasks.listing import Clip, Listing, checked, describe_unusable
from audio_datasets.tasks.task import TaskClips


def read_sounds(folder: Path) -> Listing:
    """Every audio file below ``folder`` at any depth; links are followed, hidden ones are passed over. Clip ids are paths relative to ``folder``.

    Raises:
        ValueError: no folder, or no audio in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    walk = FolderWalk(folder)
    clips, ignored = [], []
    for name in sorted(walk.files(), key=lambda name: name.split("/")):
        if is_audio(name):
            clips.append(Clip(clip_id=name, path=folder / name, source=name, labels=(), known=()))
        else:
            ignored.append(name)
    listing = Listing(
        (),
        tuple(clips),
        ignored=tuple(ignored),
        notes=tuple(walk.notes()),
        unusable=tuple(
            (name, reason) for name, reason in walk.unusable.items() if is_audio(name) or not Path(name).suffix
        ),
    )
    return checked(listing, folder, "unlabelled sounds", allow_outside=True)


class SoundFolder(TaskClips):
    """Every audio file of a folder as a clip without labels. ``kd teach`` reads it in place of a clip store.

    Raises:
        ValueError: no folder, or no audio in it.
    """

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        listing = read_sounds(folder)
        self.note = f"{folder}: {len(listing.clips)} clips without labels"
        if listing.ignored:
            self.note += f"; skipped, as not audio: {passed_over_by_kind(listing.ignored)}, as {listed(listing.ignored, limit=3)}"
        if listing.unusable:
            self.note += f"; {describe_unusable(listing)}"
        self.note = "; ".join((self.note, *listing.notes))
        super().__init__(folder, class_names, listing.clips, LabelSpace.single(class_names, exclusive=False))

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits over ids and contents of the files."""
        return digest_of("\0".join(self.clip_ids), self.content_fingerprint)

    @property
    def encoded_clip_ids(self) -> np.ndarray:
        """All ids in row order as stores hold them, S<longest> (n,)."""
        return encode_ids(self.clip_ids)

    def verify_audio(self, row: int) -> None:
        """Nothing: what the file was before is not known."""


AnySounds = SoundFolder | ClipStore


def open_unlabelled(path: Path, class_names: Sequence[str]) -> AnySounds:
    """The sounds at ``path``, a folder or a clip store; ``class_names`` are those of the clips that they go with.

    Raises:
        ValueError: neither of the two, or a damaged one.
    """
    if path.is_dir():
        return SoundFolder(path, class_names)
    if not path.exists():
        raise ValueError(f"no such folder of sounds or clip store: {path}")
    return ClipStore.open(path)
