"""``kd pack``: audio files into one clip store with a manifest beside it.

The work is cut into shards, each written aside and renamed inside ``<out>.partial/``. A run that was killed at any moment
continues with the first shard that is missing, and ends with the same bytes as one that was not.
"""

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from multiprocessing import active_children, connection, get_context, parent_process
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
import torch
import tyro

from audio_datasets.audio import codec as audio_codec
from audio_datasets.audio.bad_clips import ClipList, OnBadClip, one_line, summary, suspicion
from audio_datasets.corpora.sources import Source, SourceClip, describe, read_source
from audio_datasets.stores.class_lists import check_class_names, read_class_names, read_label_map
from audio_datasets.stores.clip_store import ClipRecord, ClipStore, concatenate, write_clip_store
from audio_datasets.stores.manifest import ManifestRow, manifest_path, write_manifest
from audio_datasets.system.command import parse, progress, run_command
from audio_datasets.system.disk_space import readable_bytes, require_space
from audio_datasets.system.files import (
    digest_of,
    digest_of_pieces,
    flush_folder,
    read_json,
    remove_asides,
    write_json,
    written_aside,
)
from audio_datasets.system.locks import locked
from audio_datasets.system.messages import listed
from audio_datasets.system.stop_signals import Stopped, StopRequested, delayed_stop_signals, outlive_stop_signals

STORE_SUFFIXES = (".h5", ".hdf5")
DEFAULT_SAMPLE_RATE_HZ = 32000
SHARD_BYTES = 256 * 2**20
LARGEST_FILE_BYTES = 2**30  # files are read whole: hours of compressed audio, or 93 minutes of 16-bit stereo at 48 kHz
SAMPLED_FILES = 32  # whose headers give an estimate of the duration of all
SOURCE_DIGEST = "source_digest"
# Encoders pad a clip to whole frames, and tools cut at key frames: this much is no sign of another clip.
LONGER_SECONDS = 2.0


@dataclass(frozen=True)
class PackConfig:
    """Packs audio files into a clip store (HDF5) with a manifest (Parquet) beside it.

    SOURCE is a folder in ESC-50's layout, a folder with one sub-folder per class, a folder with AudioSet's lists of
    segments, or a CSV or Parquet manifest with the columns clip_id, path, labels (separated by ";") and perhaps split,
    fold, group. A run that was killed goes on when the same command is given again.
    """

    source: tyro.conf.Positional[Path]
    """Folder or manifest file."""
    out: Path
    """The clip store to write, for example clips.h5."""
    audio: Literal["keep", "mp3", "flac", "pcm16"] = "keep"
    """keep: each file's bytes as they are. mp3, flac, pcm16: mono at --sample-rate-hz, encoded or as int16 samples."""
    sample_rate_hz: int | None = None
    """Rate for mp3, flac and pcm16; 32000 unless given. Files that are kept keep their own."""
    class_names: Path | None = None
    """The class list: AudioSet's CSV, JSON, or text with one name per line. Without it: the labels that occur."""
    label_map: str | None = None
    """From the source's labels to class names: a CSV of two columns, or a built-in map (esc50_to_audioset)."""
    layout: Literal["auto", "audioset", "esc50", "folders", "manifest"] = "auto"
    """The source's layout, if it should not be found out."""
    audio_root: Path | None = None
    """AudioSet: folder with the audio files, at any depth, named by YouTube id; SOURCE unless given."""
    segments: tuple[str, ...] = ()
    """AudioSet: lists to take, as balanced_train (of balanced_train_segments.csv); all in SOURCE unless given."""
    on_bad_clip: OnBadClip = "skip"
    """skip: leave out files that are broken, empty or missing, and list them; refuse: stop, naming them."""
    allow_outside: bool = False
    """Manifests: also take paths that are absolute or lead out of the manifest's folder."""
    workers: int = 0
    """Processes; 0: one per core."""
    shard_clips: int = 128
    """Clips per shard, the unit of work that a killed run can lose. The result does not depend on it."""
    restart: bool = False
    """Discard the unfinished work of an earlier run with another source or other options."""
    overwrite: bool = False
    """Replace a clip store that is already there."""

    def __post_init__(self) -> None:
        if self.out.suffix.lower() not in STORE_SUFFIXES:
            raise ValueError(f"--out must end in one of {STORE_SUFFIXES}; found {self.out}")
        if self.audio == "keep" and self.sample_rate_hz is not None:
            raise ValueError("--sample-rate-hz has no effect with --audio keep; choose mp3, flac or pcm16")
        if self.sample_rate_hz is not None and self.sample_rate_hz <= 0:
            raise ValueError(f"--sample-rate-hz must be positive; found {self.sample_rate_hz}")
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
    """What a run of ``pack`` ended with."""

    store: Path
    clips: int
    skipped: tuple[tuple[str, str], ...]
    """(file as its source names it, reason) of each clip that could not be read."""
    missing: int = 0
    """Clips that the source lists and that have no audio file."""
    suspicious: tuple[tuple[str, str], ...] = ()
    """(file, what is odd) of each clip that was packed and is silent, clipped or very short."""
    already_there: bool = False
    """Whether the store was complete before, so that nothing was done."""


def pack(config: PackConfig, show_progress: bool = True) -> PackResult:
    """Packs ``config.source`` into ``config.out``, going on from where an earlier run was interrupted.

    With several workers, a script calls this under ``if __name__ == "__main__":``, since they start by importing it.

    Raises ValueError for a source that cannot be read, labels outside the class list, files that ``on_bad_clip`` refuses, an
    existing store of other content, unfinished work with another plan, and a store that another run is packing. Raises
    Stopped where a stop signal interrupts it (``stop_signals.raised_stop_signals``).
    """
    with locked(config.out.with_name(f"{config.out.name}.lock"), str(config.out)):
        try:
            return _pack(config, show_progress)
        except StopRequested as request:
            remove_asides(_work_folder(config))  # what workers were writing
            raise Stopped(
                f"{request}; finished shards are kept in {_work_folder(config)}, and the same command goes on with the others"
            ) from None


def _pack(config: PackConfig, show_progress: bool) -> PackResult:
    source = read_source(
        config.source,
        config.layout,
        audio_root=config.audio_root,
        segments=config.segments,
        allow_outside=config.allow_outside,
    )
    if config.on_bad_clip == "refuse" and source.missing:
        raise ValueError(
            f"there is no audio for {len(source.missing)} of the clips that {config.source} lists: "
            f"{listed(source.missing)}; do without them by --on-bad-clip skip"
        )
    class_names, clips = _with_class_names(source, config)
    if show_progress:
        print(f"{config.source}: {describe(source)}", file=sys.stderr)
    sizes = [_size_and_time(clip.path) for clip in clips]
    plan, source_digest = _plan(config, class_names, clips, sizes)

    work = _work_folder(config)
    if config.out.exists() and not config.overwrite:
        # Last of all a finished run removes its work folder; one that was killed just before left it here.
        result = _already_packed(config.out, source_digest, len(source.missing))
        if result is None:
            raise ValueError(
                f"{config.out} exists, with other content than this command makes; replace it with --overwrite"
            )
        _refuse_skipped(config, result.clips, result.skipped)
        shutil.rmtree(work, ignore_errors=True)
        return result
    _open_work_folder(work, plan, restart=config.restart)
    _require_space(config, work, clips, [size for size, _ in sizes])

    tasks = [
        ShardTask(
            work / f"shard-{index:05d}.h5", tuple(clips[start:stop]), class_names, config.audio, config.stored_rate_hz
        )
        for index, (start, stop) in enumerate(_shard_bounds([size for size, _ in sizes], config.shard_clips))
    ]
    _pack_shards(tasks, config.workers or os.cpu_count() or 1, show_progress)

    reports = [read_json(task.report_path) for task in tasks]
    rows = [ManifestRow(**row) for report in reports for row in report["rows"]]
    skipped = tuple((name, reason) for report in reports for name, reason in report["skipped"])
    suspicious = tuple((name, reason) for report in reports for name, reason in report.get("suspicious", ()))
    ClipList(skipped_path(config.out)).replace(dict(skipped))
    ClipList(suspicious_path(config.out)).replace(dict(suspicious))
    _write_lines(missing_path(config.out), source.missing)
    _refuse_skipped(config, len(rows), skipped)
    merged = work / "merged.h5"
    with progress(total=len(rows), desc="merging", unit="clip", shown=show_progress) as bar:
        concatenate([task.path for task in tasks], merged, attributes={SOURCE_DIGEST: source_digest}, report=bar.update)
    # The store appears last: whoever sees it finds its manifest beside it.
    write_manifest(manifest_path(config.out), rows)
    os.replace(merged, config.out)
    flush_folder(config.out.parent)
    shutil.rmtree(work)
    return PackResult(config.out, len(rows), skipped, len(source.missing), suspicious)


def _work_folder(config: PackConfig) -> Path:
    return config.out.with_name(f"{config.out.name}.partial")


def _require_space(config: PackConfig, work: Path, clips: Sequence["LabelledClip"], sizes: Sequence[int]) -> None:
    """ValueError if the disk has no room for the shards, those that are there apart, and for the store made from them."""
    size = sum(sizes)
    if config.audio != "keep":
        # At 16 bits, or as an encoder makes of speech and music; rather too little than too much, since packing is refused.
        bytes_per_sample = {"pcm16": 2.0, "flac": 0.7, "mp3": 0.25}[config.audio]
        size = round(_mean_seconds(clips) * len(clips) * config.stored_rate_hz * bytes_per_sample)
    there = sum(file.stat().st_size for file in work.glob("shard-*.h5"))
    require_space(config.out.parent, max(0, 2 * size - there), f"packing {len(clips)} clips (shards, then the store)")


def _mean_seconds(clips: Sequence["LabelledClip"]) -> float:
    """Mean duration of some of the clips, by their headers; broken ones count as nothing."""
    seconds = []
    for clip in clips[:: max(1, len(clips) // SAMPLED_FILES)]:
        try:
            seconds.append(audio_codec.audio_info(clip.path).duration_seconds)
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


# -- The plan ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelledClip:
    """A source clip with its class names."""

    source: SourceClip
    class_names: tuple[str, ...]

    @property
    def path(self) -> Path:
        return self.source.path


def _with_class_names(source: Source, config: PackConfig) -> tuple[tuple[str, ...], list[LabelledClip]]:
    """The class list, and each clip with its classes; ValueError that names the labels that have none."""
    names_of = {label: (label,) for label in source.label_names}
    if config.label_map is not None:
        label_map = read_label_map(config.label_map)
        unmapped = [label for label in source.label_names if label not in label_map]
        if unmapped:
            raise ValueError(
                f"label map {config.label_map} has no entry for {len(unmapped)} labels: {listed(unmapped)}"
            )
        names_of = {label: label_map[label] for label in source.label_names}
    used = list(dict.fromkeys(name for names in names_of.values() for name in names))
    if config.class_names is None:
        if not used:
            raise ValueError(f"the clips of {config.source} have no labels; give the class list with --class-names")
        class_names = check_class_names(used)
    else:
        class_names = read_class_names(config.class_names)
        unknown = sorted(set(used) - set(class_names))
        if unknown:
            raise ValueError(f"{len(unknown)} labels are not in {config.class_names}: {listed(unknown)}")
    clips = [
        LabelledClip(clip, tuple(dict.fromkeys(name for label in clip.labels for name in names_of[label])))
        for clip in source.clips
    ]
    return class_names, clips


def _size_and_time(path: Path) -> tuple[int, int]:
    """Bytes and time of change (ns) of a file; zeros if it is not there, which packing reports."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _plan(
    config: PackConfig, class_names: tuple[str, ...], clips: Sequence[LabelledClip], sizes: Sequence[tuple[int, int]]
) -> tuple[dict, str]:
    """What a resumed run must share with the first, and a digest of the source that goes into the store.

    The digest leaves out times, so that the same files give the same store.
    """
    options = {
        "audio": config.audio,
        "sample_rate_hz": config.stored_rate_hz,
        "class list": digest_of(*class_names),
        "labels, files and their sizes": _digest_of_clips(clips, sizes),
    }
    source_digest = digest_of(json.dumps(options, sort_keys=True))
    plan = options | {
        "version": 1,
        "times of the files": digest_of(json.dumps([time for _, time in sizes])),
        "shard_clips": config.shard_clips,
        "libsndfile": soundfile.__libsndfile_version__,
    }
    return plan, source_digest


def _digest_of_clips(clips: Sequence[LabelledClip], sizes: Sequence[tuple[int, int]]) -> str:
    """``digest_of`` the JSON list of what the source says about every clip, with file sizes and classes.

    The list is made piece by piece, and twice, since a digest begins with the length: for millions of clips it would not
    fit in memory.
    """

    def pieces() -> Iterator[bytes]:
        for index, (clip, (size, _)) in enumerate(zip(clips, sizes, strict=True)):
            description = {field.name: getattr(clip.source, field.name) for field in fields(clip.source)}
            # Not the path itself: a source that was moved as a whole is the same source.
            description |= {"path": None, "bytes": size, "class_names": clip.class_names}
            if clip.source.seconds is None:
                del description["seconds"]  # stores that were packed before there were listed lengths keep their digest
            yield f"{', ' if index else '['}{json.dumps(description)}".encode()
        yield b"]" if clips else b"[]"

    return digest_of_pieces(pieces)


def _already_packed(store_path: Path, source_digest: str, missing: int) -> PackResult | None:
    """The result of the earlier run, if the store was packed from the same files with the same options."""
    try:
        store = ClipStore.open(store_path)
    except ValueError:
        return None
    if store.attributes.get(SOURCE_DIGEST) != source_digest:
        return None
    skipped, suspicious = (
        tuple(ClipList(path).read().items()) for path in (skipped_path(store_path), suspicious_path(store_path))
    )
    return PackResult(store_path, len(store), skipped, missing, suspicious, already_there=True)


def _open_work_folder(work: Path, plan: dict, restart: bool) -> None:
    """Creates the work folder, or checks that the one that is there belongs to the same plan."""
    plan_path = work / "plan.json"
    if work.exists() and (restart or not plan_path.exists()):
        # Without a plan nothing says what the shards are of: left by a run that was killed while it removed its folder.
        shutil.rmtree(work)
    if plan_path.exists():
        found = read_json(plan_path)
        changed = sorted(name for name in plan.keys() | found.keys() if plan.get(name) != found.get(name))
        if changed:
            raise ValueError(
                f"{work} holds the unfinished work of a run with another plan (changed: {', '.join(changed)}); "
                "discard it with --restart, or give the command as it was"
            )
    remove_asides(work)
    write_json(plan_path, plan)


def _shard_bounds(sizes: Sequence[int], shard_clips: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of each shard: at most ``shard_clips`` clips, and, beyond one, at most ``SHARD_BYTES``."""
    start, total = 0, 0
    for index, size in enumerate(sizes):
        if index > start and (index - start == shard_clips or total + size > SHARD_BYTES):
            yield start, index
            start, total = index, 0
        total += size
    yield start, len(sizes)


# -- Shards ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardTask:
    """One shard to pack: everything that a worker process needs."""

    path: Path
    clips: tuple[LabelledClip, ...]
    class_names: tuple[str, ...]
    audio: str
    sample_rate_hz: int

    @property
    def report_path(self) -> Path:
        """Manifest rows and skipped files of this shard, as JSON. Written before the shard itself."""
        return self.path.with_suffix(".json")


def _pack_shards(tasks: Sequence[ShardTask], workers: int, show_progress: bool) -> None:
    """Packs the shards that are not there yet."""
    missing = [task for task in tasks if not task.path.exists()]
    total = sum(len(task.clips) for task in tasks)
    done = total - sum(len(task.clips) for task in missing)
    workers = min(workers, len(missing))
    with progress(total=total, initial=done, desc="packing", unit="clip", shown=show_progress) as bar:
        if workers <= 1:
            for task in missing:
                bar.update(_pack_shard(task))
            return
        # "spawn": torch's threads do not survive a fork.
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker)
        try:
            with delayed_stop_signals():  # which launchers and schedulers send to a whole process group
                futures = [pool.submit(_pack_shard, task) for task in missing]
            for future in as_completed(futures):
                bar.update(future.result())
        except (StopRequested, KeyboardInterrupt):
            for worker in active_children():  # their shards are whole or not there
                worker.kill()
            raise
        except BrokenProcessPool as error:
            raise OSError(
                "a worker process was killed (out of memory?); run again to go on, with fewer --workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle, and so are stop signals
    outlive_stop_signals()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this worker when the parent is gone: one that was killed cannot say so, and the pool would wait for ever."""
    connection.wait([parent_process().sentinel])
    os._exit(1)


def _pack_shard(task: ShardTask) -> int:
    """Writes one shard and its report; returns the number of its clips, skipped ones included."""
    records, rows, skipped, suspicious = [], [], [], []
    for clip in task.clips:
        try:
            audio, check = _stored_audio(clip.path, task.audio, task.sample_rate_hz, clip.source.seconds)
        except (ValueError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            skipped.append([clip.source.source, one_line(reason)])
            continue
        if odd := suspicion(check):
            suspicious.append([clip.source.source, odd])
        records.append(ClipRecord(clip.source.clip_id, audio, clip.class_names))
        rows.append(_manifest_row(clip, check.info))
    write_json(task.report_path, {"rows": [asdict(row) for row in rows], "skipped": skipped, "suspicious": suspicious})
    kind = "pcm16" if task.audio == "pcm16" else "encoded"
    write_clip_store(task.path, records, task.class_names, audio_kind=kind, sample_rate_hz=task.sample_rate_hz)
    return len(task.clips)


def _stored_audio(
    path: Path, kind: str, sample_rate_hz: int, listed_seconds: float | None
) -> tuple[bytes | np.ndarray, audio_codec.AudioCheck]:
    """One clip's audio as it will be stored, and what the file was. The whole file is decoded, also if it is kept.

    Raises ValueError or OSError for a file that is broken, empty, too large, not there, or much longer than its source says.
    """
    size = path.stat().st_size
    if size > LARGEST_FILE_BYTES:
        raise ValueError(f"{readable_bytes(size)}: a clip may have {readable_bytes(LARGEST_FILE_BYTES)}; cut it first")
    data = path.read_bytes()
    info = audio_codec.audio_info(data)
    if listed_seconds is not None and info.duration_seconds > listed_seconds + LONGER_SECONDS:
        raise ValueError(
            f"{info.duration_seconds:.1f} s long, listed as {listed_seconds:.1f} s: it was not cut to its segment"
        )
    if kind == "keep":
        return data, audio_codec.check_audio(data)
    waveform = audio_codec.decode(data)
    check = audio_codec.check_blocks(info, [waveform])
    waveform = audio_codec.resample(waveform, info.sample_rate_hz, sample_rate_hz)
    if kind == "pcm16":
        return audio_codec.to_pcm16(waveform), check
    return audio_codec.encode(waveform, sample_rate_hz, kind), check


def _manifest_row(clip: LabelledClip, info: audio_codec.AudioInfo) -> ManifestRow:
    return ManifestRow(
        clip_id=clip.source.clip_id,
        source=clip.source.source,
        labels=clip.class_names,
        source_labels=clip.source.labels,
        split=clip.source.split,
        fold=clip.source.fold,
        group=clip.source.group,
        duration_seconds=info.duration_seconds,
        sample_rate_hz=info.sample_rate_hz,
        channels=info.channels,
    )


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    """Writes the lines; without any, there is no file."""
    if not lines:
        path.unlink(missing_ok=True)
        return
    with written_aside(path) as aside:
        aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


# -- Command -----------------------------------------------------------------------------------------------------------


def _run(arguments: Sequence[str] | None) -> None:
    result = pack(parse(PackConfig, arguments, "kd pack"))
    for name, reason in result.skipped:
        print(f"skipped {name}: {reason}")
    if result.suspicious:
        packed = summary(dict(result.suspicious), result.clips, "are suspicious")
        print(f"{packed}; all are listed in {suspicious_path(result.store)}")
    state = "already packed from files of these names and sizes" if result.already_there else "packed"
    print(f"{state}: {result.clips} clips in {result.store} ({len(result.skipped)} skipped)")
    if result.missing:
        share = result.missing / (result.missing + result.clips + len(result.skipped))
        print(f"no audio for {result.missing} listed clips ({100 * share:.1f} %): {missing_path(result.store)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``kd pack``; returns its exit code."""
    return run_command(lambda: _run(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
