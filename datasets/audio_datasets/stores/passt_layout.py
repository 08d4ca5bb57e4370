"""Reads clip files in the layout of PaSST and EfficientAT unchanged (docs/clip_store.md).

Shapes: n clips, C classes, k requested rows.
"""

import os
from functools import cached_property
from pathlib import Path

import h5py
import numpy as np

from audio_datasets.stores.class_lists import read_class_names
from audio_datasets.stores.clip_contents import DIGEST_BYTES, fingerprint_of, packed_bytes
from audio_datasets.stores.hdf5_arrays import BytesOfVaryingLength, decode_ids, id_order, is_mappable, map_array
from audio_datasets.system.files import digest_of
from audio_datasets.system.messages import listed
from audio_datasets.system.paths.contents import State, state_of
from audio_datasets.system.paths.sizes import require_room
from audio_datasets.tasks.label_space import LabelSpace

DATASETS = ("audio_name", "mp3", "target")
SAMPLED_CLIPS = 256
"""Clips whose audio is compared to notice that a file was replaced."""
ROWS_AT_ONCE = 8_192


class PasstContents:
    """The layout of PaSST and EfficientAT: ``audio_name`` S<width>, ``mp3`` bytes of varying length, ``target`` bits."""

    def __init__(self, path: Path, class_names: tuple[str, ...] | None):
        self.class_names = _class_names(path, class_names)
        self.label_space = LabelSpace.single(self.class_names, exclusive=False)
        self.is_masked = False
        self.audio_kind = "encoded"
        self.sample_rate_hz = 0
        self.attributes = {}
        # Kept open as long as this process uses it, because chunked arrays can only be read through HDF5.
        self._file = h5py.File(path, "r", locking=False)
        mp3, target = self._file["mp3"], self._file["target"]
        clips = len(mp3)
        packed = packed_bytes(len(self.class_names))
        if target.shape != (clips, packed) or target.dtype != np.uint8:
            raise ValueError(
                f"{path}: target must be packed bits for {clips} clips and {len(self.class_names)} classes, "
                f"uint8 {(clips, packed)}; found {target.dtype} {target.shape}"
            )
        if h5py.check_vlen_dtype(mp3.dtype) != np.uint8:
            raise ValueError(f"{path}: mp3 is {mp3.dtype}; expected uint8 of varying length")
        self._mp3 = BytesOfVaryingLength(path, mp3) if BytesOfVaryingLength.lies_plain(mp3) else mp3
        self._targets = map_array(self._file, "target") if is_mappable(target) else target
        self._path = path
        self.ids = _ids(self._file)
        if self.ids.shape != (clips,) or self.ids.dtype.kind != "S":
            raise ValueError(
                f"{path}: audio_name is {self.ids.dtype} {self.ids.shape}; expected a name for {clips} clips"
            )

    def check(self) -> None:
        in_order = self.ids[self.order]
        repeated = np.unique(in_order[1:][in_order[1:] == in_order[:-1]])
        if len(repeated):
            raise ValueError(
                f"{self._path}: names in audio_name must be unique; found more than once: {listed(decode_ids(repeated))}"
            )

    @cached_property
    def order(self) -> np.ndarray:
        return id_order(self.ids)

    def packed_targets(self, rows: np.ndarray) -> np.ndarray:
        if isinstance(self._targets, np.ndarray):
            return self._targets[rows]
        # HDF5 requires rows in ascending order without repetitions.
        unique, inverse = np.unique(np.arange(len(self.ids))[rows], return_inverse=True)
        return self._targets[unique][inverse]

    def packed_mask(self, rows: np.ndarray) -> np.ndarray:
        raise AssertionError("every label is known in this layout")

    def audio_digests(self, rows: np.ndarray) -> np.ndarray:
        return np.zeros((len(rows), DIGEST_BYTES), dtype=np.uint8)

    def audio_length(self, row: int) -> int:
        return len(self.audio(row))

    def audio(self, row: int, first: int = 0, end: int | None = None) -> np.ndarray:
        row = range(len(self.ids))[row]
        try:
            return self._mp3[row][first:end]
        except (OSError, RuntimeError) as error:
            raise ValueError(f"its bytes cannot be read from the file: {error}") from error

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_of(self, np.empty((0, DIGEST_BYTES), dtype=np.uint8))

    @cached_property
    def content_fingerprint(self) -> str:
        return digest_of(self.fingerprint, *(self.audio(row).tobytes() for row in self._sample()))

    @cached_property
    def index_digest(self) -> str:
        rows = np.arange(len(self.ids))
        targets = [
            self.packed_targets(rows[start : start + ROWS_AT_ONCE]).tobytes()
            for start in range(0, len(rows), ROWS_AT_ONCE)
        ]
        return digest_of(self.content_fingerprint, *targets)

    def _sample(self) -> list[int]:
        """Rows that stand for all, evenly spread: this layout has no digests, and to read it whole takes minutes."""
        return (
            np.unique(np.linspace(0, len(self.ids) - 1, SAMPLED_CLIPS).astype(np.int64)).tolist()
            if len(self.ids)
            else []
        )

    def state_now(self) -> State:
        return state_of(os.fstat(self._file.id.get_vfd_handle()))

    def is_still(self, index_digest: str, same_content: bool) -> bool:
        return same_content


def _class_names(path: Path, class_names: tuple[str, ...] | None) -> tuple[str, ...]:
    beside = path.with_name("class_labels_indices.csv")
    if class_names is not None:
        return class_names
    if beside.exists():
        return read_class_names(beside)
    raise ValueError(
        f"{path} (layout of PaSST and EfficientAT) contains no class names: give a class list, or put AudioSet's "
        f"{beside.name} beside it"
    )


def _ids(file: h5py.File) -> np.ndarray:
    names = file["audio_name"]
    # With their order, and as Python's bytes if they are not stored as one block.
    require_room(file.filename, len(names) * (8 + max(names.dtype.itemsize, 64)), "its names")
    if names.dtype.kind == "S" and is_mappable(names):
        return map_array(file, "audio_name")
    return np.array([name if isinstance(name, bytes) else str(name).encode("utf-8") for name in names[:]])
