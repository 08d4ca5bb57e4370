"""Stopping on request by SIGTERM and SIGUSR1, which cluster schedulers send.

Training notes them and stops between two steps. Whatever else a command does ends where it is, by an exception on whose
way out half-written files are removed.
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
    """Work ended early on request, with everything done so far saved; the same command goes on with it.

    ``run_command`` turns it into the exit code ``audio_datasets.system.command.STOPPED``.
    """


class StopRequested(BaseException):
    """A stop signal came, and nobody notes them. Like KeyboardInterrupt no Exception: it is no error to be dealt with.

    ``run_command`` turns it into the exit code ``audio_datasets.system.command.STOPPED``.
    """


@contextmanager
def raised_stop_signals() -> Iterator[None]:
    """A stop signal raises ``StopRequested``, wherever the main thread is, unless a ``StopSignals`` inside notes it."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StopRequested(f"{signal.Signals(number).name} came")

    before = _handled_by(stop)
    try:
        yield
    finally:
        _restore(before)


@contextmanager
def delayed_stop_signals() -> Iterator[None]:
    """Stop signals wait until the context ends. Processes that are started in it never end of them.

    Such a process must call ``outlive_stop_signals``, or its parent could not end it either.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS, where they could not
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopSignals:
    """Notes the stop signals that arrive while the context lasts.

    Data loaders need ``worker_init_fn=outlive_stop_signals`` besides.

    The end of a launcher also counts: if torch.distributed.run is killed outright, nobody would signal or watch the
    processes that it started.
    """

    def __init__(self) -> None:
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._received: str | None = None

    @property
    def reason(self) -> str | None:
        """What asks for a stop: a signal's name, or that the launcher is gone; None if nothing does."""
        if self._received is None and self._launcher not in (None, os.getppid()):
            self._received = "the end of its launcher"
        return self._received

    @property
    def requested(self) -> bool:
        return self.reason is not None

    def __enter__(self) -> "StopSignals":
        self._before = _handled_by(self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        _restore(self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name


Handler = Callable[[int, FrameType | None], Any]


def _handled_by(handler: Handler) -> dict[int, Handler | int | None]:
    """Installs a handler of all stop signals; returns those before it."""
    if threading.current_thread() is not threading.main_thread():  # elsewhere Python allows none
        return {}
    return {number: signal.signal(number, handler) for number in STOP_SIGNALS}


def _restore(handlers: dict[int, Handler | int | None]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def outlive_stop_signals(worker: int = 0) -> None:
    """Makes a worker process live through stop signals, unless its own parent sends them.

    Launchers and schedulers signal whole process groups, and PyTorch's workers would end at once; but the process they
    work for needs their batches to finish its step. It ends them itself when it is done.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=_end_for_parent, args=(os.getppid(),), daemon=True).start()


def _end_for_parent(parent: int) -> None:
    while signal.sigwaitinfo(STOP_SIGNALS).si_pid != parent:
        pass
    os._exit(0)
