"""Stopping on request: SIGTERM and SIGUSR1, which cluster schedulers send, are noted, and acted upon between two steps."""

import os
import signal
import threading
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """Work ended early on request, with everything done so far saved; the same command goes on with it.

    ``run_command`` turns it into the exit code ``audio_datasets.command.STOPPED``.
    """


class StopSignals:
    """Notes the stop signals that arrive while the context lasts; outside it they end the process, as usual.

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
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name


def outlive_stop_signals(worker: int) -> None:
    """Makes a data-loading worker live through stop signals, unless its own parent sends them.

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
