"""Training clips followed by additional audio without labels.

Shapes: n clips of all sources together, C classes, k requested rows.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from audio_datasets.stores.joined import AnyClips
from audio_datasets.system.files import digest_of
from audio_datasets.system.messages import listed
from audio_datasets.tasks.label_space import LabelSpace
from audio_datasets.tasks.task import TaskClips
from audio_datasets.tasks.unlabelled import AnySounds, open_unlabelled

IDS_AT_ONCE = 8_192


class WithUnlabelled:
    """The clips of a run, followed by those of additional sources, whose labels count as unknown.

    Rows 0 to ``len(clips)`` - 1 are those of ``clips``. The sources may have any length, sample rate and classes.
    Create it with ``with_unlabelled``, which checks that no clip occurs twice.
    """

    is_masked = True

    def __init__(self, clips: AnyClips | TaskClips, sources: Sequence[AnySounds]) -> None:
        self.clips = clips
        self.sources = tuple(sources)
        self.parts = (clips, *self.sources)
        self._first_rows = np.cumsum([0, *map(len, self.parts)])  # (parts + 1,)

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    @property
    def path(self) -> str:
        """All paths, for messages."""
        return " + ".join(str(part.path) for part in self.parts)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.clips.class_names

    @property
    def label_space(self) -> LabelSpace:
        return self.clips.label_space

    @property
    def fingerprint(self) -> str:
        """Digest of the fingerprints of all parts, 32 hexadecimal digits."""
        return digest_of(self.clips.fingerprint, *sorted(source.fingerprint for source in self.sources))

    @property
    def content_fingerprint(self) -> str:
        """The same of what the parts' audio holds."""
        return digest_of(self.clips.content_fingerprint, *sorted(part.content_fingerprint for part in self.sources))

    @property
    def further_rows(self) -> np.ndarray:
        """The rows of the sources, int64."""
        return np.arange(len(self.clips), len(self))

    def clip_id(self, row: int) -> str:
        part, row = self._locate(row)
        return part.clip_id(row)

    def targets(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 (k, C): the targets of the clips; meaningless zeros for the sources."""
        return self._of_clips(rows, self.clips.targets, len(self.class_names), np.float32)

    def mask(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """bool (k, C): the mask of the clips; false for the sources."""
        return self._of_clips(rows, self.clips.mask, len(self.class_names), np.bool_)

    def audio_digests(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 (k, 16): hash of each clip's stored audio; zeros if unknown."""
        rows = np.asarray(rows, dtype=np.int64)
        number = np.searchsorted(self._first_rows, rows, side="right") - 1
        result = np.zeros((len(rows), 16), dtype=np.uint8)
        for index in np.unique(number):
            mine = number == index
            result[mine] = self.parts[index].audio_digests(rows[mine] - self._first_rows[index])
        return result

    def duration_seconds(self, row: int) -> float:
        part, row = self._locate(row)
        return part.duration_seconds(row)

    def waveform(
        self, row: int, sample_rate_hz: int, start_seconds: float = 0.0, seconds: float | None = None
    ) -> np.ndarray:
        """One clip as a mono waveform, float32 (samples,)."""
        part, row = self._locate(row)
        return part.waveform(row, sample_rate_hz, start_seconds, seconds)

    def _locate(self, row: int) -> tuple[AnyClips | TaskClips | AnySounds, int]:
        """The part that contains a row, and the row's number in it."""
        row = range(len(self))[row]
        number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return self.parts[number], row - int(self._first_rows[number])

    def _of_clips(
        self, rows: Sequence[int] | np.ndarray, read: Callable[[np.ndarray], np.ndarray], columns: int, dtype: type
    ) -> np.ndarray:
        rows = np.asarray(rows, dtype=np.int64)
        result = np.zeros((len(rows), columns), dtype)
        mine = rows < len(self.clips)
        result[mine] = read(rows[mine])
        return result


def with_unlabelled(
    clips: AnyClips | TaskClips, sources: Sequence[AnySounds], say: Callable[[str], None] = lambda text: None
) -> AnyClips | TaskClips | WithUnlabelled:
    """The clips followed by the sources, or just the clips if there are no sources. Findings are reported to ``say``.

    Raises:
        ValueError: a clip id that occurs twice, or a file that is already among the clips.
    """
    if not sources:
        return clips
    for number, source in enumerate(sources):
        for other in (clips, *sources[:number]):
            _refuse_shared(source, other)
    for source in sources:
        labels = "" if isinstance(source, TaskClips) else "; its labels are not used"
        say(getattr(source, "note", f"{source.path}: {len(source)} clips without labels{labels}"))
    return WithUnlabelled(clips, sources)


def open_sources(paths: Sequence[Path], class_names: Sequence[str]) -> list[AnySounds]:
    """The sources that ``--unlabelled`` names. ValueError for a path that is neither a folder of sounds nor a clip store."""
    return [open_unlabelled(path, class_names) for path in paths]


def _refuse_shared(source: AnySounds, other: AnyClips | TaskClips | AnySounds) -> None:
    """Raises ValueError if both have a clip with the same id, or the same file."""
    if isinstance(source, TaskClips) and isinstance(other, TaskClips):
        files = {clip.path.resolve() for clip in other.clips}
        if shared := [clip.clip_id for clip in source.clips if clip.path.resolve() in files]:
            raise ValueError(
                f"{len(shared)} files of --unlabelled {source.path} are also clips of {other.path}: {listed(shared, limit=3)}; "
                "leave them out of one of the two"
            )
    for start in range(0, len(source), IDS_AT_ONCE):
        ids = [source.clip_id(row) for row in range(start, min(start + IDS_AT_ONCE, len(source)))]
        if shared := [ids[index] for index in np.flatnonzero(other.find(ids) >= 0)]:
            raise ValueError(
                f"--unlabelled {source.path} and {other.path} both have the clip ids {listed(shared, limit=3)}, so teacher "
                "logits would be ambiguous; rename the files, or give a folder above them"
            )
