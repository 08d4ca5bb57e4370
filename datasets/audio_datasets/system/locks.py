"""Locks: a lock file that names its owner and is released as soon as its owner ends.

We use ``flock``, which the kernel releases when a process ends for whatever reason. On file systems without ``flock`` the
file's existence is the lock. A lock whose owner is known to be gone (same machine, no such process) is taken over.

Why not ``filelock`` (4.2.11, tried): it also releases a lock when its owner is killed while forked children are still alive. But
if ``flock`` fails with ENOLCK or EOPNOTSUPP, as on NFS without its lock service, it raises OSError, because it falls back to a
file's existence only for ENOSYS. The file of that fallback cannot store start time and command. Its lock files are not removed.
Owner, message, waiting, removal and a second fallback would remain here, which is most of this module.
"""

import fcntl
import json
import os
import secrets
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

from audio_datasets.system.files import NO_FLOCK, errors_of, make_folder
from audio_datasets.system.paths.outputs import no_link

WAIT_SECONDS = 0.5

_held: set[int] = set()
"""Descriptors of the locks that this process holds."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock, as described in the lock file."""

    host: str
    pid: int
    process_start: str
    """Distinguishes the process from others that had or will have the same id; empty if the system does not provide it."""
    since: str
    """When it acquired the lock, in local time."""
    command: str
    container: str = ""
    """The namespace of process ids: containers may have the same host name and processes of the same id."""

    @classmethod
    def this_process(cls) -> "Owner":
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            process_start=process_start(os.getpid()),
            since=datetime.now().isoformat(sep=" ", timespec="seconds"),
            command=shlex.join(sys.argv),
            container=process_namespace(),
        )

    def is_gone(self) -> bool:
        """Whether the process has certainly ended; False on other machines and in other containers, of which nothing is known."""
        if self.host != socket.gethostname() or self.container not in ("", process_namespace()):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # the process exists, but belongs to another user
            pass
        return process_start(self.pid) != self.process_start

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since} ({self.command})"


def process_namespace() -> str:
    """The namespace in which this process has its id, from Linux's /proc; empty on other systems."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def process_start(pid: int) -> str:
    """The boot id and clock tick at which a process started, from Linux's /proc; empty on other systems."""
    try:
        # Read after the process's name, which may contain brackets and spaces. State is field 3, start time is field 22.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii').strip()} {fields[22 - 3]}"
    except (OSError, IndexError):
        return ""


class InUse(ValueError):
    """Another process holds the lock."""


@contextmanager
def locked(path: Path, what: str, while_busy: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds the lock file ``path`` inside the context, and removes it at the end.

    Processes forked inside it (data loaders) do not hold the lock: it is released when the process that acquired it ends.

    Args:
        what: the thing that the lock protects, for the message: "runs/mn10 is in use by …".
        while_busy: wait for the lock, and call this function repeatedly in the meantime; it may raise.

    Raises:
        InUse: another process, or another part of this one, holds the lock; the message names the owner.
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
        with suppress(OSError):  # an empty lock hinders nobody, and what went wrong before says more
            path.unlink(missing_ok=True)  # still locked, so it is ours
        _release(descriptor)


def _lock(path: Path, what: str) -> int:
    """The descriptor of the lock file, locked and with our description in it."""
    _close_in_forked_processes()
    while True:
        descriptor = no_link(path, os.O_RDWR | os.O_CREAT)
        _held.add(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                with errors_of(path):
                    os.ftruncate(descriptor, 0)  # what an owner that was killed left
                    os.write(descriptor, _our_name())
                return descriptor
            # The owner removed the file after we had opened it, so our lock protects nothing. Try again.
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
    """The lock without flock: whoever creates the file owns it. It contains the owner from the start."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(6)}")
    aside.write_bytes(_our_name())
    try:
        owner = _read_owner(path)
        if owner is None or owner.is_gone():  # left empty by an attempt to flock, or left by a killed process
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
    """Whether ``path`` still refers to the descriptor's file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _read_owner(path: Path) -> Owner | None:
    """The owner described in the file; None if there is none (yet)."""
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _busy(what: str, path: Path, owner: Owner | None) -> str:
    return (
        f"{what} is in use by {owner or 'another process'}; wait for it or end it. "
        f"(If it has certainly ended, remove {path} and start again.)"
    )


@cache
def _close_in_forked_processes() -> None:
    """Closes lock descriptors in forked children, because flock holds a lock until the last copy of its descriptor is closed."""
    os.register_at_fork(after_in_child=_close_held)


def _close_held() -> None:
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()
