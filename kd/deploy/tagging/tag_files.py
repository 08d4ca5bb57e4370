"""``kd tag`` on files and folders: tags on standard output, notes and bad files on standard error."""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from audio_datasets.audio.bad_clips import one_line
from audio_datasets.command_line.terminal import is_gone
from audio_datasets.system.command import progress
from audio_datasets.system.files import make_folder
from kd.deploy.tagging.output import EmbeddingRows, TagText
from kd.deploy.tagging.paths import audio_files
from kd.deploy.tagging.tagger import Tagger, UnusableFile

LISTED_FILES = 20


def tag_files(tagger: Tagger, paths: Sequence[Path], text: TagText, embeddings: Path | None = None) -> dict[str, str]:
    """Tags files one after the other and prints each as soon as it is done.

    Returns the files that could not be tagged: reason by name.

    Raises ValueError for a path that does not exist, and for folders without any audio.
    """
    found = audio_files(paths)
    for note in found.notes:
        print(note, file=sys.stderr)
    unusable, odd, rows = dict(found.unusable), {}, EmbeddingRows(text.windows)
    if embeddings is not None:
        make_folder(embeddings.parent)
    width = max((len(one_line(str(file))) for file in found.files), default=0)
    with progress(total=len(found.files), desc="tag", unit="file", shown=len(found.files) > 1, leave=False) as bar:
        both_shown = sys.stdout.isatty() and sys.stderr.isatty()  # the bar is then wiped away before each line
        say = partial(bar.write, file=sys.stdout) if both_shown else print
        heading = text.heading(width)
        if heading is not None:
            say(heading)
        for path, tags in tagger.tag_files(found.files):
            if isinstance(tags, UnusableFile):
                unusable[str(path)] = tags.reason
            else:
                say(text.of_file(str(path), tags, width))
                if tags.oddities:
                    odd[str(path)] = "; ".join(tags.oddities)
                if embeddings is not None:
                    rows.add(str(path), tags)
            bar.update()
            if is_gone(sys.stdout):
                raise BrokenPipeError  # whoever read the tags has had enough, as `head` has
    sys.stdout.flush()
    if embeddings is not None:
        count = rows.write(embeddings, tagger.model.embedding_dim)
        print(f"{embeddings}: {count:,} embeddings of {tagger.model.embedding_dim} numbers", file=sys.stderr)
    of = len(found.files) + len(found.unusable)
    list_files(odd, f"{len(odd):,} of {of:,} files are odd, and were tagged:")
    list_files(unusable, f"{len(unusable):,} of {of:,} files could not be tagged:")
    return unusable


def list_files(reasons: Mapping[str, str], heading: str) -> None:
    """Names files, each with the reason, on standard error; nothing if there are none."""
    if not reasons:
        return
    print(heading, file=sys.stderr)
    for name, reason in list(reasons.items())[:LISTED_FILES]:
        print(f"  {one_line(name)}: {one_line(reason)}", file=sys.stderr)
    if len(reasons) > LISTED_FILES:
        print(f"  … and {len(reasons) - LISTED_FILES:,} more", file=sys.stderr)
