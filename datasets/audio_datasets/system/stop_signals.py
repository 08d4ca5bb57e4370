"""Stopping on request by SIGTERM and SIGUSR1, which cluster schedulers send.

Training records them and stops between two steps. All other work is interrupted by an exception, and half-written files are
removed while it propagates.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """Work was stopped on request and is saved; the same command continues it.

    ``run_command`` turns it into the exit code ``audio_datasets.system.command.STOPPED``.
    """


class StopRequested(BaseException):
    """A stop signal arrived outside ``StopSignals``. Like KeyboardInterrupt it is not an Exception, so no handler of errors stops it.

    ``run_command`` turns it into the exit code ``audio_datasets.system.command.STOPPED``.
    """


@contextmanager
def raised_stop_signals() -> Iterator[None]:
    """Inside the context, a stop signal raises ``StopRequested`` in the main thread, unless an inner ``StopSignals`` records it."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StopRequested(f"received {signal.Signals(number).name}")

    before = _handled_by(stop)
    try:
        yield
    finally:
        _restore(before)


@contextmanager
def delayed_stop_signals() -> Iterator[None]:
    """Blocks stop signals until the context ends. Processes started inside it inherit the blocked signals.

    Such a process must call ``outlive_stop_signals``; otherwise its parent could not stop it either.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS, where outlive_stop_signals does not work
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopSignals:
    """Records stop signals that arrive inside the context.

    Data loaders also need ``worker_init_fn=outlive_stop_signals``.

    The end of a launcher also counts as a request to stop: after torch.distributed.run has been killed, nothing signals or
    watches the processes that it started.
    """

    def __init__(self) -> None:
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._reason: str | None = None

    @property
    def reason(self) -> str | None:
        """The reason to stop, such as "received SIGTERM" or "the launcher has ended"; None if there is none."""
        if self._reason is None and self._launcher not in (None, os.getppid()):
            self._reason = "the launcher has ended"
        return self._reason

    @property
    def requested(self) -> bool:
        return self.reason is not None

    def __enter__(self) -> "StopSignals":
        self._before = _handled_by(self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        _restore(self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._reason = f"received {signal.Signals(number).name}"


Handler = Callable[[int, FrameType | None], Any]


def _handled_by(handler: Handler) -> dict[int, Handler | int | None]:
    """Installs a handler for all stop signals; returns the previous handlers."""
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers in the main thread only
        return {}
    return {number: signal.signal(number, handler) for number in STOP_SIGNALS}


def _restore(handlers: dict[int, Handler | int | None]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def outlive_stop_signals(worker: int = 0) -> None:
    """Makes a worker process ignore stop signals unless its own parent sends them.

    Launchers and schedulers signal whole process groups, and PyTorch's workers would end at once. But their parent needs
    their batches to finish its step. It ends them itself when it is done.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=_end_for_parent, args=(os.getppid(),), daemon=True).start()


def _end_for_parent(parent: int) -> None:
    while signal.sigwaitinfo(STOP_SIGNALS).si_pid != parent:
        pass
    os._exit(0)
