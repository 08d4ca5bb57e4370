"""Clips that cannot be used: recognising, recording and reporting them, in the same way for every command.

A clip is bad if its audio cannot be decoded, is empty, contains NaN or infinite samples, is too long to be decoded, or has changed
since it was packed. Commands that decode audio take ``--on-bad-clip``: ``refuse`` stops with the clip's name, ``skip`` leaves it
out, and at the end counts and lists the skipped clips. docs/bad_data.md says what skipping means in each command.

A clip is suspicious, not bad, if it is silent, clipped or very short, or if its header gives another length than it has:
``kd pack`` reports it and keeps it.
"""

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from audio_datasets.audio.codec import AUDIO_SUFFIXES, AudioCheck
from audio_datasets.system.files import errors_of, written_aside
from audio_datasets.system.messages import by_kind
from audio_datasets.system.paths.inputs import read_regular
from audio_datasets.system.paths.outputs import no_link

OnBadClip = Literal["refuse", "skip"]

SILENT_PEAK = 2.0**-15  # nothing beyond the smallest step of 16-bit samples
CLIPPED_SHARE = 0.01
SHORTEST_SECONDS = 0.05
EXAMPLES = 3
# What ``str.splitlines`` ends a line at, and the tab between the columns of a list. A no-break or ideographic space is part of a name.
LINE_BREAKS = re.compile(r"[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")
CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f]")


SYSTEM_FAULTS = {
    *(errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
}
"""Errors that say nothing about the file that was to be read: disks, their networks, and what a process may have open."""


class BadClipError(ValueError):
    """A clip that cannot be used. Its message names the clip and says why; ``reason`` says why alone."""

    def __init__(self, message: str, reason: str = "") -> None:  # from a worker process comes the message alone
        super().__init__(message)
        self.reason = reason or message


def refuse_system_fault(error: Exception, path: str | os.PathLike) -> None:
    """Raises an OSError that names the file if reading it failed because of the machine, in which case the clip is not bad.

    Left out because of a network disk that was away, or too many open files, it would be missing from then on.
    """
    if isinstance(error, OSError) and error.errno in SYSTEM_FAULTS:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def suspicion(check: AudioCheck) -> str | None:
    """What is suspicious about a usable clip; None if nothing is."""
    found = []
    if check.peak <= SILENT_PEAK:
        found.append("silent")
    if check.clipped_share >= CLIPPED_SHARE:
        found.append(f"clipped ({100 * check.clipped_share:.0f} % of its samples at full scale)")
    if check.info.duration_seconds < SHORTEST_SECONDS:
        found.append(f"very short ({check.info.samples} samples)")
    found += check.info.oddities
    return ", ".join(found) or None


def summary(clips: Mapping[str, str], of: int, what: str) -> str:
    """One line for the end of a run, such as "2 of 40 clips skipped: 'a' (audio is empty), 'b' (…)".

    Where the clips are called like files, it counts the kinds: "2 of 40 clips skipped (1 .m4a, 1 .wav): …".
    """
    if any(Path(name).suffix.lower() in AUDIO_SUFFIXES for name in clips):
        what = f"{what} ({by_kind(clips)})"
    shown = ", ".join(f"{name!r} ({reason})" for name, reason in list(clips.items())[:EXAMPLES])
    return f"{len(clips)} of {of} clips {what}: {shown}{' …' if len(clips) > EXAMPLES else ''}"


class ClipList:
    """A text file of clips, one per line with the reason: name, tab, reason.

    Any number of processes can add to it. A name that is added again counts once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, name: str, reason: str) -> None:
        """Appends a clip with a single write, so that lines of several processes are not mixed."""
        line = _line(name, reason).encode()
        descriptor = no_link(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            with errors_of(self.path):
                os.write(descriptor, line)
        finally:
            os.close(descriptor)

    def read(self) -> dict[str, str]:
        """Reason by name, in the order of the file; empty if there is no file."""
        if not self.path.exists():
            return {}
        lines = read_regular(self.path).decode("utf-8").splitlines()
        return {name: reason for name, _, reason in (line.partition("\t") for line in lines)}

    def replace(self, clips: Mapping[str, str]) -> None:
        """Rewrites the list under a temporary name that is then renamed; removes the file if there are no clips."""
        if not clips:
            self.path.unlink(missing_ok=True)
            return
        with written_aside(self.path) as aside:
            aside.write_text("".join(_line(*clip) for clip in clips.items()), encoding="utf-8")


def _line(name: str, reason: str) -> str:
    # Whatever a file is called, it stays one line of two columns.
    return f"{one_line(name)}\t{one_line(reason)}\n"


def one_line(text: str) -> str:
    """``text`` as one line that any terminal shows: other control characters, and bytes that are not UTF-8, as escapes."""
    text = " ".join(LINE_BREAKS.split(text.encode("utf-8", "backslashreplace").decode())).strip()
    return CONTROL_CHARACTERS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
