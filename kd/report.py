"""The report of a run: ``report.html``, a self-contained page, and ``report.md``, the same as text."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from audio_datasets.audio.codec import decode, encode
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.names import normal
from audio_datasets.system.command import parse, run_command
from audio_datasets.system.files import write_text
from audio_datasets.tasks.audio_files import FolderWalk, is_audio
from kd.reports.document import Document
from kd.reports.markdown_text import to_markdown
from kd.reports.page import to_html
from kd.reports.run_reader import RunFolder
from kd.reports.sections.circumstances import circumstance_sections
from kd.reports.sections.findings import finding_sections
from kd.reports.sections.headline import title_and_headline
from kd.reports.sections.mistakes import mistake_lists, mistake_section

HTML_FILE = "report.html"
MARKDOWN_FILE = "report.md"

LARGEST_REPORT_BYTES = 5_000_000
PREVIEW_SECONDS = 5.0
PREVIEW_RATE_HZ = 16_000

PLAYER_NOTE = f"Players have the first {PREVIEW_SECONDS:g} s of a clip at {PREVIEW_RATE_HZ // 1000} kHz."

Audio = Callable[[str], bytes | None]


@dataclass(frozen=True)
class ReportConfig:
    """Write report.html and report.md into a run folder. Existing ones are replaced."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of kd finetune or kd pretrain."""
    audio: Path | None = None
    """Where to find the audio of mistakes: a clip store, or a folder of files named by clip id (default: the files that the run
    used)."""


def write_report(run: Path, audio: Audio | None = None) -> Path:
    """Writes ``report.html`` and ``report.md`` into a run folder, and returns the path of the former.

    Args:
        audio: returns the content of a clip's audio file by clip id, or None. The mistakes then have players for the first
            seconds of their clips, up to the size limit of a report. By default, the files named in the predictions are read if
            they still exist.

    Raises:
        ValueError: ``run`` is not a run folder, or its files are damaged.
    """
    folder = RunFolder.read(run)
    mistakes = mistake_lists(folder)
    first, findings, circumstances = title_and_headline(folder), finding_sections(folder), circumstance_sections(folder)

    def document(sounds: Mapping[str, bytes]) -> Document:
        heard = [mistake_section(mistakes, sounds, PLAYER_NOTE)] if mistakes else []
        return Document(*first, (*findings, *heard, *circumstances))

    room = LARGEST_REPORT_BYTES - len(to_html(document({})).encode())
    clip_ids = dict.fromkeys(mistake.clip_id for _, found in mistakes for mistake in found)
    sounds = previews(clip_ids, audio or audio_of_run(folder), room)
    write_text(folder.path / MARKDOWN_FILE, to_markdown(document({})))
    write_text(folder.path / HTML_FILE, to_html(document(sounds)))
    return folder.path / HTML_FILE


def previews(clip_ids: Iterable[str], audio: Audio, room_bytes: int) -> dict[str, bytes]:
    """The beginning of each clip as a small MP3 file, as many as there is room for in a page.

    Clips that are not there or cannot be decoded have none.
    """
    found = {}
    for clip_id in clip_ids:
        data = audio(clip_id)
        if data is None:
            continue
        try:
            waveform = decode(data, PREVIEW_RATE_HZ, seconds=PREVIEW_SECONDS)
        except ValueError:
            continue
        sound = encode(waveform, PREVIEW_RATE_HZ, "mp3")
        # A clip may be in two lists; base64 makes four characters of three bytes.
        room_bytes -= 2 * (len(sound) * 4 // 3 + 200)
        if room_bytes < 0:
            break
        found[clip_id] = sound
    return found


def audio_of_run(run: RunFolder) -> Audio:
    """Clips by the files that the run's predictions name."""
    files: dict[str, str] = {}
    for _, predictions in run.predictions:
        if predictions.sources is not None:
            files.update(zip(predictions.clip_ids.tolist(), predictions.sources.tolist(), strict=True))

    def read(clip_id: str) -> bytes | None:
        path = Path(files.get(clip_id, ""))
        return path.read_bytes() if path.is_file() else None

    return read


def audio_from(path: Path) -> Audio:
    """Clips of a clip store, or audio files under a folder, by clip id.

    A file's id is its name or its path below the folder, with or without its suffix.

    Raises:
        ValueError: neither a clip store nor a folder.
    """
    if path.is_dir():
        files = files_by_id(path)
        return lambda clip_id: files[clip_id].read_bytes() if clip_id in files else None
    store = ClipStore.open(path)
    row_of = {clip_id: row for row, clip_id in enumerate(store.clip_ids)}
    rate = PREVIEW_RATE_HZ
    return lambda clip_id: encode(store.waveform(row_of[clip_id], rate), rate, "wav") if clip_id in row_of else None


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


# --- Command -----------------------------------------------------------------------------------------------------------


def report(config: ReportConfig) -> Path:
    """Writes the report and says where it is."""
    path = write_report(config.run, audio_from(config.audio) if config.audio is not None else None)
    print(f"{path} and {path.with_name(MARKDOWN_FILE).name}, {path.stat().st_size / 1e6:.2f} MB")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(lambda: report(parse(ReportConfig, arguments, "kd report")))


if __name__ == "__main__":
    raise SystemExit(main())
