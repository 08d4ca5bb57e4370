"""Tags audio files with a trained student or an export (a table, JSON lines, CSV, embeddings), and events of a stream."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from audio_datasets.command_line.help_pages import HelpGroups
from audio_datasets.stores.class_lists import read_class_names
from audio_datasets.system.command import USER_MISTAKE, parse, run_command
from audio_datasets.system.paths.outputs import Output, check_outputs, npz_with
from kd.deploy.streaming.options import StreamOptions
from kd.deploy.streaming.tag_stream import tag_stream
from kd.deploy.tagging.output import TOP, TagText
from kd.deploy.tagging.tag_files import tag_files
from kd.deploy.tagging.tagger import Tagger


@dataclass(frozen=True)
class TagConfig:
    """Tag audio files, or all audio files in folders; or print the events of a stream."""

    help_groups: ClassVar[HelpGroups] = {
        "Files and tagger": ("files", "tagger", "class_names"),
        "What is printed": ("top", "present", "threshold", "windows", "json", "csv", "embeddings"),
        "Computing": ("window_seconds", "device", "threads"),
    }

    tagger: str
    """A run folder, an export folder, or NAME@WEIGHTS (such as mn04@mn04_as_mAP_432.pt)."""
    files: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Audio files, and folders with audio files."""
    class_names: Path | None = None
    """Class list for weights that carry none (AudioSet's class_labels_indices.csv, or one name a line). If left out, a
    class_labels_indices.csv beside the weights is read; without one, classes are numbered."""
    top: int | None = None
    """Show at most this many classes of a file, the highest scores first (default: 5 in the table, all in JSON)."""
    present: bool = False
    """Show only classes whose scores reach their thresholds."""
    threshold: float | None = None
    """One threshold for all classes, from 0 to 1. If left out: those chosen on the run's validation clips, or 0.5."""
    windows: bool = False
    """Also show each window of a file, with its start and end."""
    json: bool = False
    """Print one line of JSON for each file."""
    csv: bool = False
    """Print CSV: one row for each file (with --windows: for each window), one column for each class."""
    embeddings: Path | None = None
    """Also write embeddings to this .npz file: one row for each file (with --windows: for each window)."""
    overwrite: bool = False
    """Let --embeddings replace a file that holds something else than embeddings."""
    window_seconds: float | None = None
    """Length of the windows. If left out: that of the student's evaluation."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU if there is one. Exports run on the CPU."""
    threads: int | None = None
    """Threads that compute on the CPU (the library's own choice if left out)."""
    streams: Annotated[StreamOptions, tyro.conf.arg(name="")] = field(default_factory=StreamOptions)

    def __post_init__(self) -> None:
        if self.streams.is_used:
            for name in ("files", "top", "present", "windows", "json", "csv", "embeddings", "overwrite"):
                if getattr(self, name):
                    flag = "files" if name == "files" else f"--{name}"
                    raise ValueError(f"{flag} would not be used: of a stream, events are printed; leave it out")
        elif not self.files:
            raise ValueError("give at least one audio file or folder, or --stream or --microphone")
        if self.top is not None and self.top < 1:
            raise ValueError(f"--top must be at least 1; found {self.top}")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"--threshold must lie between 0 and 1; found {self.threshold:g}")
        if self.json and self.csv:
            raise ValueError("--json and --csv exclude each other")
        if self.csv and (self.top is not None or self.present or self.threshold is not None):
            raise ValueError("--csv has the scores of all classes; leave --top, --present and --threshold out")
        if self.embeddings is not None and self.embeddings.suffix != ".npz":
            raise ValueError(f"--embeddings must end in .npz; found {self.embeddings}")

    def text(self, class_names: Sequence[str]) -> TagText:
        """How tags are printed."""
        form = "json" if self.json else "csv" if self.csv else "table"
        top = TOP if self.top is None and form == "table" else self.top
        return TagText(tuple(class_names), form, self.windows, top, self.present)


def tag(config: TagConfig) -> int:
    """Tags what was named; exit code 2 if a file could not be tagged."""
    if config.embeddings is not None:
        written = Output(config.embeddings, npz_with("embeddings"), "embeddings")
        check_outputs(config, [written], config.overwrite)
    streams = config.streams
    tagger = Tagger.load(
        config.tagger,
        class_names=None if config.class_names is None else read_class_names(config.class_names),
        window_seconds=None if streams.is_used else config.window_seconds,
        device=config.device,
        threads=config.threads,
        threshold=config.threshold,
    )
    try:
        if streams.is_used:
            return tag_stream(tagger.model, streams.open(), streams.settings(config.window_seconds))
        unusable = tag_files(tagger, config.files, config.text(tagger.class_names), config.embeddings)
    except BrokenPipeError:
        return 0
    return USER_MISTAKE if unusable else 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(lambda: tag(parse(TagConfig, arguments, "kd tag")))


if __name__ == "__main__":
    raise SystemExit(main())
