"""The report of a run: ``report.html``, a self-contained page, and ``report.md``, the same as text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from audio_datasets.system.command import parse, run_command
from audio_datasets.system.files import write_text
from kd.reports.document import Document
from kd.reports.markdown_text import to_markdown
from kd.reports.page import to_html
from kd.reports.run_reader import RunFolder
from kd.reports.sections.circumstances import circumstance_sections
from kd.reports.sections.findings import finding_sections
from kd.reports.sections.headline import title_and_headline
from kd.reports.sections.mistakes import mistake_lists, mistake_section
from kd.reports.sounds import PLAYER_NOTE, Audio, Previews, audio_from, audio_of_run, previews

HTML_FILE = "report.html"
MARKDOWN_FILE = "report.md"

LARGEST_REPORT_BYTES = 5_000_000
ROOM_FOR_NOTES = 1_000
"""Bytes for the sentences about the players."""


@dataclass(frozen=True)
class ReportConfig:
    """Write report.html and report.md into a run folder. Existing ones are replaced."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of kd finetune or kd pretrain."""
    audio: Path | None = None
    """Where to find the audio of mistakes: a clip store, or a folder of files named by clip id (default: the files that the run
    used)."""
    allow_outside: bool = False
    """Also play files that lie outside of the run's data. Only for runs that you trust: the page holds what they name."""


def write_report(run: Path, audio: Audio | None = None, allow_outside: bool = False) -> Path:
    """Writes ``report.html`` and ``report.md`` into a run folder, and returns the path of the former.

    Args:
        audio: returns the content of a clip's audio file by clip id, or None. The mistakes then have players for the first
            seconds of their clips, up to the size limit of a report. By default, the files named in the predictions are read if
            they still exist (``reports.sounds.audio_of_run``). Clips without a player are counted, in the page and on the terminal.
        allow_outside: by default also files outside of the run's data.

    Raises:
        ValueError: ``run`` is not a run folder, or its files are damaged.
    """
    folder = RunFolder.read(run)
    mistakes = mistake_lists(folder)
    first, findings, circumstances = title_and_headline(folder), finding_sections(folder), circumstance_sections(folder)

    def document(heard: Previews) -> Document:
        notes = (PLAYER_NOTE if heard.sounds else "", f"{heard.note}." if heard.note else "")
        section = [mistake_section(mistakes, heard.sounds, " ".join(filter(None, notes)))] if mistakes else []
        return Document(*first, (*findings, *section, *circumstances))

    room = LARGEST_REPORT_BYTES - ROOM_FOR_NOTES - len(to_html(document(Previews())).encode())
    clip_ids = dict.fromkeys(mistake.clip_id for _, found in mistakes for mistake in found)
    heard = previews(clip_ids, audio or audio_of_run(folder, allow_outside), room)
    write_text(folder.path / MARKDOWN_FILE, to_markdown(document(Previews())))
    write_text(folder.path / HTML_FILE, to_html(document(heard)))
    if heard.note:
        print(heard.note)
    return folder.path / HTML_FILE


# --- Command -----------------------------------------------------------------------------------------------------------


def report(config: ReportConfig) -> Path:
    """Writes the report and says where it is. ValueError for options that do not go together."""
    if config.allow_outside and config.audio is not None:
        raise ValueError(
            "--allow-outside has no effect with --audio, which says where the audio is; leave out one of the two"
        )
    audio = audio_from(config.audio) if config.audio is not None else None
    path = write_report(config.run, audio, config.allow_outside)
    print(f"{path} and {path.with_name(MARKDOWN_FILE).name}, {path.stat().st_size / 1e6:.2f} MB")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(lambda: report(parse(ReportConfig, arguments, "kd report")))


if __name__ == "__main__":
    raise SystemExit(main())
