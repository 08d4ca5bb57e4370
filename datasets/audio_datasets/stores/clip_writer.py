"""Writes clip stores, from clips in memory or from other stores such as shards (docs/clip_store.md).

Shapes: n clips, C classes.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from audio_datasets.audio.spool import FilePart
from audio_datasets.stores.class_lists import check_class_names
from audio_datasets.stores.clip_contents import (
    AUDIO_KINDS,
    DIGEST_BYTES,
    FORMAT,
    FORMAT_VERSION,
    INDEX_DIGEST,
    LABEL_GROUPS,
    MASKED_VERSION,
    NativeContents,
    digest_of_index,
    label_groups_attribute,
)
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.hdf5_arrays import (
    ArrayFile,
    ArrayWriter,
    FileRows,
    create_hdf5,
    dataset_of,
    encode_ids,
    id_order,
    open_hdf5,
)
from audio_datasets.system.files import written_aside
from audio_datasets.system.messages import listed
from audio_datasets.tasks.label_space import LabelSpace

# HDF5 keeps attributes of up to 64 KiB in the object's header, next to each other.
LARGEST_CLASS_LIST_BYTES = 60_000
BYTES_AT_ONCE = 16 * 2**20


@dataclass(frozen=True)
class ClipRecord:
    """One clip to write: its id, its audio and the names of its classes."""

    clip_id: str
    audio: bytes | np.ndarray | FilePart
    """An encoded file's bytes (audio kind ``encoded``), or int16 (samples,) (``pcm16``); or where these lie on the disk."""
    labels: tuple[str, ...] = ()
    known: tuple[str, ...] | None = None
    """The classes for which it is known whether the clip has them; None for all."""


def write_clip_store(
    path: str | Path,
    clips: Iterable[ClipRecord],
    class_names: Sequence[str],
    *,
    audio_kind: str = "encoded",
    sample_rate_hz: int = 0,
    label_space: LabelSpace | None = None,
    attributes: Mapping[str, str] | None = None,
) -> None:
    """Writes a clip store under a temporary name and renames it. Keeps all clips in memory: for shards and small sets.

    ``sample_rate_hz`` 0 means that each encoded clip keeps its own rate; PCM needs a rate. ``label_space`` None means one
    non-exclusive group. ``attributes`` are additional texts to store. Equal input gives equal bytes.

    Raises ValueError for repeated ids, labels that are not classes, or audio of another kind than ``audio_kind``.
    """
    names = _check_settings(class_names, audio_kind, sample_rate_hz)
    space = LabelSpace.single(names, exclusive=False) if label_space is None else label_space
    if space.class_names != names:
        raise ValueError("the label groups and the class list have different classes")
    clips = list(clips)
    dtype = AUDIO_KINDS[audio_kind]
    targets = _matrix(clips, [clip.labels for clip in clips], names)
    known = None
    if any(clip.known is not None for clip in clips):
        known = _matrix(clips, [names if clip.known is None else clip.known for clip in clips], names)
        if (targets & ~known).any():
            row = int((targets & ~known).any(axis=1).argmax())
            raise ValueError(f"clip {clips[row].clip_id!r} has labels that are not among its known ones")
    blocks: list[np.ndarray | FilePart] = []
    for clip in clips:
        if isinstance(clip.audio, FilePart):
            blocks.append(clip.audio)
            continue
        if isinstance(clip.audio, bytes) != (audio_kind == "encoded"):
            raise ValueError(f"clip {clip.clip_id!r}: {audio_kind} audio expected; found {type(clip.audio).__name__}")
        block = np.frombuffer(clip.audio, dtype) if isinstance(clip.audio, bytes) else np.asarray(clip.audio)
        if block.ndim != 1 or block.dtype != dtype:
            raise ValueError(f"clip {clip.clip_id!r}: {dtype} (samples,) expected; found {block.dtype} {block.shape}")
        blocks.append(block)
    sizes = [block.size if isinstance(block, FilePart) else block.nbytes for block in blocks]
    lengths = np.array(sizes, dtype=np.int64) // dtype.itemsize
    digests = [_digest(_pieces_of(block, dtype)) for block in blocks]
    with written_aside(Path(path)) as aside, create_hdf5(aside) as file:
        _write_attributes(file, space, audio_kind, sample_rate_hz, attributes or {})
        audio = _write_arrays(
            file,
            ids=encode_ids(clip.clip_id for clip in clips),
            lengths=lengths,
            targets=np.packbits(targets, axis=1),
            known=None if known is None or known.all() else np.packbits(known, axis=1),
            digests=np.array(digests, dtype=np.uint8).reshape(len(clips), DIGEST_BYTES),
            audio_dtype=dtype,
        )
        start = 0
        pieces = (piece for block in blocks for piece in _pieces_of(block, dtype))
        for block in _merged(pieces, BYTES_AT_ONCE):
            audio[start : start + len(block)] = block
            start += len(block)


def _matrix(clips: Sequence[ClipRecord], names_of_clips: Sequence[Sequence[str]], names: tuple[str, ...]) -> np.ndarray:
    """bool (n, C): true where a clip names the class."""
    index_of = {name: index for index, name in enumerate(names)}
    matrix = np.zeros((len(clips), len(names)), dtype=bool)
    for row, labels in enumerate(names_of_clips):
        unknown = [label for label in labels if label not in index_of]
        if unknown:
            raise ValueError(
                f"clip {clips[row].clip_id!r} has labels that are not in the class list: {listed(unknown)}"
            )
        matrix[row, [index_of[label] for label in labels]] = True
    return matrix


def _pieces_of(block: np.ndarray | FilePart, dtype: np.dtype) -> Iterable[np.ndarray]:
    return block.pieces(dtype) if isinstance(block, FilePart) else [block]


def _digest(pieces: Iterable[np.ndarray]) -> np.ndarray:
    """``audio_digest`` of a clip whose audio comes in pieces."""
    state = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for piece in pieces:
        state.update(piece)
    return np.frombuffer(state.digest(), np.uint8)


def _merged(blocks: Iterable[np.ndarray], bytes_at_once: int) -> Iterator[np.ndarray]:
    """The same data in fewer, longer arrays, because each write has an overhead."""
    group: list[np.ndarray] = []
    size = 0
    for block in blocks:
        group.append(block)
        size += block.nbytes
        if size >= bytes_at_once:
            yield np.concatenate(group)
            group, size = [], 0
    if group:
        yield np.concatenate(group)


def concatenate(
    stores: Sequence[str | Path],
    path: str | Path,
    *,
    attributes: Mapping[str, str] | None = None,
    report: Callable[[int], None] = lambda clips: None,
) -> None:
    """Writes the clips of several stores into one, in order. Audio is copied in blocks, so memory stays bounded.

    ``report`` is called with the number of clips just copied. Raises ValueError if the stores differ in class list, label
    space, audio kind or rate, or have a clip id in common.
    """
    if not stores:
        raise ValueError("no stores to concatenate")
    first = ClipStore.open(stores[0])
    is_masked = False
    ids, lengths, targets, known, digests = [], [], [], [], []
    for part in stores:
        store = ClipStore.open(part, first.class_names)
        if (store.audio_kind, store.sample_rate_hz) != (first.audio_kind, first.sample_rate_hz):
            raise ValueError(
                f"{part} has {store.audio_kind} at {store.sample_rate_hz} Hz, but {stores[0]} has {first.audio_kind} at "
                f"{first.sample_rate_hz} Hz"
            )
        if store.label_space != first.label_space:
            raise ValueError(f"{part} and {stores[0]} have different groups of classes")
        contents = store.contents
        if not isinstance(contents, NativeContents):
            raise ValueError(
                f"{part} is in the layout of PaSST and EfficientAT; only our own stores can be concatenated"
            )
        every = np.arange(len(store))
        ids.append(store.encoded_clip_ids)
        lengths.append(contents.audio_lengths)
        targets.append(contents.packed_targets(every))
        digests.append(contents.audio_digests(every))
        known.append(np.packbits(store.mask(every), axis=1))
        is_masked |= store.is_masked
    with written_aside(Path(path)) as aside, create_hdf5(aside) as file:
        _write_attributes(file, first.label_space, first.audio_kind, first.sample_rate_hz, attributes or {})
        audio = _write_arrays(
            file,
            ids=encode_ids(np.concatenate(ids)),
            lengths=np.concatenate(lengths),
            targets=np.concatenate(targets),
            known=np.concatenate(known) if is_masked else None,
            digests=np.concatenate(digests),
            audio_dtype=AUDIO_KINDS[first.audio_kind],
        )
        start = 0
        for part in stores:
            with open_hdf5(Path(part)) as shard:
                block = FileRows(Path(part), dataset_of(shard, "audio"))
                clips = len(shard["clip_id"])
            step = BYTES_AT_ONCE // block.dtype.itemsize
            for position in range(0, len(block), step):
                piece = block.read_run(position, min(step, len(block) - position))
                audio[start : start + len(piece)] = piece
                start += len(piece)
            report(clips)


def _check_settings(class_names: Sequence[str], audio_kind: str, sample_rate_hz: int) -> tuple[str, ...]:
    names = check_class_names(class_names)
    if len(json.dumps(names, ensure_ascii=False).encode()) > LARGEST_CLASS_LIST_BYTES:
        raise ValueError(f"the class list is too long: its names may take at most {LARGEST_CLASS_LIST_BYTES} bytes")
    if audio_kind not in AUDIO_KINDS:
        raise ValueError(f"audio_kind must be one of {sorted(AUDIO_KINDS)}; found {audio_kind!r}")
    if sample_rate_hz < 0 or (audio_kind == "pcm16" and sample_rate_hz == 0):
        raise ValueError(f"a sample rate must not be negative, and pcm16 needs one above 0; found {sample_rate_hz}")
    return names


def _write_attributes(
    file: ArrayFile, space: LabelSpace, audio_kind: str, sample_rate_hz: int, attributes: Mapping[str, str]
) -> None:
    file.attrs["format"] = FORMAT
    file.attrs["format_version"] = FORMAT_VERSION
    file.attrs["class_names"] = json.dumps(space.class_names, ensure_ascii=False)
    file.attrs["audio_kind"] = audio_kind
    file.attrs["sample_rate_hz"] = sample_rate_hz
    for name, value in attributes.items():
        file.attrs[name] = value
    label_groups = label_groups_attribute(space)
    if label_groups is not None:
        file.attrs[LABEL_GROUPS] = label_groups


def _write_arrays(
    file: ArrayFile,
    *,
    ids: np.ndarray,
    lengths: np.ndarray,
    targets: np.ndarray,
    known: np.ndarray | None,
    digests: np.ndarray,
    audio_dtype: np.dtype,
) -> ArrayWriter:
    """Writes all arrays except the audio, and returns the dataset for the audio."""
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])
    index = {
        "clip_id": ids,
        "clip_id_order": id_order(ids),
        "offset": offsets,
        "target": targets,
        "audio_digest": digests,
    }
    if known is not None:
        index["known"] = known
        file.attrs["format_version"] = MASKED_VERSION
    for name, array in index.items():
        file[name] = array
    settings = (json.loads(file.attrs["class_names"]), file.attrs["audio_kind"], file.attrs["sample_rate_hz"])
    file.attrs[INDEX_DIGEST] = digest_of_index(*settings, *index.values())
    return file.create_dataset("audio", shape=(int(offsets[-1]),), dtype=audio_dtype)
