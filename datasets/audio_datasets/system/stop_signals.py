"""Stopping on request by SIGTERM and SIGUSR1, which cluster schedulers send, and by SIGHUP, which a closed terminal sends.

Training records them and stops between two steps. All other work is interrupted by an exception, and half-written files are
removed while it propagates.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
PARENT_CHECK_SECONDS = 1.0
"""How soon a worker notices that its parent has ended."""
ONE_INTERRUPTION_SECONDS = 3.0
"""Ctrl-C that is pressed again within this time counts once, so that it does not break off the tidying up."""


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
    # An ignored signal stays ignored: nohup says so of SIGHUP.
    heeded = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heeded}


def interrupt_once() -> None:
    """Makes repeated Ctrl-C one KeyboardInterrupt. Does nothing where Ctrl-C is ignored, or handled in another way."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    last = -ONE_INTERRUPTION_SECONDS

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before >= ONE_INTERRUPTION_SECONDS:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)


def _restore(handlers: dict[int, Handler | int | None]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def outlive_stop_signals(worker: int = 0) -> None:
    """Makes a worker process ignore Ctrl-C, and stop signals unless its own parent sends them; it ends when its parent has ended.

    Launchers, schedulers and terminals signal whole process groups, and PyTorch's workers would end at once. But their parent
    needs their batches to finish its step. It ends them itself when it is done. If it is killed it cannot, and PyTorch's
    workers may then wait for ever to pass on a batch.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=_end_for_parent, args=(os.getppid(),), daemon=True).start()


def _end_for_parent(parent: int) -> None:
    while os.getppid() == parent:
        received = signal.sigtimedwait(STOP_SIGNALS, PARENT_CHECK_SECONDS)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)
