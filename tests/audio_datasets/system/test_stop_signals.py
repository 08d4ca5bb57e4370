"""Stop signals: noted in the process that asked for it, survived by its children, its exit code, and the launcher's end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from audio_datasets.system.command import STOPPED, run_command
from audio_datasets.system.files import written_aside
from audio_datasets.system.stop_signals import (
    Stopped,
    StopSignals,
    delayed_stop_signals,
    interrupt_once,
    outlive_stop_signals,
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_is_noted_while_the_context_lasts(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert not signals.requested
        os.kill(os.getpid(), number)
        assert signals.reason == f"received {number.name}"
    assert signal.getsignal(number) == before


def test_the_exit_code_of_stopped_work(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> None:
        raise Stopped("saved at step 7")

    assert run_command(stop) == STOPPED == 75
    assert capsys.readouterr().err == "stopped: saved at step 7\n"
    monkeypatch.setenv("RANK", "1")  # of several processes only the main one says it
    assert run_command(stop) == STOPPED
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_ends_a_command_where_it_is(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = signal.getsignal(number)

    def write() -> None:
        with written_aside(tmp_path / "file") as aside:
            aside.write_text("half of")
            try:
                os.kill(os.getpid(), number)
                time.sleep(60)
            except Exception:
                pytest.fail("it is no error")

    assert run_command(write) == STOPPED
    assert capsys.readouterr().err == f"stopped: received {number.name}; the same command starts from the beginning\n"
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) == before

    def note() -> None:
        with StopSignals() as signals:
            os.kill(os.getpid(), number)
            assert signals.requested

    assert run_command(note) == 0


def test_delayed_signals_arrive_later() -> None:
    with StopSignals() as signals:
        with delayed_stop_signals():
            os.kill(os.getpid(), signal.SIGUSR1)
            assert signal.SIGUSR1 in signal.sigpending() or signals.requested  # another thread may have got it
            child = subprocess.run(["sh", "-c", "kill -TERM $$; echo alive"], capture_output=True, text=True)
        assert signals.reason == "received SIGUSR1"
    assert child.stdout == "alive\n"


def test_a_worker_lives_through_a_signal_unless_its_parent_sends_it() -> None:
    """As a data loader's worker: forked, and told so first."""
    read, write = os.pipe()
    worker = os.fork()
    if worker == 0:
        outlive_stop_signals(0)
        os.write(write, b"1")
        time.sleep(60)
        os._exit(1)
    assert os.read(read, 1) == b"1"
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        subprocess.run(["kill", f"-{number:d}", str(worker)], check=True)
        time.sleep(0.05)
        assert os.waitpid(worker, os.WNOHANG) == (0, 0)
    os.kill(worker, signal.SIGTERM)
    assert os.waitpid(worker, 0) == (worker, 0)


def test_the_end_of_a_launcher_counts_as_a_request() -> None:
    """A launcher starts a child and ends; the child (under torch.distributed.run's name) tells what it then sees."""
    child = (
        "import time\nfrom audio_datasets.system.stop_signals import StopSignals\n"
        "with StopSignals() as signals:\n    before = signals.reason\n    print('ready', flush=True)\n    input()\n"
        "    print(before, '/', signals.reason, flush=True)\n"
    )
    launcher = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]); input()"
    for environment, expected in (({"TORCHELASTIC_RUN_ID": "x"}, "the launcher has ended"), ({}, "None")):
        process = subprocess.Popen(
            [sys.executable, "-c", launcher],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        assert process.stdout.readline() == "ready\n"
        process.kill()
        process.wait()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == f"None / {expected}\n"


def test_a_worker_ends_soon_after_its_parent() -> None:
    """Also one that waits for ever, as PyTorch's may for a pipe that nobody reads any more."""
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        worker = os.fork()
        if worker == 0:
            os.close(read)
            outlive_stop_signals(0)
            os.write(write, b"1")
            time.sleep(600)
            os._exit(1)
        time.sleep(600)
        os._exit(1)
    os.close(write)
    assert os.read(read, 1) == b"1"
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert os.read(read, 1) == b""  # the worker has ended, and with it the last writer


def test_a_signal_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.requested
        assert run_command(lambda: os.kill(os.getpid(), signal.SIGHUP)) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_pressed_ten_times_is_one_interruption(capsys: pytest.CaptureFixture) -> None:
    tidied = []

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        finally:
            for _ in range(9):
                os.kill(os.getpid(), signal.SIGINT)
            tidied.append("up")

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run_command(work) == 130
        assert capsys.readouterr().err == "interrupted\n"
        assert tidied == ["up"]
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for a command that runs in the background
        interrupt_once()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
