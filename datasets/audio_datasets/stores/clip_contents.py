"""Our own file layout of a clip store, and the interface that every layout provides to ``ClipStore`` (docs/clip_store.md).

Shapes: n clips, C classes, k requested rows.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import h5py
import numpy as np

from audio_datasets.stores.class_lists import check_class_names, class_list_difference
from audio_datasets.stores.hdf5_arrays import FileRows, dataset_of, map_arrays, string_attribute
from audio_datasets.system.files import digest_of, parse_json
from audio_datasets.system.messages import brief
from audio_datasets.system.paths.contents import State, state_of
from audio_datasets.tasks.label_space import LabelGroup, LabelSpace

FORMAT = "kd-clip-store"
FORMAT_VERSION = 2
MASKED_VERSION = 3
"""Only for stores with unknown labels, which programs that read version 2 would treat as absent."""
READABLE_VERSIONS = (1, FORMAT_VERSION, MASKED_VERSION)  # version 1 has no digest of its index
AUDIO_KINDS = {"encoded": np.dtype("uint8"), "pcm16": np.dtype("<i2")}
DIGEST_BYTES = 16
INDEX_DIGEST = "index_digest"
LABEL_GROUPS = "label_groups"


class Contents(Protocol):
    """The interface of an open file, in any layout, for ``ClipStore``."""

    class_names: tuple[str, ...]
    label_space: LabelSpace
    is_masked: bool
    audio_kind: str
    sample_rate_hz: int
    attributes: dict[str, str]
    ids: np.ndarray  # (n,) fixed-width UTF-8
    order: np.ndarray  # int64 (n,)
    fingerprint: str
    content_fingerprint: str  # of the audio as well, as far as that is cheap, where the file has no digests of it
    index_digest: str  # of all except audio

    def state_now(self) -> State: ...  # of the open file, whatever lies at its path
    def is_still(
        self, index_digest: str, same_content: bool
    ) -> bool: ...  # read anew; size and time of content are the same
    def packed_targets(self, rows: np.ndarray) -> np.ndarray: ...  # uint8 (k, ceil(C / 8))
    def packed_mask(self, rows: np.ndarray) -> np.ndarray: ...  # the same; bits of known labels; only if is_masked
    def audio_digests(self, rows: np.ndarray) -> np.ndarray: ...  # uint8 (k, 16)
    def audio_length(self, row: int) -> int: ...  # bytes or samples
    def audio(
        self, row: int, first: int = 0, end: int | None = None
    ) -> np.ndarray: ...  # uint8 or int16 (end - first,)
    def check(self) -> None: ...  # checks over all clips, done once and not in every worker; raises ValueError


class NativeContents:
    """Our own layout. The HDF5 file is closed after opening."""

    def __init__(self, file: h5py.File, class_names: tuple[str, ...] | None):
        path = file.filename
        version = self.version = int(file.attrs["format_version"])
        if version not in READABLE_VERSIONS:
            raise ValueError(f"{path} has clip store version {brief(version)}; this program reads {READABLE_VERSIONS}")
        try:
            self.class_names = check_class_names(parse_json(string_attribute(file, "class_names") or "[]"))
        except ValueError as error:
            raise ValueError(f"{path} is a damaged clip store: its class names cannot be read: {error}") from error
        if class_names is not None:
            difference = class_list_difference(self.class_names, class_names)
            if difference:
                raise ValueError(f"{path} has another class list than the requested one: {difference}")
        self.audio_kind = string_attribute(file, "audio_kind")
        if self.audio_kind not in AUDIO_KINDS:
            raise ValueError(f"{path} has audio kind {brief(self.audio_kind)}; known: {sorted(AUDIO_KINDS)}")
        self.sample_rate_hz = int(file.attrs["sample_rate_hz"])
        self._path = path
        self._index_digest = string_attribute(file, INDEX_DIGEST)
        if self._index_digest is None and (version > 1 or INDEX_DIGEST in file.attrs):
            raise ValueError(f"{path} is a damaged clip store: it has no {INDEX_DIGEST}")
        own = {"format", "format_version", "class_names", "audio_kind", "sample_rate_hz", INDEX_DIGEST, LABEL_GROUPS}
        self.label_space = _label_space(file, self.class_names)
        self.attributes = {name: string_attribute(file, name) for name in file.attrs if name not in own}

        known = ("known",) if version >= MASKED_VERSION else ()
        index = map_arrays(file, ("clip_id", "clip_id_order", "offset", "target", "audio_digest", *known))
        self.ids, self.order, self._offsets = index["clip_id"], index["clip_id_order"], index["offset"]
        self._targets, self._digests, self._known = index["target"], index["audio_digest"], index.get("known")
        self._audio = FileRows(Path(path), dataset_of(file, "audio"))
        clips, packed = len(self.ids), packed_bytes(len(self.class_names))
        expected = {
            "clip_id": (self.ids, (clips,), "S"),
            "clip_id_order": (self.order, (clips,), "i"),
            "offset": (self._offsets, (clips + 1,), "i"),
            "audio": (self._audio, (math.prod(self._audio.shape),), AUDIO_KINDS[self.audio_kind].kind),
            "target": (self._targets, (clips, packed), "u"),
            "audio_digest": (self._digests, (clips, DIGEST_BYTES), "u"),
        }
        if self._known is not None:
            expected["known"] = (self._known, (clips, packed), "u")
        for name, (array, shape, kind) in expected.items():
            if array.shape != shape or array.dtype.kind != kind:
                raise ValueError(
                    f"{path} is a damaged clip store: {name} must be of kind {kind} {shape}; found {array.dtype} {array.shape}"
                )

    def state_now(self) -> State:
        return state_of(os.fstat(self._audio.descriptor))

    @cached_property
    def index_digest(self) -> str:
        return self._index_digest or self._digest_of_arrays()

    def is_still(self, index_digest: str, same_content: bool) -> bool:
        return self._digest_of_arrays() == index_digest

    def _digest_of_arrays(self) -> str:
        arrays = [self.ids, self.order, self._offsets, self._targets, self._digests]
        arrays += [] if self._known is None else [self._known]
        return digest_of_index(self.class_names, self.audio_kind, self.sample_rate_hz, *arrays)

    def check(self) -> None:
        whole = self._offsets[0] == 0 and self._offsets[-1] == len(self._audio)
        if not whole or (np.diff(self._offsets) < 0).any():
            raise ValueError(f"{self._path} is a damaged clip store: its offsets do not match its audio")
        if self._index_digest is not None and self._index_digest != self._digest_of_arrays():
            raise ValueError(f"{self._path} is a damaged clip store: its ids, targets or offsets have changed")

    def packed_targets(self, rows: np.ndarray) -> np.ndarray:
        return self._targets[rows]

    @property
    def is_masked(self) -> bool:
        return self._known is not None

    def packed_mask(self, rows: np.ndarray) -> np.ndarray:
        assert self._known is not None
        return self._known[rows]

    def audio_digests(self, rows: np.ndarray) -> np.ndarray:
        return self._digests[rows]

    def audio_length(self, row: int) -> int:
        row = range(len(self.ids))[row]  # IndexError beyond the end, and negative rows count from it
        return int(self._offsets[row + 1] - self._offsets[row])

    def audio(self, row: int, first: int = 0, end: int | None = None) -> np.ndarray:
        length = self.audio_length(row)
        first, end, _ = slice(first, end).indices(length)
        return self._audio.read_run(int(self._offsets[row % len(self.ids)]) + first, max(0, end - first))

    @property
    def audio_lengths(self) -> np.ndarray:
        """int64 (n,): bytes or samples of each clip."""
        return np.diff(self._offsets)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_of(self, self._digests)

    @property
    def content_fingerprint(self) -> str:
        return self.fingerprint


def _label_space(file: h5py.File, class_names: tuple[str, ...]) -> LabelSpace:
    """The label space in the file; one non-exclusive group if there is none."""
    text = string_attribute(file, LABEL_GROUPS)
    if text is None:
        if LABEL_GROUPS in file.attrs:
            raise ValueError(f"{file.filename} is a damaged clip store: its {LABEL_GROUPS} cannot be read")
        return LabelSpace.single(class_names, exclusive=False)
    try:
        groups, start = [], 0
        for name, classes, exclusive in parse_json(text):
            groups.append(LabelGroup(str(name), class_names[start : start + int(classes)], exclusive is True))
            start += int(classes)
        if start != len(class_names):
            raise ValueError(f"its groups have {start} classes, but the class list has {len(class_names)}")
        return LabelSpace(tuple(groups))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{file.filename} is a damaged clip store: its {LABEL_GROUPS} cannot be read: {error}"
        ) from error


def label_groups_attribute(label_space: LabelSpace) -> str | None:
    """The value of a store's attribute ``label_groups``; None for one non-exclusive group, which needs no attribute."""
    if len(label_space.groups) == 1 and label_space == LabelSpace.single(label_space.class_names, exclusive=False):
        return None
    groups = [[group.name, len(group.class_names), group.exclusive] for group in label_space.groups]
    return json.dumps(groups, ensure_ascii=False)


def fingerprint_of(contents: Contents, digests: np.ndarray) -> str:
    names = json.dumps(contents.class_names, ensure_ascii=False)
    kind = f"{contents.audio_kind} {contents.sample_rate_hz} {contents.ids.dtype.itemsize}"
    return digest_of(names, kind, np.ascontiguousarray(contents.ids).tobytes(), np.ascontiguousarray(digests).tobytes())


def audio_digest(audio: np.ndarray) -> np.ndarray:
    """uint8 (16,): hash of a clip's stored audio."""
    return np.frombuffer(hashlib.blake2b(audio, digest_size=DIGEST_BYTES).digest(), np.uint8)


def digest_of_index(class_names: Sequence[str], audio_kind: str, sample_rate_hz: int, *arrays: np.ndarray) -> str:
    """Digest of everything in a clip store except its audio and additional attributes, 32 hexadecimal digits."""
    state = hashlib.blake2b(json.dumps([class_names, audio_kind, int(sample_rate_hz)]).encode(), digest_size=16)
    for array in arrays:
        state.update(f"{array.dtype} {array.shape}".encode())
        state.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))  # does not copy mapped arrays
    return state.hexdigest()


def packed_bytes(classes: int) -> int:
    return -(-classes // 8)
