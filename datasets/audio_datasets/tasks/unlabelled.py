"""Audio without labels, read as clips: a folder of sounds, or a clip store whose labels are not used."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from audio_datasets.audio.codec import AUDIO_SUFFIXES
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.hdf5_arrays import encode_ids
from audio_datasets.system.files import digest_of
from audio_datasets.system.messages import listed
from audio_datasets.tasks.label_space import LabelSpace
from audio_datasets.tasks.listing import Clip, Listing, checked
from audio_datasets.tasks.task import TaskClips


def read_sounds(folder: Path) -> Listing:
    """Every audio file below ``folder`` at any depth; hidden ones are passed over. Clip ids are paths relative to ``folder``.

    Raises:
        ValueError: no folder, or no audio in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    clips, ignored = [], []
    for file in sorted(folder.rglob("*"), key=lambda file: file.relative_to(folder).parts):
        relative = file.relative_to(folder)
        if not file.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        name = relative.as_posix()
        if file.suffix.lower() in AUDIO_SUFFIXES:
            clips.append(Clip(clip_id=name, path=file, source=name, labels=(), known=()))
        else:
            ignored.append(name)
    return checked(Listing((), tuple(clips), ignored=tuple(ignored)), folder, "unlabelled sounds", allow_outside=True)


class SoundFolder(TaskClips):
    """Every audio file of a folder as a clip without labels. ``kd teach`` reads it in place of a clip store.

    Raises:
        ValueError: no folder, no audio in it, or a file name that cannot be a clip's id.
    """

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        listing = read_sounds(folder)
        self.note = f"{folder}: {len(listing.clips)} clips without labels"
        if listing.ignored:
            self.note += f"; skipped, as not audio: {listed(listing.ignored, limit=3)}"
        super().__init__(folder, class_names, listing.clips, LabelSpace.single(class_names, exclusive=False))

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits over ids and sizes of the files."""
        sizes = np.array([clip.path.stat().st_size for clip in self.clips], dtype="<i8")
        return digest_of("\0".join(self.clip_ids), sizes.tobytes())

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
