"""The sounds of a report's players: previews of clips, from the files that a run names, a clip store, or a folder.

A run folder may come from a stranger. Its predictions name files anywhere on this disk, and a report is made to be passed on. So a
file is only taken by default if it lies in the run's own data, and if it holds what the run recorded of it: who does not know
a file cannot name the digest of its content.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from audio_datasets.audio.codec import decode, encode
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.names import normal
from audio_datasets.system.disk_space import readable_bytes
from audio_datasets.system.paths.contents import DIGEST_BYTES
from audio_datasets.system.paths.inputs import NotAFileError, open_regular
from audio_datasets.tasks.audio_files import FolderWalk, is_audio
from kd.reports.run_reader import RunFolder

PREVIEW_SECONDS = 5.0
PREVIEW_RATE_HZ = 16_000
LARGEST_SOURCE_BYTES = 100_000_000
"""Files of a run are read whole, to compare them with what the run recorded."""

PLAYER_NOTE = f"Players have the first {PREVIEW_SECONDS:g} s of a clip at {PREVIEW_RATE_HZ // 1000} kHz."

Audio = Callable[[str], bytes | None]
"""The content of a clip's audio file by clip id; None if it is not there. LeftOutError for one that may not be shown."""


class LeftOutError(ValueError):
    """A clip that gets no player; the message says why, so that it fits many clips."""


@dataclass
class Previews:
    """The beginnings of clips as small MP3 files, and why other clips have none."""

    sounds: dict[str, bytes] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    """How many clips have no player, by reason."""

    def leave_out(self, reason: str) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + 1

    @property
    def note(self) -> str:
        """How many clips have no player, and why; "" if all have one."""
        total = sum(self.left_out.values())
        if not total:
            return ""
        reasons = "; ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        return f"{total} of {total + len(self.sounds)} clips have no player: {reasons}"


def previews(clip_ids: Iterable[str], audio: Audio, room_bytes: int) -> Previews:
    """The beginning of each clip, as many as there is room for in a page."""
    found, full = Previews(), False
    for clip_id in clip_ids:
        if full:
            found.leave_out("do not fit into the page")
            continue
        try:
            data = audio(clip_id)
            if data is None:
                found.leave_out("are not there")
                continue
            sound = encode(decode(data, PREVIEW_RATE_HZ, seconds=PREVIEW_SECONDS), PREVIEW_RATE_HZ, "mp3")
        except LeftOutError as error:
            found.leave_out(str(error))
            continue
        except (ValueError, OSError):
            found.leave_out("cannot be read")
            continue
        # A clip may be in two lists; base64 makes four characters of three bytes.
        room_bytes -= 2 * (len(sound) * 4 // 3 + 200)
        if room_bytes < 0:
            full = True
            found.leave_out("do not fit into the page")
            continue
        found.sounds[clip_id] = sound
    return found


def read_limited(path: Path) -> bytes:
    """A regular file of up to ``LARGEST_SOURCE_BYTES``. LeftOutError for any other, OSError for none."""
    try:
        with open_regular(path) as file:
            return _content(file)
    except NotAFileError as error:
        raise LeftOutError("are no regular files") from error


def _content(file: BinaryIO) -> bytes:
    if os.fstat(file.fileno()).st_size > LARGEST_SOURCE_BYTES:
        raise LeftOutError(f"are larger than {readable_bytes(LARGEST_SOURCE_BYTES)}")
    return file.read(LARGEST_SOURCE_BYTES)


def audio_of_run(run: RunFolder, allow_outside: bool = False) -> Audio:
    """Clips by the files that the run's predictions name.

    Args:
        allow_outside: also files outside of the run's data, and of runs that did not record what their files held.
    """
    files: dict[str, tuple[str, str]] = {}
    for _, predictions in run.predictions:
        if predictions.sources is not None:
            contents = predictions.contents if predictions.contents is not None else [""] * len(predictions.sources)
            named = zip(predictions.sources.tolist(), map(str, contents), strict=True)
            files.update(zip(predictions.clip_ids.tolist(), named, strict=True))
    roots = [os.path.abspath(root) for root in (run.path, *_data_of(run))]

    def read(clip_id: str) -> bytes | None:
        name, recorded = files.get(clip_id, ("", ""))
        if not name or "\0" in name:
            return None
        path = Path(os.path.abspath(name))
        if not allow_outside and not any(path.is_relative_to(root) for root in roots):
            raise LeftOutError("lie outside of the run's data (--allow-outside takes them)")
        if not recorded and not allow_outside:
            raise LeftOutError(
                "are of a run that did not record what its files held (--allow-outside or --audio take them)"
            )
        if not os.path.lexists(path):
            return None
        data = read_limited(path)
        if recorded and hashlib.blake2b(data, digest_size=DIGEST_BYTES).hexdigest() != recorded:
            raise LeftOutError("are not what the run heard")
        return data

    return read


def _data_of(run: RunFolder) -> list[Path]:
    """The folder that the run's --data named."""
    data = run.config.get("data")
    if not isinstance(data, str) or not data or "\0" in data:
        return []
    return [Path(data).parent if Path(data).is_file() else Path(data)]


def audio_from(path: Path) -> Audio:
    """Clips of a clip store, or audio files under a folder, by clip id.

    A file's id is its name or its path below the folder, with or without its suffix.

    Raises:
        ValueError: neither a clip store nor a folder.
    """
    if path.is_dir():
        files = files_by_id(path)
        return lambda clip_id: read_limited(files[clip_id]) if clip_id in files else None
    store = ClipStore.open(path)
    row_of = {clip_id: row for row, clip_id in enumerate(store.clip_ids)}
    rate = PREVIEW_RATE_HZ

    def read(clip_id: str) -> bytes | None:
        if clip_id not in row_of:
            return None
        return encode(store.waveform(row_of[clip_id], rate, 0.0, PREVIEW_SECONDS), rate, "wav")

    return read


def files_by_id(folder: Path) -> dict[str, Path]:
    """Every audio file below a folder, under each id that it may go by; ids that several files share are left out."""
    files: dict[str, Path | None] = {}
    for found in filter(is_audio, FolderWalk(folder).files()):
        relative = Path(found)
        path = folder / relative
        for clip_id in {path.name, path.stem, found, relative.with_suffix("").as_posix()}:
            clip_id = normal(clip_id)  # as the clips' ids are
            files[clip_id] = None if clip_id in files else path
    return {clip_id: path for clip_id, path in files.items() if path is not None}
