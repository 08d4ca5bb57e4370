"""One writer at a time: a lock file that names its owner, and is free again as soon as its owner is gone.

The lock is ``flock``'s, which the kernel gives back when a process ends, however it ends. On file systems without it the
file's existence is the lock, and one whose owner is known to be gone (same machine, no such process) is taken over.

Why not ``filelock`` (4.2.11, tried): it too frees a lock when its owner is killed, with forked children still alive. But where
``flock`` fails with ENOLCK or EOPNOTSUPP, as on NFS without its lock service, it raises OSError: it falls back to a file's
existence for ENOSYS only. The file of that fallback has its own content, with no room for since when and by which command.
Its lock files stay behind. Owner, message, waiting, removal and a second fallback would remain here: most of this module.
"""

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache
from pathlib import Path

from audio_datasets.system.files import make_folder

WAIT_SECONDS = 0.5
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_held: set[int] = set()
"""Descriptors of the locks that this process holds."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock, as its file tells it."""

    host: str
    pid: int
    process_start: str
    """What tells the process from an earlier or later one with its number; empty where the system does not say."""
    since: str
    """When it took the lock, local time."""
    command: str

    @classmethod
    def this_process(cls) -> "Owner":
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            process_start=process_start(os.getpid()),
            since=datetime.now().isoformat(sep=" ", timespec="seconds"),
            command=shlex.join(sys.argv),
        )

    def is_gone(self) -> bool:
        """Whether the process has surely ended; False for one on another machine, of which nothing is known."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # somebody else's process: it is there
            pass
        return process_start(self.pid) != self.process_start

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since} ({self.command})"


def process_start(pid: int) -> str:
    """Boot and clock tick at which a process started, from Linux's /proc; empty where there is none."""
    try:
        # After the process's name, which may itself hold brackets and spaces: state is field 3, the start is field 22.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii').strip()} {fields[22 - 3]}"
    except (OSError, IndexError):
        return ""


class InUse(ValueError):
    """Somebody else holds a lock."""


@contextmanager
def locked(path: Path, what: str, while_busy: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds the lock file ``path`` for as long as the context lasts; it is removed at the end.

    Processes forked meanwhile (data loaders) do not hold it: it is free when the process that took it is gone.

    Args:
        what: what the lock protects, for the message: "runs/mn10 is in use by …".
        while_busy: wait for it, and call this again and again meanwhile; it may raise.

    Raises:
        InUse: another process, or another part of this one, holds it; names the owner.
    """
    make_folder(path.parent)
    told = False
    while True:
        try:
            descriptor = _lock(path, what)
            break
        except InUse as error:
            if while_busy is None:
                raise
            if not told:
                print(f"waiting: {error}", file=sys.stderr)
            told = True
            while_busy()
            time.sleep(WAIT_SECONDS)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # still locked, so it is ours
        _release(descriptor)


def _lock(path: Path, what: str) -> int:
    """Descriptor of the lock file, locked and with our name in it."""
    _close_in_forked_processes()
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _held.add(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                os.ftruncate(descriptor, 0)  # what an owner that was killed left
                os.write(descriptor, _our_name())
                return descriptor
            # Its owner removed the file after we had opened it: what we locked is nobody's. Once more.
        except BlockingIOError:
            _release(descriptor)
            raise InUse(_busy(what, path, _read_owner(path))) from None
        except OSError as error:
            _release(descriptor)
            if error.errno in NO_FLOCK:
                return _create(path, what)
            raise
        _release(descriptor)


def _create(path: Path, what: str) -> int:
    """The lock without flock: the file belongs to whoever creates it, with a name in it from the first moment."""
    aside = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
    aside.write_bytes(_our_name())
    try:
        owner = _read_owner(path)
        if owner is None or owner.is_gone():  # an attempt to flock left it empty, or a process that was killed left it
            path.unlink(missing_ok=True)
        os.link(aside, path)
    except FileExistsError:
        raise InUse(_busy(what, path, owner)) from None
    finally:
        aside.unlink()
    descriptor = os.open(path, os.O_RDONLY)
    _held.add(descriptor)
    return descriptor


def _our_name() -> bytes:
    return json.dumps(asdict(Owner.this_process()), indent=2).encode() + b"\n"


def _release(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether ``path`` still names the file behind the descriptor."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _read_owner(path: Path) -> Owner | None:
    """The owner as the file names it; None if it does not (yet)."""
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _busy(what: str, path: Path, owner: Owner | None) -> str:
    return (
        f"{what} is in use by {owner or 'another process'}; wait for it or end it. "
        f"(If it is surely gone, remove {path} and start again.)"
    )


@cache
def _close_in_forked_processes() -> None:
    """A lock of flock's lasts until the last copy of its descriptor is closed; a child of a fork has a copy."""
    os.register_at_fork(after_in_child=_close_held)


def _close_held() -> None:
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()
