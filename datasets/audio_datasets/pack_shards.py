"""The shards of `kd pack`: small clip stores that worker processes write under a temporary name and then rename."""

import errno
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import active_children, connection, get_context, parent_process
from pathlib import Path

import torch

from audio_datasets.audio import codec as audio_codec
from audio_datasets.audio.bad_clips import one_line, refuse_system_fault, suspicion
from audio_datasets.audio.spool import Spool
from audio_datasets.pack_audio import stored_audio
from audio_datasets.pack_plan import LabelledClip
from audio_datasets.pack_sources import as_json, contents_now, from_json, reader_of
from audio_datasets.stores.clip_writer import ClipRecord, write_clip_store
from audio_datasets.stores.manifest import ManifestRow
from audio_datasets.system.command import progress
from audio_datasets.system.files import read_json, write_json
from audio_datasets.system.paths.contents import FileContents
from audio_datasets.system.stop_signals import StopRequested, delayed_stop_signals, outlive_stop_signals
from audio_datasets.system.workers.sharing import require_files, require_semaphores
from audio_datasets.tasks.label_space import LabelSpace

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors of writing what waits for a shard, which say nothing about the clip."""


@dataclass(frozen=True)
class ShardTask:
    """One shard to pack: everything that a worker process needs."""

    path: Path
    clips: tuple[LabelledClip, ...]
    class_names: tuple[str, ...]
    audio: str
    sample_rate_hz: int
    label_space: LabelSpace | None = None

    @property
    def report_path(self) -> Path:
        """Manifest rows and skipped files of this shard, as JSON. Written before the shard itself."""
        return self.path.with_suffix(".json")


def discard_changed_shards(tasks: Sequence[ShardTask]) -> int:
    """Removes the finished shards whose files hold something else by now. Returns how many.

    A file is only read for this if its state is another one.
    """
    discarded = 0
    for task in tasks:
        if not task.path.exists():
            continue
        packed = from_json(read_json(task.report_path).get("sources", []))  # none in those of older versions
        if contents_now(task.clips, packed).digest != packed.digest:
            task.path.unlink()
            discarded += 1
    return discarded


def pack_shards(tasks: Sequence[ShardTask], workers: int, show_progress: bool) -> None:
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
        require_semaphores(workers, "--workers 1")
        require_files(workers, "--workers 1")
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
                "a worker process was killed (out of memory?); finished shards are kept, so run the command again with fewer "
                "--workers to continue"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle, and so are stop signals
    outlive_stop_signals()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this worker when its parent has ended, because a killed parent cannot stop it and the pool would wait forever."""
    connection.wait([parent_process().sentinel])
    os._exit(1)


def _pack_shard(task: ShardTask) -> int:
    """Writes one shard and its report; returns the number of its clips, skipped ones included."""
    records, rows, skipped, suspicious = [], [], [], []
    folder = task.path.parent
    sources = FileContents.empty(len(task.clips))
    with Spool(folder) as spool:
        for index, clip in enumerate(task.clips):
            sources.take(index, clip.path, None, reader_of(clip.clip))
            about = (task.audio, task.sample_rate_hz, clip.clip.seconds, spool, folder)
            try:
                audio, check = stored_audio(clip.clip.audio, *about)
            except (ValueError, OSError) as error:
                if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
                    raise OSError(error.errno, error.strerror, str(task.path)) from error
                refuse_system_fault(error, clip.path)
                reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                skipped.append([clip.clip.source, one_line(reason)])
                continue
            sources.check(index, clip.path, clip.clip.source)  # what was packed is what was taken down
            if odd := suspicion(check):
                suspicious.append([clip.clip.source, odd])
            records.append(ClipRecord(clip.clip.clip_id, audio, clip.class_names, clip.clip.known))
            rows.append(_manifest_row(clip, check.info))
        report = {"rows": [asdict(row) for row in rows], "skipped": skipped, "suspicious": suspicious}
        write_json(task.report_path, {**report, "sources": as_json(sources)})
        write_clip_store(
            task.path,
            records,
            task.class_names,
            audio_kind="pcm16" if task.audio == "pcm16" else "encoded",
            sample_rate_hz=task.sample_rate_hz,
            label_space=task.label_space,
        )
    return len(task.clips)


def _manifest_row(clip: LabelledClip, info: audio_codec.AudioInfo) -> ManifestRow:
    return ManifestRow(
        clip_id=clip.clip.clip_id,
        source=clip.clip.source,
        labels=clip.class_names,
        source_labels=clip.clip.labels,
        split=clip.clip.split,
        fold=clip.clip.fold,
        group=clip.clip.group,
        device=clip.clip.device,
        duration_seconds=info.duration_seconds,
        sample_rate_hz=info.sample_rate_hz,
        channels=info.channels,
    )
