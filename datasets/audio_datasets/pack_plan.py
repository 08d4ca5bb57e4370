"""The plan of `kd pack`: the classes of each clip, the settings that must not change when a run is resumed, and the shards."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile

from audio_datasets.stores.class_lists import check_class_names, read_class_names, read_label_map
from audio_datasets.stores.manifest import manifest_path
from audio_datasets.stores.waveform_rows import row_bytes
from audio_datasets.system.files import digest_of, digest_of_pieces, read_json, remove_asides, remove_path, write_json
from audio_datasets.system.messages import listed
from audio_datasets.system.paths.outputs import Output, check_outputs, is_hdf5
from audio_datasets.tasks.label_space import LabelSpace
from audio_datasets.tasks.listing import Clip, Listing

SHARD_BYTES = 256 * 2**20
STORE_SUFFIXES = (".h5", ".hdf5")


@dataclass(frozen=True)
class LabelledClip:
    """A clip of a corpus with the classes of the store that it has."""

    clip: Clip
    class_names: tuple[str, ...]

    @property
    def path(self) -> Path:
        return self.clip.path


def with_class_names(
    listing: Listing, class_list: Path | None = None, label_map: str | None = None
) -> tuple[tuple[str, ...], list[LabelledClip]]:
    """The class names of the store, and each clip with its classes.

    Args:
        class_list: file with the class names; None: those of the listing, or of the label map.
        label_map: file with, or name of, a map from the listing's labels to class names.

    Raises:
        ValueError: labels without a class, by name; a label map where some labels are unknown.
    """
    names_of = {label: (label,) for label in listing.class_names}
    if label_map is not None:
        if any(clip.known for clip in listing.clips):  # a clip without labels needs no map
            raise ValueError(
                f"--label-map cannot be used with the layout {listing.layout}: many of its labels are unknown, which a map cannot "
                "carry over"
            )
        entries = read_label_map(label_map)
        unmapped = [label for label in listing.class_names if label not in entries]
        if unmapped:
            raise ValueError(f"label map {label_map} has no entry for {len(unmapped)} labels: {listed(unmapped)}")
        names_of = {label: entries[label] for label in listing.class_names}
    used = list(dict.fromkeys(name for names in names_of.values() for name in names))
    if class_list is None:
        if not used:
            raise ValueError("the clips have no labels; give the class list with --class-names")
        class_names = check_class_names(used)
    else:
        class_names = read_class_names(class_list)
        unknown = sorted(set(used) - set(class_names))
        if unknown:
            raise ValueError(f"{len(unknown)} labels are not in {class_list}: {listed(unknown)}")
    clips = []
    for clip in listing.clips:
        outside = [label for label in clip.labels if label not in names_of]
        if outside:
            raise ValueError(
                f"clip {clip.clip_id!r} has labels outside the class list: {listed(outside)}; the classes are "
                f"{listed(listing.class_names)}"
            )
        clips.append(
            LabelledClip(clip, tuple(dict.fromkeys(name for label in clip.labels for name in names_of[label])))
        )
    return class_names, clips


def packed_label_space(space: LabelSpace, class_names: tuple[str, ...], is_mapped: bool) -> LabelSpace:
    """A task's label space for a store with these classes.

    A label map may give a label several classes, so mapped classes do not exclude each other.

    Raises:
        ValueError: several groups of classes, and a store with other classes.
    """
    if space.class_names == class_names and not is_mapped:
        return space
    if len(space.groups) > 1:
        groups = [group.name for group in space.groups]
        raise ValueError(f"--class-names and --label-map cannot be used with the label groups {listed(groups)}")
    return LabelSpace.single(class_names, space.exclusive and not is_mapped)


def sizes_and_times(clips: Sequence[LabelledClip]) -> list[tuple[int, int]]:
    """Bytes and time of change (ns) of each clip's audio; a row of an HDF5 file has its share of it."""
    rows = {clip.path for clip in clips if clip.clip.row is not None}
    of_row = {path: (row_bytes(path), size_and_time(path)[1]) for path in rows}
    return [size_and_time(clip.path) if clip.clip.row is None else of_row[clip.path] for clip in clips]


def size_and_time(path: Path) -> tuple[int, int]:
    """Bytes and time of change (ns) of a file; zeros if it is not there, which packing reports."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def plan_of(
    options: dict[str, Any],
    class_names: tuple[str, ...],
    clips: Sequence[LabelledClip],
    sizes: Sequence[tuple[int, int]],
    shard_clips: int,
) -> tuple[dict[str, Any], str]:
    """What a resumed run must share with the first, and a digest of the corpus that goes into the store.

    The digest leaves out times, so that the same files give the same store. ``options`` say what the store's content depends on
    besides classes and clips.
    """
    options = options | {
        "class list": digest_of(*class_names),
        "labels, files and their sizes": _digest_of_clips(clips, sizes),
    }
    source_digest = digest_of(json.dumps(options, sort_keys=True))
    plan = options | {
        "version": 1,
        "times of the files": digest_of(json.dumps([time for _, time in sizes])),
        "shard_clips": shard_clips,
        "libsndfile": soundfile.__libsndfile_version__,
    }
    return plan, source_digest


def _digest_of_clips(clips: Sequence[LabelledClip], sizes: Sequence[tuple[int, int]]) -> str:
    """``digest_of`` the JSON list of what the corpus says about every clip, with file sizes and classes.

    The list is made piece by piece, and twice, since a digest begins with the length: for millions of clips it would not
    fit in memory.
    """

    def pieces() -> Iterator[bytes]:
        for index, (labelled, (size, _)) in enumerate(zip(clips, sizes, strict=True)):
            clip = labelled.clip
            # The order counts. Not the path itself: a corpus that was moved as a whole is the same corpus.
            description: dict[str, Any] = {
                "clip_id": clip.clip_id,
                "path": None,
                "source": clip.source,
                "labels": clip.labels,
                "split": clip.split,
                "fold": clip.fold,
                "group": clip.group,
            }
            for name in (
                "seconds",
                "known",
                "device",
                "row",
            ):  # left out where absent: as in stores packed before there were these
                if getattr(clip, name) is not None:
                    description[name] = getattr(clip, name)
            description |= {"bytes": size, "class_names": labelled.class_names}
            yield f"{', ' if index else '['}{json.dumps(description)}".encode()
        yield b"]" if clips else b"[]"

    return digest_of_pieces(pieces)


def work_folder(store_path: Path) -> Path:
    """``clips.h5`` -> ``clips.h5.partial``: the folder of unfinished work."""
    return store_path.with_name(f"{store_path.name}.partial")


def check_pack_outputs(config: Any, lists: Sequence[Path]) -> None:
    """Checks the store, its manifest and its lists against the inputs of ``kd pack``, and against stores beside it.

    Args:
        config: the command's options, with ``out`` and ``overwrite``.
        lists: the lists of clips beside the store.

    Raises:
        ValueError: one of them is an input or belongs to another store, or a manifest is there without a store.
    """
    out, work, manifest = config.out, work_folder(config.out), manifest_path(config.out)
    for suffix in STORE_SUFFIXES:
        other = out.with_suffix(suffix)
        if suffix != out.suffix.lower() and other.exists():
            raise ValueError(
                f"{manifest.name} beside {out} would replace that of {other}; choose another name for --out"
            )
    if work.is_symlink():
        raise ValueError(
            f"{work} is a symbolic link, through which nothing is written; remove it, or choose another --out"
        )
    # What a finished or unfinished run left beside its store may be replaced.
    left = out.exists() or (work / "plan.json").exists()
    outputs = [Output(out, is_hdf5, "a clip store"), Output(manifest, lambda path: left, f"the manifest of {out.name}")]
    outputs += [Output(path, lambda path: left, f"a list of clips of {out.name}") for path in lists]
    check_outputs(config, outputs, config.overwrite)


def open_work_folder(work: Path, plan: dict, restart: bool) -> None:
    """Creates the work folder, or checks that the one that is there belongs to the same plan."""
    plan_path = work / "plan.json"
    if work.exists() and (restart or not plan_path.exists()):
        # Without a plan nothing says what the shards are of: left by a run that was killed while it removed its folder.
        remove_path(work)
    if plan_path.exists():
        found = read_json(plan_path)
        changed = sorted(name for name in plan.keys() | found.keys() if plan.get(name) != found.get(name))
        if changed:
            raise ValueError(
                f"{work} contains the unfinished work of a run with another plan (changed: {', '.join(changed)}); "
                "discard it with --restart, or repeat the original command"
            )
    remove_asides(work)
    write_json(plan_path, plan)


def shard_bounds(sizes: Sequence[int], shard_clips: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of each shard: at most ``shard_clips`` clips, and, beyond one, at most ``SHARD_BYTES``."""
    start, total = 0, 0
    for index, size in enumerate(sizes):
        if index > start and (index - start == shard_clips or total + size > SHARD_BYTES):
            yield start, index
            start, total = index, 0
        total += size
    yield start, len(sizes)
