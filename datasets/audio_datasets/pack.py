"""``kd pack``: audio files into one clip store with a manifest beside it.

The work is cut into shards, each written aside and renamed inside ``<out>.partial/``. A run that was killed at any moment
continues with the first shard that is missing, and ends with the same bytes as one that was not.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import tyro

from audio_datasets.audio import codec as audio_codec
from audio_datasets.audio.bad_clips import ClipList, OnBadClip, one_line, summary
from audio_datasets.command_line.help_pages import HelpGroups
from audio_datasets.pack_plan import (
    STORE_SUFFIXES,
    LabelledClip,
    check_pack_outputs,
    open_work_folder,
    packed_label_space,
    plan_of,
    shard_bounds,
    sizes_and_times,
    with_class_names,
    work_folder,
)
from audio_datasets.pack_shards import ShardTask, discard_changed_shards, pack_shards
from audio_datasets.pack_sources import contents_now, from_json, joined, sources_path
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.clip_writer import concatenate
from audio_datasets.stores.manifest import ManifestRow, manifest_path, write_manifest
from audio_datasets.system.command import parse, progress, run_command
from audio_datasets.system.disk_space import require_space
from audio_datasets.system.files import flush_folder, read_json, remove_asides, remove_path, written_aside
from audio_datasets.system.locks import locked
from audio_datasets.system.messages import by_kind, listed
from audio_datasets.system.paths.contents import FileContents
from audio_datasets.system.stop_signals import Stopped, StopRequested
from audio_datasets.system.workers.sharing import workers_that_fit
from audio_datasets.tasks.catalog import get_task, read_listing
from audio_datasets.tasks.label_space import LabelSpace
from audio_datasets.tasks.listing import Listing, check_labels, describe, refuse_unusable

DEFAULT_SAMPLE_RATE_HZ = 32000
SAMPLED_FILES = 32  # whose headers give an estimate of the duration of all
SOURCE_DIGEST = "source_digest"
"""Attribute of a store: what the corpus says of its clips, and the sizes of the files."""
CONTENT_DIGEST = "content_digest"
"""Attribute of a store: what the files held."""


@dataclass(frozen=True)
class PackConfig:
    """Pack audio files into a clip store (HDF5) with a manifest (Parquet) beside it.

    SOURCE is a data set in its official layout (AudioSet, ESC-50, FSD50K, OpenMIC-2018, DCASE20), a folder with one sub-folder
    per class, PANNs' waveforms.h5, or a CSV or Parquet manifest with the columns clip_id, path, labels (separated by ";") and,
    optionally, split, fold, group, device. The same command continues a run that was killed.
    """

    help_groups: ClassVar[HelpGroups] = {
        "Source and result": ("source", "out", "layout", "task", "audio", "sample_rate_hz"),
        "Labels": ("class_names", "label_map"),
        "AudioSet": ("audio_root", "segments"),
        "Bad files": ("on_bad_clip", "allow_outside"),
        "Running": ("workers", "shard_clips", "restart", "overwrite"),
    }

    source: tyro.conf.Positional[Path]
    """SOURCE: a folder or a manifest file."""
    out: Path
    """Clip store to write, for example clips.h5."""
    audio: Literal["keep", "mp3", "flac", "pcm16"] = "keep"
    """keep: store each file's bytes unchanged. mp3, flac, pcm16: convert to mono at --sample-rate-hz, encoded or as 16-bit samples."""
    sample_rate_hz: int | None = None
    """Sample rate for mp3, flac and pcm16 (default: 32000). With --audio keep, files keep their own rate."""
    class_names: Path | None = None
    """Class list: AudioSet's CSV, JSON, or text with one name per line (default: the labels that occur)."""
    label_map: str | None = None
    """Map from the source's labels to class names: a CSV file with two columns, or the built-in esc50_to_audioset."""
    layout: str = "auto"
    """Layout of SOURCE: auto detects it; folders, or the name of a task, such as esc50 or audioset."""
    task: str | None = None
    """Pack the clips, classes and splits that `kd finetune` uses for this task: its name, or module:NAME for your own."""
    audio_root: Path | None = None
    """Folder with the audio files, at any depth, named by YouTube id (default: SOURCE)."""
    segments: tuple[str, ...] = ()
    """Segment lists to pack, such as balanced_train (for balanced_train_segments.csv; default: all lists in SOURCE)."""
    on_bad_clip: OnBadClip = "skip"
    """Files that are broken, empty or missing: skip leaves them out and lists them; refuse stops and names them."""
    allow_outside: bool = False
    """Allow a manifest to name files outside its own folder, by an absolute path or through ".."."""
    workers: int = 0
    """Number of processes; 0: one per core."""
    shard_clips: int = 128
    """Clips in a shard: the most work that a killed run loses. The result does not depend on it."""
    restart: bool = False
    """Delete unfinished work of an earlier run that had another source or other options."""
    overwrite: bool = False
    """Replace an existing clip store."""

    def __post_init__(self) -> None:
        if self.out.suffix.lower() not in STORE_SUFFIXES:
            raise ValueError(f"--out must end in {' or '.join(STORE_SUFFIXES)}; found {self.out}")
        if self.audio == "keep" and self.sample_rate_hz is not None:
            raise ValueError("--sample-rate-hz has no effect with --audio keep; choose mp3, flac or pcm16")
        if self.sample_rate_hz is not None and self.sample_rate_hz <= 0:
            raise ValueError(f"--sample-rate-hz must be positive; found {self.sample_rate_hz}")
        if self.task is not None and self.layout != "auto":
            raise ValueError(f"--task {self.task} has its own layout; leave out --layout {self.layout}")
        if self.workers < 0 or self.shard_clips < 1:
            raise ValueError(
                f"--workers must be 0 or more and --shard-clips 1 or more; found {self.workers}, {self.shard_clips}"
            )
        if self.audio in audio_codec.ENCODED_FORMATS:
            # An encoder that lacks this rate says so here, not once per clip.
            audio_codec.encode(np.zeros(1000, dtype=np.float32), self.stored_rate_hz, self.audio)

    @property
    def stored_rate_hz(self) -> int:
        """The store's sample rate; 0 for clips that keep their own."""
        return 0 if self.audio == "keep" else self.sample_rate_hz or DEFAULT_SAMPLE_RATE_HZ


@dataclass(frozen=True)
class PackResult:
    """Outcome of a run of ``pack``."""

    store: Path
    clips: int
    skipped: tuple[tuple[str, str], ...]
    """(file as its source names it, reason) of each clip that could not be read."""
    missing: int = 0
    """Number of listed clips without an audio file."""
    suspicious: tuple[tuple[str, str], ...] = ()
    """(file, what is odd) of each clip that was packed and is silent, clipped, very short or longer or shorter than its header says."""
    already_there: bool = False
    """Whether the store was already complete, so nothing was done."""


def pack(config: PackConfig, show_progress: bool = True) -> PackResult:
    """Packs ``config.source`` into ``config.out``, continuing where an earlier run was interrupted.

    With several workers, a script calls this under ``if __name__ == "__main__":``, since they start by importing it.

    Raises ValueError for a source that cannot be read or would be overwritten, labels outside the class list, files that
    ``on_bad_clip`` refuses, an existing store of other content, unfinished work with another plan, and a store that another run is packing. Raises
    Stopped where a stop signal interrupts it (``stop_signals.raised_stop_signals``).
    """
    beside = (missing_path, skipped_path, suspicious_path, sources_path)
    check_pack_outputs(config, [path_of(config.out) for path_of in beside])
    with locked(config.out.with_name(f"{config.out.name}.lock"), str(config.out)):
        try:
            return _pack(config, show_progress)
        except StopRequested as request:
            remove_asides(_work_folder(config))  # what workers were writing
            raise Stopped(
                f"{request}; finished shards are kept in {_work_folder(config)}, and the same command continues with the rest"
            ) from None


def _pack(config: PackConfig, show_progress: bool) -> PackResult:
    listing, label_space = _read(config)
    if config.on_bad_clip == "refuse" and listing.missing:
        raise ValueError(
            f"{len(listing.missing)} clips that {config.source} lists have no audio: "
            f"{listed(listing.missing)}; leave them out with --on-bad-clip skip"
        )
    if config.on_bad_clip == "refuse":
        refuse_unusable(listing, config.source)
    try:
        class_names, clips = with_class_names(listing, config.class_names, config.label_map)
    except ValueError as error:
        raise ValueError(f"{config.source}: {error}") from error
    if label_space is not None:
        label_space = packed_label_space(label_space, class_names, config.label_map is not None)
    if show_progress:
        for note in (describe(listing), *listing.notes):
            print(f"{config.source}: {note}", file=sys.stderr)
    sizes = sizes_and_times(clips)
    options = {"audio": config.audio, "sample_rate_hz": config.stored_rate_hz}
    if label_space is not None:
        options["label space"] = label_space.to_json()
    plan, source_digest = plan_of(options, class_names, clips, sizes, config.shard_clips)

    work = _work_folder(config)
    if config.out.exists() and not config.overwrite:
        # Last of all a finished run removes its work folder; one that was killed just before left it here.
        result = _already_packed(config.out, source_digest, clips, len(listing.missing), show_progress)
        if result is None:
            raise ValueError(
                f"{config.out} exists and has other content than this command would write; replace it with --overwrite"
            )
        _refuse_skipped(config, result.clips, result.skipped)
        shutil.rmtree(work, ignore_errors=True)
        return result
    open_work_folder(work, plan, restart=config.restart)
    _require_space(config, work, clips, [size for size, _ in sizes])
    tasks = [
        ShardTask(
            work / f"shard-{index:05d}.h5",
            tuple(clips[start:stop]),
            class_names,
            config.audio,
            config.stored_rate_hz,
            label_space,
        )
        for index, (start, stop) in enumerate(shard_bounds([size for size, _ in sizes], config.shard_clips))
    ]
    if again := discard_changed_shards(tasks):
        print(f"{again} finished shards are packed again, because their files have changed", file=sys.stderr)
    pack_shards(tasks, config.workers or workers_that_fit(min(len(tasks), os.cpu_count() or 1)), show_progress)
    return _merge(config, tasks, listing, source_digest, show_progress)


def _read(config: PackConfig) -> tuple[Listing, LabelSpace | None]:
    """The clips of the source and, with --task, its label space."""
    part = {
        "audio_root": config.audio_root,
        "segments": config.segments,
        "allow_outside": config.allow_outside,
        "class_list": config.class_names,
    }
    if config.task is None:
        return read_listing(config.source, config.layout, **part), None
    task = get_task(config.task)
    listing = task.read_for_training(config.source, **part)
    label_space = task.label_space(listing)
    check_labels(config.source, listing.clips, label_space)
    return listing, label_space


def _merge(
    config: PackConfig, tasks: Sequence[ShardTask], listing: Listing, source_digest: str, show_progress: bool
) -> PackResult:
    """The store made from its finished shards, with its manifest and lists; removes the work folder."""
    work = _work_folder(config)
    reports = [read_json(task.report_path) for task in tasks]
    rows = [ManifestRow(**row) for report in reports for row in report["rows"]]
    skipped = (*listing.unusable, *((name, reason) for report in reports for name, reason in report["skipped"]))
    suspicious = tuple((name, reason) for report in reports for name, reason in report.get("suspicious", ()))
    ClipList(skipped_path(config.out)).replace(dict(skipped))
    ClipList(suspicious_path(config.out)).replace(dict(suspicious))
    _write_lines(missing_path(config.out), listing.missing)
    _refuse_skipped(config, len(rows), skipped)
    sources = joined([from_json(report["sources"]) for report in reports])
    attributes = {SOURCE_DIGEST: source_digest, CONTENT_DIGEST: sources.digest}
    merged = work / "merged.h5"
    with progress(total=len(rows), desc="merging", unit="clip", shown=show_progress) as bar:
        concatenate([task.path for task in tasks], merged, attributes=attributes, report=bar.update)
    # The store appears last: whoever sees it finds its manifest beside it.
    write_manifest(manifest_path(config.out), rows)
    sources.save(sources_path(config.out))
    os.replace(merged, config.out)
    flush_folder(config.out.parent)
    remove_path(work)
    return PackResult(config.out, len(rows), skipped, len(listing.missing), suspicious)


def _work_folder(config: PackConfig) -> Path:
    return work_folder(config.out)


def _require_space(config: PackConfig, work: Path, clips: Sequence[LabelledClip], sizes: Sequence[int]) -> None:
    """ValueError if the disk lacks room for the remaining shards and the store made from them."""
    size = sum(sizes)
    if config.audio != "keep":
        # At 16 bits, or as an encoder makes of speech and music; rather too little than too much, since packing is refused.
        bytes_per_sample = {"pcm16": 2.0, "flac": 0.7, "mp3": 0.25}[config.audio]
        size = round(_mean_seconds(clips) * len(clips) * config.stored_rate_hz * bytes_per_sample)
    there = sum(file.stat().st_size for file in work.glob("shard-*.h5"))
    require_space(config.out.parent, max(0, 2 * size - there), f"packing {len(clips)} clips (shards, then the store)")


def _mean_seconds(clips: Sequence[LabelledClip]) -> float:
    """Mean duration of some of the clips; broken ones count as nothing."""
    seconds = []
    for clip in clips[:: max(1, len(clips) // SAMPLED_FILES)]:
        try:
            seconds.append(audio_codec.audio_info(clip.clip.audio).duration_seconds)
        except (ValueError, OSError):
            seconds.append(0.0)
    return sum(seconds) / len(seconds)


def _refuse_skipped(config: PackConfig, packed: int, skipped: Sequence[tuple[str, str]]) -> None:
    """ValueError if files were skipped and ``on_bad_clip`` forbids it, or nothing else is left."""
    if not skipped or (packed and config.on_bad_clip == "skip"):
        return
    advice = "skip them with --on-bad-clip skip" if packed else "nothing is left to pack"
    raise ValueError(
        f"{summary(dict(skipped), packed + len(skipped), 'cannot be used')}; {advice}. "
        f"All are listed in {skipped_path(config.out)}"
    )


def skipped_path(store_path: Path) -> Path:
    """``clips.h5`` -> ``clips.skipped.txt``: the files that were left out, one per line with the reason."""
    return store_path.with_suffix(".skipped.txt")


def missing_path(store_path: Path) -> Path:
    """``clips.h5`` -> ``clips.missing.txt``: ids of the clips that are listed and have no audio, one per line."""
    return store_path.with_suffix(".missing.txt")


def suspicious_path(store_path: Path) -> Path:
    """``clips.h5`` -> ``clips.suspicious.txt``: packed files that are silent, clipped or very short, with the reason."""
    return store_path.with_suffix(".suspicious.txt")


def _already_packed(
    store_path: Path, source_digest: str, clips: Sequence[LabelledClip], missing: int, show_progress: bool
) -> PackResult | None:
    """The result of the earlier run, if the store was packed from the same files with the same options."""
    try:
        store = ClipStore.open(store_path)
    except ValueError:
        return None
    content_digest = store.attributes.get(
        CONTENT_DIGEST
    )  # None in stores of older versions, which compared names and sizes
    if store.attributes.get(SOURCE_DIGEST) != source_digest:
        return None
    if content_digest is not None:
        before = FileContents.load(sources_path(store_path))
        # The list of states only says which files need not be read: that they are those of the store, the store says.
        before = before if before is not None and before.digest == content_digest else None
        contents = contents_now(clips, before, show_progress)
        if contents.digest != content_digest:
            return None
        contents.save(sources_path(store_path))
    skipped, suspicious = (
        tuple(ClipList(path).read().items()) for path in (skipped_path(store_path), suspicious_path(store_path))
    )
    return PackResult(store_path, len(store), skipped, missing, suspicious, already_there=True)


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    """Writes the lines. With no lines, removes the file."""
    if not lines:
        path.unlink(missing_ok=True)
        return
    with written_aside(path) as aside:
        aside.write_text("".join(f"{one_line(line)}\n" for line in lines), encoding="utf-8")


# -- Command -----------------------------------------------------------------------------------------------------------


def _run(arguments: Sequence[str] | None) -> None:
    result = pack(parse(PackConfig, arguments, "kd pack"))
    for name, reason in result.skipped:
        print(f"skipped {one_line(name)}: {reason}")
    if result.suspicious:
        packed = summary(dict(result.suspicious), result.clips, "are suspicious")
        print(f"{packed}; all are listed in {suspicious_path(result.store)}")
    state = "already packed from these files" if result.already_there else "packed"
    kinds = f": {by_kind(name for name, _ in result.skipped)}" if result.skipped else ""
    print(f"{state}: {result.clips} clips in {result.store} ({len(result.skipped)} skipped{kinds})")
    if result.missing:
        share = result.missing / (result.missing + result.clips + len(result.skipped))
        print(f"no audio for {result.missing} listed clips ({100 * share:.1f} %): {missing_path(result.store)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``kd pack``; returns its exit code."""
    return run_command(lambda: _run(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
